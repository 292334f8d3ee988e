"""Blockwise attention on one rank: queries over the blocks of a shard, tile by tile."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longspan.attention.kernel import Kernel
from longspan.attention.state import AttentionState
from longspan.parallel.tiles import Tile

Blocks = Sequence[Tensor]
"""A shard's keys and values in order, in one or more tensors [2, G, S, D]."""


def attend(
    state: AttentionState,
    q: Tensor,
    keys: Blocks,
    tiles: Sequence[Tile],
    kernel: Kernel,
    scale: float,
) -> None:
    """Merge attention of q [T, H, D] over the tiles of a shard into `state`, in place."""
    for tile in tiles:
        blocks = list(_slice(keys, tile.keys))
        if tile.causal and len(blocks) > 1:
            blocks = [torch.cat(blocks, dim=2)]
        for block in blocks:
            k, v = block.transpose(1, 2)
            state[tile.rows].absorb(kernel(q[tile.rows], k, v, scale=scale, causal=tile.causal))


def _slice(blocks: Blocks, keys: slice) -> Iterator[Tensor]:
    start, stop = keys.start, keys.stop
    for block in blocks:
        length = block.shape[2]
        if stop > 0 and start < length:
            yield block[:, :, max(start, 0) : stop]
        start, stop = start - length, stop - length
