"""Brings up one rank inside its process: device, process group, model."""

import torch
import torch.distributed as dist
from transformers.utils import logging

from longspan.config import EngineConfig
from longspan.cost.rates import CPU_THREAD, CUDA, Rates
from longspan.errors import ConfigError
from longspan.parallel.transport import ThreadTransport, TorchTransport, Transport
from longspan.topology import Topology
from longspan.worker.channel import Start
from longspan.worker.model_runner import ModelRunner


def launch(start: Start) -> ModelRunner:
    """Join the other ranks and load the model. Waits until all ranks have come."""
    logging.disable_progress_bar()
    device = device_of(start.config, start.rank)
    return ModelRunner(start.config, start.spec, _connect(start, device), device)


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: the CPU, or the GPU of the same number on this host.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if config.num_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"context_parallel_size={config.num_ranks} needs as many GPUs, and this host has "
            f"{torch.cuda.device_count()}; lower it or set device='cpu'"
        )
    return torch.device("cuda", rank)


def rates_of(device: torch.device) -> Rates:
    """What this process's device is taken to do: figures for its kind, not yet measured ones."""
    return CUDA if device.type == "cuda" else CPU_THREAD.of_threads(torch.get_num_threads())


def _connect(start: Start, device: torch.device) -> Transport:
    size = start.config.num_ranks
    if size == 1:
        return ThreadTransport.connect(Topology.of_hosts([1]))[0]
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{start.rendezvous}",
        rank=start.rank,
        world_size=size,
        device_id=device if on_gpu else None,
    )
    return TorchTransport()
