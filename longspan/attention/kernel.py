"""Which attention kernel serves which device."""

from typing import Protocol

import torch
from torch import Tensor

from longspan.attention import cpu, native, reference
from longspan.attention.state import AttentionState
from longspan.attention.tiled import Tiled
from longspan.attention.work import Work
from longspan.compiled import library


class Kernel(Protocol):
    """Merges attention of q [T, H, D] over some of the keys kv [2, G, S, D] into a state, in place.

    kv are rows of a `kv_format`, whose type may be another than that of q.

    `work` says which queries see which keys, and the state is of all T queries. `scale` multiplies
    the scores. No queries and no keys are normal.
    """

    def __call__(
        self, state: AttentionState, q: Tensor, kv: Tensor, work: Work, *, scale: float
    ) -> None: ...


def kernel_for(device: torch.device) -> Kernel:
    """The kernel for a device.

    On a GPU that is Longspan's own in Triton, on a CPU its own in C++, compiled at first use, or
    where there is no compiler PyTorch's; on other devices the reference, exact but slow.
    """
    if device.type == "cuda":
        from longspan.attention import cuda  # needs Triton, which comes with PyTorch for CUDA

        return Tiled(cuda.attention)
    if device.type != "cpu":
        return Tiled(reference.attention)
    compiled = library(native.SOURCE)
    return Tiled(cpu.attention) if compiled is None else native.Native(compiled)
