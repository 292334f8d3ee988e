"""Which attention kernel serves which device."""

from typing import Protocol

import torch
from torch import Tensor

from longspan.attention import cpu, reference
from longspan.attention.state import AttentionState


class Kernel(Protocol):
    """Attention of q [T, H, D] over k, v [S, G, D] on one device, as a float32 state.

    With `causal`, T equals S and query t sees keys 0 to t. No queries and no keys are normal.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False
    ) -> AttentionState: ...


def kernel_for(device: torch.device) -> Kernel:
    """The kernel for a device; on other than CPU and CUDA the reference, exact but slow."""
    if device.type == "cuda":
        from longspan.attention import cuda  # needs Triton, which comes with PyTorch for CUDA

        return cuda.attention
    return cpu.attention if device.type == "cpu" else reference.attention
