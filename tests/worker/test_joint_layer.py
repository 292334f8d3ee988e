"""What ranks compute jointly is what one computes alone: to the bit, but for merging states."""

import mmap
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fused_layer import load
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from longspan.attention.state import AttentionState
from longspan.plan import MOST_JOINT_ROWS, Joint
from longspan.worker.fused_layer import FusedLayer, fuse_layers
from longspan.worker.meeting import Meeting

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

LAYERS = 3
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def together(ranks: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, range(ranks)))


class OwnKeys:
    """A step in which each rank has states of its own for all rows."""

    def __init__(self, states: Sequence[AttentionState], meeting: Meeting | None = None) -> None:
        self.states = states
        self.meeting = meeting

    def rows(self, layer: int) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> AttentionState | Tensor:
        state = self.states[layer]
        return state if self.meeting else state.out


def states_of(rows: int, heads: int, depth: int, seed: int) -> list[AttentionState]:
    torch.manual_seed(seed)
    return [
        AttentionState(torch.randn(rows, heads, depth), 3 * torch.randn(rows, heads))
        for _ in range(LAYERS)
    ]


def merged(states: Sequence[AttentionState]) -> AttentionState:
    lse = torch.stack([state.lse for state in states]).double()
    weights = torch.softmax(lse, dim=0).unsqueeze(-1)
    out = (weights * torch.stack([state.out.nan_to_num() for state in states])).sum(dim=0)
    return AttentionState(out.float(), lse.logsumexp(dim=0).float())


def through(layers: Sequence[FusedLayer], x: Tensor, step: OwnKeys) -> Tensor:
    table = torch.zeros(1, x.shape[1], 16)
    for layer in layers:
        x = layer(x, position_embeddings=(table + 1, table), step=step)
    return x


@pytest.fixture
def layers(dtype: torch.dtype, tmp_path: Path) -> list[FusedLayer]:
    model: nn.Module = load("llama", tmp_path, dtype)
    fused = fuse_layers(model)
    assert len(fused) == LAYERS
    return fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, MOST_JOINT_ROWS])
@pytest.mark.parametrize("members", [(0, 1), (0, 2), (0, 1, 2)], ids=str)
@torch.inference_mode()
def test_it_is_what_one_rank_computes(
    layers: list[FusedLayer], dtype: torch.dtype, rows: int, members: tuple[int, ...]
) -> None:
    shape = layers[0]._layer
    ranks, store = max(members) + 1, HashStore()
    floats = max(layer.row_floats for layer in layers)
    meetings = together(ranks, lambda rank: Meeting.open(rank, ranks, floats, store))
    x = torch.randn(1, rows, shape.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = [states_of(rows, shape.heads, shape.head_dim, rank) for rank in members]
    for number, nobody_else in ((1, False), (7, True)):
        if nobody_else:  # the states of all but one are empty, and what is in them is nonsense
            for states in parts[1:]:
                for state in states:
                    state.out.fill_(torch.nan)
                    state.lse.fill_(-torch.inf)

        def compute(index: int, number: int = number) -> Tensor:
            with torch.inference_mode():
                meeting = meetings[members[index]]
                meeting.begin(Joint(members, number))
                return through(layers, x, OwnKeys(parts[index], meeting))

        found = together(len(members), compute)
        whole = [merged([states[layer] for states in parts]) for layer in range(LAYERS)]
        alone = through(layers, x, OwnKeys(whole))
        assert all(torch.equal(one, found[0]) for one in found)
        if nobody_else:
            assert torch.equal(found[0], alone)
        else:
            error = (found[0].float() - alone.float()).abs().max()
            assert error <= TOLERANCE[dtype] * alone.float().abs().max()


def test_memory_that_not_all_can_use_is_used_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    found = together(3, lambda rank: Meeting.open(rank, 3, None if rank == 1 else 64, store))
    assert found == [None] * 3
    store, map_memory = HashStore(), mmap.mmap
    unlucky = threading.local()

    def refuse(*args: Any) -> mmap.mmap:
        if getattr(unlucky, "is_me", False):
            raise PermissionError("another namespace")
        return map_memory(*args)

    def meet(rank: int) -> Meeting | None:
        unlucky.is_me = rank == 2
        return Meeting.open(rank, 3, 64, store)

    monkeypatch.setattr("longspan.worker.meeting.mmap", SimpleNamespace(mmap=refuse))
    assert together(3, meet) == [None] * 3
