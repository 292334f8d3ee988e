"""Attention with LSE on GPUs: one Triton kernel for many queries and for few, and a merge.

The loop is that of FlashAttention-2 (arXiv 2307.08691), and splitting the keys of few queries over
programs that of Flash-Decoding. The queries of all heads that share a key/value head are packed as
rows of one matrix: row r is token `r // group`, head `g * group + r % group`, so that each block of
keys is read once for the whole group. Scores and sums are float32, scores in units of log 2, since
GPUs have exp2. Compiled for each type, head size and group at first use.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longspan.attention.cuda_kernels import LOG2_E, attend, merge
from longspan.attention.state import AttentionState

MAX_SPLITS = 128
"""Into how many parts the keys are split at most; the merge holds all parts of a row at once."""
MIN_SPLIT_KEYS = 256
"""Fewer keys are not worth a program, and a partial state to write and to read."""
PROGRAMS_PER_PROCESSOR = 2
"""Programs that few queries are split into, for each multiprocessor of the GPU."""
MERGE_WARPS = 8


class Tile(NamedTuple):
    """What one program works on at once, and how it is compiled: rows, keys, warps, stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False
) -> AttentionState:
    """Attention of q [T, H, D] over k, v [S, G, D]; with `causal`, T equals S. Strides are free.

    float32 is multiplied as float32, never as TF32. bfloat16 and float16 go through tensor cores
    and are summed in float32; the softmax's weights are rounded to the inputs' type for that, as
    in FlashAttention.
    """
    (tokens, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    if tokens == 0 or keys == 0:
        return AttentionState.empty(tokens, heads, head_dim, q.device)
    group = heads // kv_heads
    tile = tile_of(tokens * group, head_dim, q.dtype)
    blocks = triton.cdiv(tokens * group, tile.rows)
    splits = 1 if causal else num_splits(blocks * kv_heads, keys, q.device)
    split_keys = triton.cdiv(triton.cdiv(keys, splits), tile.keys) * tile.keys
    splits = triton.cdiv(keys, split_keys)  # rounded up to whole blocks, the last may be left over
    parts = AttentionState(
        torch.empty(splits, tokens, heads, head_dim, dtype=torch.float32, device=q.device),
        torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device),
    )
    with torch.cuda.device_of(q):
        attend[blocks, kv_heads, splits](
            *(q, k, v, parts.out, parts.lse),
            *(*q.stride(), *k.stride(), *v.stride()),
            *(tokens, keys, split_keys, scale * LOG2_E),
            GROUP=group,
            HEAD_DIM=head_dim,
            CAUSAL=causal,
            BLOCK_ROWS=tile.rows,
            BLOCK_KEYS=tile.keys,
            BLOCK_DIM=padded(head_dim),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if splits == 1:
        return AttentionState(parts.out[0], parts.lse[0])
    return merge_parts(parts)


def merge_parts(parts: AttentionState) -> AttentionState:
    """The state that partial ones [splits, T, H, D] of other keys each, none empty, make."""
    splits, tokens, heads, head_dim = parts.out.shape
    out, lse = torch.empty_like(parts.out[0]), torch.empty_like(parts.lse[0])
    with torch.cuda.device_of(out):
        merge[(tokens * heads,)](
            *(parts.out, parts.lse, out, lse, tokens * heads, splits),
            HEAD_DIM=head_dim,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            BLOCK_DIM=padded(head_dim),
            num_warps=MERGE_WARPS,
        )
    return AttentionState(out, lse)


def tile_of(rows: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for so many rows of a key/value head: chosen by what compiles well, not measured.

    All fit 99 KiB of shared memory, the least that a program has on GPUs since Ampere, and no
    program keeps more than a few of its numbers outside registers.
    """
    few = rows <= 16  # tensor cores multiply 16 rows at least
    if dtype == torch.float32:
        if head_dim > 128:
            return Tile(16, 16, 8, 2)
        return Tile(16, 32, 8, 2) if few else Tile(32, 16, 8, 2)
    if head_dim > 128:
        return Tile(16, 64, 4, 2) if few else Tile(64, 32, 4, 2)
    if few:
        return Tile(16, 64, 4, 3)
    return Tile(64, 64, 4, 2) if rows <= 64 else Tile(128, 64, 8, 2)


def num_splits(blocks: int, keys: int, device: torch.device) -> int:
    """Into how many parts to split the keys so that all multiprocessors have work."""
    wanted = PROGRAMS_PER_PROCESSOR * _num_processors(device)
    return max(1, min(wanted // blocks, keys // MIN_SPLIT_KEYS, MAX_SPLITS))


def _num_processors(device: torch.device) -> int:
    if device.type == "cpu":  # in Triton's interpreter
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def padded(head_dim: int) -> int:
    """Triton's blocks are powers of two, and its products need 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())
