"""How keys and values are kept: in a type of floats, or as int8 with a scale for each row.

A *row* is the key or the value of one token in one head. In int8 it is `x / scale`, rounded, with
`scale = max |x| / 127` as a float32 behind it, so that pages and messages carry both: D + 4 bytes.
No number is off by more than half a scale.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4
_MOST = 127


def row_length(head_dim: int, dtype: torch.dtype) -> int:
    """How many numbers a row has."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., D] as rows of a type."""
    if dtype != torch.int8:
        return x.to(dtype)
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / _MOST
    whole = (wide / scale.masked_fill(scale == 0, 1.0)).round_().to(torch.int8)
    return torch.cat((whole, scale.view(torch.int8)), dim=-1)


def decode(rows: Tensor) -> Tensor:
    """Rows as keys or values [..., D]: those of int8 in float32, others as they are."""
    if rows.dtype != torch.int8:
        return rows
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :-SCALE_BYTES] * scale
