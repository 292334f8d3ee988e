"""Merging states in place on CPU, in one pass, where there is a compiler."""

import ctypes

import torch
from torch import Tensor

from longspan.compiled import SOURCES, library

PARALLEL_NUMBERS = 1 << 16
"""Fewer are done before a second thread has begun."""


def absorb(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> bool:
    """Merge a state of T queries, `other_out` [T, H, D] and `other_lse` [T, H], into another.

    All are float32. False, and nothing is done, where it can't be: not on a CPU, no compiler, or
    tensors whose rows are not at one distance from each other.
    """
    kernels = library(SOURCES / "attention.cpp") if out.is_cpu else None
    rows = lse.numel()
    if kernels is None or rows == 0 or not (out.is_contiguous() and lse.is_contiguous()):
        return False
    heads = lse.shape[1]
    other_row, lse_row = other_out.stride(1), other_lse.stride(1)
    if (
        other_out.stride(2) != 1
        or other_out.stride(0) != heads * other_row
        or other_lse.stride(0) != heads * lse_row
    ):
        return False
    kernels.longspan_absorb(
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(lse.data_ptr()),
        ctypes.c_void_p(other_out.data_ptr()),
        ctypes.c_int64(other_row),
        ctypes.c_void_p(other_lse.data_ptr()),
        ctypes.c_int64(lse_row),
        ctypes.c_int64(rows),
        ctypes.c_int64(out.shape[2]),
        torch.get_num_threads() if out.numel() >= PARALLEL_NUMBERS else 1,
    )
    return True
