"""Which device a rank takes; how many GPUs there are is all that is made up here."""

import pytest
import torch

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.topology import Topology
from longspan.worker.launch import SHARE_GPU, device_of


def devices(num_gpus: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    config = EngineConfig(model="m", context_parallel_size=num_ranks, device="cuda")
    topology = Topology.of_hosts([num_ranks])
    return [device_of(config, topology, rank) for rank in range(num_ranks)]


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE_GPU, raising=False)
    gpus = [torch.device("cuda", number) for number in range(3)]
    assert devices(3, 3, monkeypatch) == devices(4, 3, monkeypatch) == gpus
    with pytest.raises(ConfigError, match="3 ranks of this host need a GPU each, and it has 2"):
        devices(2, 3, monkeypatch)


def test_ranks_share_gpus_if_a_test_says_so_and_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SHARE_GPU, "1")
    numbers = [device.index for device in devices(2, 3, monkeypatch)]
    assert numbers == [0, 1, 0]
    with pytest.raises(ConfigError, match="and it has 0"):
        devices(0, 3, monkeypatch)
