"""Brings up one rank inside its process: device, process group, model."""

import os
import sys
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]
from transformers.utils import logging

from longspan.config import EngineConfig
from longspan.cost.rates import CPU_THREAD, CPU_THREAD_IN_PAIRS, CUDA, Rates
from longspan.errors import ConfigError
from longspan.parallel.staged_transport import StagedTransport
from longspan.parallel.transport import ThreadTransport, TorchTransport, Transport
from longspan.topology import Topology
from longspan.worker import mpi
from longspan.worker.channel import Start
from longspan.worker.meeting import Meeting
from longspan.worker.model_runner import ModelRunner

SHARE_GPU = "LONGSPAN_SHARE_GPU"
"""Environment variable for tests: where it is set, ranks may share a GPU, and talk over gloo."""


def launch(start: Start) -> ModelRunner:
    """Join the other ranks and load the model. Waits until all ranks have come."""
    logging.disable_progress_bar()
    config, topology, rank = start.config, start.topology, start.rank
    device = device_of(config, topology, rank)
    if topology.num_ranks == 1:
        return ModelRunner(config, start.spec, ThreadTransport.connect(topology)[0], device)
    store = _store(start.rendezvous, topology.num_ranks)
    runner = ModelRunner(config, start.spec, _connect(start, device, store), device)
    floats = runner.joint_row_floats if _may_meet(topology) else None
    runner.meeting = Meeting.open(rank, topology.num_ranks, floats, store)
    return runner


def kind_of_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The kind of device that a config asks for on this host."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def device_of(config: EngineConfig, topology: Topology, rank: int) -> torch.device:
    """The device of a rank: the CPU, or the GPU of the same number on this host.

    Ray lets an actor see no GPU but its own. With `SHARE_GPU`, ranks go round the GPUs.

    Raises:
        ConfigError: there are fewer GPUs than ranks of this host.
    """
    if kind_of_device(config.device) == "cpu":
        return torch.device("cpu")
    if config.executor == "ray":
        return torch.device("cuda", 0)
    here, found = topology.num_ranks_beside(rank), torch.cuda.device_count()
    if here > found and not (found and SHARE_GPU in os.environ):
        raise ConfigError(
            f"{here} ranks of this host need a GPU each, and it has {found}; lower "
            "context_parallel_size or set device='cpu'"
        )
    return torch.device("cuda", topology.devices[rank] % found)


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """What this process's device is taken to do: figures for its kind, not yet measured ones."""
    if device.type == "cuda":
        return CUDA
    in_pairs = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return (CPU_THREAD_IN_PAIRS if in_pairs else CPU_THREAD).of_threads(torch.get_num_threads())


def _may_meet(topology: Topology) -> bool:
    """Whether all ranks are on one host and have a core each, on which they can wait for others."""
    cores = len(os.sched_getaffinity(0))
    return topology.num_hosts == 1 and topology.num_ranks <= cores and sys.platform == "linux"


def _connect(start: Start, device: torch.device, store: Store) -> Transport:
    topology = start.topology
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    obstacle = "GPUs use NCCL" if on_gpu else mpi.obstacle(topology)
    if _takes_mpi(start, obstacle, store):
        return mpi.join(start.rank, topology, store)
    by_nccl = on_gpu and SHARE_GPU not in os.environ
    dist.init_process_group(
        "nccl" if by_nccl else "gloo",
        store=store,
        rank=start.rank,
        world_size=topology.num_ranks,
        device_id=device if by_nccl else None,
    )
    kind = StagedTransport if on_gpu and not by_nccl else TorchTransport
    transport = kind(topology=topology)
    if obstacle and not on_gpu:
        transport.name += f" (no mpi: {obstacle})"
    return transport


def _takes_mpi(start: Start, obstacle: str, store: Store) -> bool:
    """Whether the ranks talk over MPI: if each of them can, and the config does not say otherwise.

    Raises:
        ConfigError: the config asks for it, and it can't be had.
    """
    wanted = start.config.communication_backend
    if wanted == "mpi" and obstacle:
        raise ConfigError(
            f"communication_backend='mpi': {obstacle}; install 'longspan[mpi]' for ranks on the "
            "CPU of one host, or leave the option out"
        )
    store.set(f"mpi/{start.rank}", str(wanted != "gloo" and not obstacle))
    return all(store.get(f"mpi/{rank}") == b"True" for rank in range(start.topology.num_ranks))


def _store(rendezvous: str, num_ranks: int) -> Any:
    """Where ranks find each other: a file on one host, a port that is open already on several."""
    place = urlsplit(rendezvous)
    if place.scheme == "file":
        return FileStore(place.path, num_ranks)
    return TCPStore(place.hostname or "", place.port or 0)
