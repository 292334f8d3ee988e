"""The CPU kernel in C++ (`csrc/attention.cpp`)."""

import ctypes

import torch
from torch import Tensor

from longspan.attention.state import AttentionState
from longspan.attention.work import Work
from longspan.compiled import NUMBER, POINTER, SOURCES, THREADS, function

SOURCE = SOURCES / "attention.cpp"

_NUMBERS = ctypes.POINTER(NUMBER)
_STRIDES, _SHAPE = NUMBER * 8, NUMBER * 3
_ARGUMENTS = (*[POINTER] * 5, _NUMBERS, _NUMBERS, ctypes.c_float, POINTER, NUMBER, THREADS)
"""As in `csrc/attention.cpp`."""


class Native:
    """The kernel of a compiled library; see `longspan.attention.kernel.Kernel`.

    Keys are read where they lie, in any format of `kv_format`; sums are float32. So are products,
    unless queries and keys are both bfloat16 and the CPU multiplies pairs of those (AVX-512 BF16):
    then weights are rounded to bfloat16 for their product with values. It uses as many threads as
    PyTorch.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = {
            dtype: function(library, f"attend_{str(dtype).removeprefix('torch.')}", _ARGUMENTS)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
        }
        self._attend_pairs = None
        if hasattr(library, "longspan_attend_bfloat16_pairs"):
            self._attend_pairs = function(library, "attend_bfloat16_pairs", _ARGUMENTS)

    def __call__(
        self, state: AttentionState, q: Tensor, kv: Tensor, work: Work, *, scale: float
    ) -> None:
        if not work.tables:
            return
        attend = self._attend[kv.dtype]
        if self._attend_pairs and q.dtype == kv.dtype == torch.bfloat16 and q.shape[2] % 2 == 0:
            attend = self._attend_pairs
        else:
            q = q.float()
        if q.stride(2) != 1:
            q = q.contiguous()
        if kv.stride(3) != 1:
            kv = kv.contiguous()
        # Few calls to PyTorch: each takes a microsecond, in every layer of every token.
        (_, heads, head_dim), (_, kv_heads, _, _) = q.shape, kv.shape
        (out_row, *out_rest), (lse_row, lse_head) = state.out.stride(), state.lse.stride()
        assert out_rest == [head_dim, 1]
        assert lse_head == 1
        q_row, q_head, _ = q.stride()
        to_values, kv_head, slot, _ = kv.stride()
        keys = kv.data_ptr()
        arguments = (
            state.out.data_ptr(),
            state.lse.data_ptr(),
            q.data_ptr(),
            keys,
            keys + to_values * kv.itemsize,
            _STRIDES(out_row, lse_row, q_row, q_head, kv_head, slot, kv_head, slot),
            _SHAPE(kv_heads, heads // kv_heads, head_dim),
            scale,
        )
        threads = torch.get_num_threads()
        for table in work.tables:
            attend(*arguments, table.data_ptr(), table.shape[0], threads)
