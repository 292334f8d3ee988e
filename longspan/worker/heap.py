"""The heap of a rank's process: what large tensors took is given back to the system."""

import contextlib
import ctypes

__all__ = ["settle_heap"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names for what `mallopt` sets (malloc.h)."""
_LARGE, _KEPT = 16 << 20, 8 << 20


def settle_heap() -> None:
    """Take tensors of 16 MiB and more from the system, and give them back when they are freed, as
    well as the heap's end when more than 8 MiB of it are free.

    glibc begins so, but learns from what is freed to put ever larger ones into its heap, up to 32
    MiB. The blocks of a ring grow from step to step, so each is a little larger than the hole that
    the one before has left. Nothing happens with another C library.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, _KEPT)
