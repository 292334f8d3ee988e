"""Starts a fleet, lets it measure itself, and fits the cost model's rates to that."""

from collections import Counter
from datetime import UTC, datetime

import torch

from longspan.config import EngineConfig
from longspan.cost.calibration import Calibration
from longspan.cost.kv_shape import KVShape
from longspan.cost.samples import fit_rates
from longspan.models import load_spec
from longspan.worker.fleet import start_fleet
from longspan.worker.forker import Forker
from longspan.worker.launch import kind_of_device


def measured(config: EngineConfig) -> Calibration:
    """What the fleet of a config does, with all of its ranks at work.

    Raises:
        ConfigError, UnsupportedModelError: the fleet can't be started so.
        RankFailedError: a rank could not start, or died.
    """
    spec = load_spec(config)
    if config.executor == "mp":
        Forker.current()
    fleet = start_fleet(config, spec)
    try:
        samples = fleet.measure()
    finally:
        fleet.close()
    return Calibration(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_name(config),
        torch=str(torch.__version__),
        model=config.model,
        ranks_per_host=tuple(Counter(fleet.topology.hosts).values()),
        rates=fit_rates(samples, KVShape.of(spec), spec.num_active_parameters),
        samples=tuple(samples),
    )


def device_name(config: EngineConfig) -> str:
    """What a rank's device is called."""
    if kind_of_device(config.device) == "cuda":
        return torch.cuda.get_device_name()
    return torch.backends.cpu.get_cpu_capability() + " CPU"
