"""Rows into slots of a pool on CPU, without PyTorch's cost for each operation."""

from torch import Tensor

from longspan.compiled import NUMBER, POINTER, SOURCES, found

_SOURCE = SOURCES / "scatter.cpp"
_ARGUMENTS = (POINTER, NUMBER, NUMBER, POINTER, POINTER, *[NUMBER] * 5)
"""As in `csrc/scatter.cpp`."""


def scatter(pool: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Put rows [T, G, D] into slots [T] of `pool` [G, S, D], of the same type."""
    assert rows.dtype == pool.dtype, (rows.dtype, pool.dtype)
    assert rows.shape[2] == pool.shape[2], (rows.shape, pool.shape)
    kernel = found(_SOURCE, "scatter", _ARGUMENTS) if pool.is_cpu else None
    if kernel is None or rows.stride(2) != 1 or not slots.is_contiguous():
        pool.index_copy_(1, slots, rows.transpose(0, 1))
        return
    size = pool.itemsize
    kernel(
        pool.data_ptr(),
        pool.stride(0) * size,
        pool.stride(1) * size,
        slots.data_ptr(),
        rows.data_ptr(),
        rows.stride(0) * size,
        rows.stride(1) * size,
        rows.shape[0],
        pool.shape[0],
        rows.shape[2] * size,
    )
