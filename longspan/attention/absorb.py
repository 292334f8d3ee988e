"""Merging states in place on CPU, in one pass, where there is a compiler."""

import torch
from torch import Tensor

from longspan.compiled import NUMBER, POINTER, SOURCES, THREADS, found

_SOURCE = SOURCES / "attention.cpp"
_ARGUMENTS = (*[POINTER] * 3, NUMBER, POINTER, *[NUMBER] * 3, THREADS)
"""As in `csrc/attention.cpp`."""

PARALLEL_NUMBERS = 1 << 16
"""Fewer are done before a second thread has begun."""


def absorb(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> bool:
    """Merge a state of T queries, `other_out` [T, H, D] and `other_lse` [T, H], into another.

    All are float32. False, and nothing is done, where it can't be: not on a CPU, no compiler, or
    tensors whose rows are not at one distance from each other.
    """
    kernel = found(_SOURCE, "absorb", _ARGUMENTS) if out.is_cpu else None
    rows = lse.numel()
    if kernel is None or rows == 0 or not (out.is_contiguous() and lse.is_contiguous()):
        return False
    heads = lse.shape[1]
    other_row, lse_row = other_out.stride(1), other_lse.stride(1)
    if (
        other_out.stride(2) != 1
        or other_out.stride(0) != heads * other_row
        or other_lse.stride(0) != heads * lse_row
    ):
        return False
    kernel(
        out.data_ptr(),
        lse.data_ptr(),
        other_out.data_ptr(),
        other_row,
        other_lse.data_ptr(),
        lse_row,
        rows,
        out.shape[2],
        torch.get_num_threads() if out.numel() >= PARALLEL_NUMBERS else 1,
    )
    return True
