"""Starts the ranks that a config asks for: in this process, or in one of their own each."""

from typing import Protocol

from longspan.config import EngineConfig
from longspan.cost.samples import Samples
from longspan.engine.executor import Executor
from longspan.models import ModelSpec


class Fleet(Executor, Protocol):
    """Ranks that can measure themselves."""

    def measure(self) -> list[Samples]:
        """What each rank measures of itself, all at the same time; before any plan."""
        ...


def start_fleet(config: EngineConfig, spec: ModelSpec) -> Fleet:
    """Start all ranks and load the model.

    Raises:
        ConfigError, UnsupportedModelError: a rank can't be what the config asks for.
        RankFailedError: a rank could not start.
    """
    if config.executor == "uni":
        from longspan.worker.in_process import InProcessExecutor

        return InProcessExecutor(config, spec)
    from longspan.worker.processes import ProcessExecutor

    return ProcessExecutor(config, spec)
