"""A kernel made of any attention of queries over keys that lie in one piece: tile by tile."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.kv_format import decode
from longspan.attention.state import AttentionState
from longspan.attention.work import MIN_VIEW_KEYS, Work


class Attention(Protocol):
    """Attention of q [T, H, D] over k, v [S, G, D] on one device, as a float32 state.

    With `causal`, T equals S and query t sees keys 0 to t. No queries and no keys are normal.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False
    ) -> AttentionState: ...


class Tiled:
    """The kernel that merges `attention` of each tile into the state."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(
        self, state: AttentionState, q: Tensor, kv: Tensor, work: Work, *, scale: float
    ) -> None:
        for row, tiles, ranges in work.shares:
            blocks = list(_gather(kv, ranges))
            if any(block.dtype != q.dtype for block in blocks):  # keys are kept in another type
                q, blocks = q.float(), [block.float() for block in blocks]
            for rows, keys, causal in tiles:
                seen = list(_cut(blocks, keys))
                if causal and len(seen) > 1:
                    seen = [torch.cat(seen, dim=2)]
                asking = slice(row + rows.start, row + rows.stop)
                for block in seen:
                    k, v = block.transpose(1, 2)
                    found = self.attention(q[asking], k, v, scale=scale, causal=causal)
                    state[asking].absorb(found)


def _gather(kv: Tensor, ranges: Sequence[slice]) -> Iterator[Tensor]:
    """The keys and values at some ranges, in order: blocks [2, G, S, D], views if they are long."""
    blocks = [kv[:, :, place] for place in ranges]
    if len(blocks) > 1 and sum(b.shape[2] for b in blocks) < MIN_VIEW_KEYS * len(blocks):
        blocks = [torch.cat(blocks, dim=2)]
    yield from map(decode, blocks)


def _cut(blocks: Sequence[Tensor], keys: slice) -> Iterator[Tensor]:
    start, stop = keys.start, keys.stop
    for block in blocks:
        length = block.shape[2]
        if stop > 0 and start < length:
            yield block[:, :, max(start, 0) : stop]
        start, stop = start - length, stop - length
