"""Linear layers on CPU: by a kernel of ours, or half precision by blocks where the CPU has none.

Shapes: M rows, K inputs, N outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from longspan.compiled import NUMBER, POINTER, SOURCES, THREADS, function, library

__all__ = ["FastLinear", "suits_kernels", "use_fast_linears"]

FEW_ROWS = 32
"""Up to so many meet weights where they lie, and all threads share the weights."""
ROWS_OF_A_THREAD = 24
"""Of more, each thread takes some, and packs all weights for them: fewer are not worth it."""
PARALLEL_WEIGHTS = 1 << 16
"""A smaller layer is done before a second thread has begun."""
BLOCK_WEIGHTS = 1 << 19
"""Weights that are widened at a time: 2 MiB, which stay in cache until they have been used."""
INPUTS_MULTIPLE = 16

_SOURCE = SOURCES / "linear.cpp"


class FastLinear(nn.Linear):
    """Computes what `nn.Linear` does, for inference on CPU, with the parameters of another one.

    Sums are float32 and rounded once. In the kernel a row's result does not depend on the others.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        dtype = self.weight.dtype
        self._kernel = _kernel_of(dtype) if self._suits_kernel() else None
        self._is_widened = not _is_native(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N], of the same dtype."""
        rows = input.numel() // self.in_features
        if self._kernel is not None and suits_kernels(rows):
            return self._by_kernel(input, rows)
        return self._by_widened_blocks(input) if self._is_widened else super().forward(input)

    def _suits_kernel(self) -> bool:
        return (
            self.weight.dtype in (torch.float32, torch.bfloat16)
            and self.weight.is_contiguous()
            and self.in_features % INPUTS_MULTIPLE == 0
        )

    def _by_kernel(self, input: Tensor, rows: int) -> Tensor:
        assert self._kernel is not None
        x, weight, bias = input.contiguous(), self.weight, self.bias
        out = input.new_empty(*input.shape[:-1], self.out_features)
        threads = torch.get_num_threads() if weight.numel() >= PARALLEL_WEIGHTS else 1
        self._kernel(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            self.out_features,
            self.in_features,
            threads,
        )
        return out

    def _by_widened_blocks(self, input: Tensor) -> Tensor:
        x = input.float()
        out = input.new_empty(*input.shape[:-1], self.out_features)
        size = max(BLOCK_WEIGHTS // self.in_features, 1)
        for start in range(0, self.out_features, size):
            block = slice(start, start + size)
            bias = None if self.bias is None else self.bias[block].float()
            out[..., block] = functional.linear(x, self.weight[block].float(), bias)
        return out


def suits_kernels(rows: int) -> bool:
    """Whether kernels of ours compute so many rows sooner than libraries do."""
    return 0 < rows <= FEW_ROWS or rows >= ROWS_OF_A_THREAD * torch.get_num_threads()


def use_fast_linears(model: nn.Module) -> None:
    """Let a model on CPU compute with `FastLinear` wherever it has a plain `nn.Linear`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, FastLinear(child))


def _kernel_of(dtype: torch.dtype) -> Callable[..., None] | None:
    compiled = library(_SOURCE)
    if compiled is None:
        return None
    name = f"linear_{str(dtype).removeprefix('torch.')}"
    return function(compiled, name, (*[POINTER] * 4, *[NUMBER] * 3, THREADS))


def _is_native(dtype: torch.dtype) -> bool:
    """Whether the CPU's matrix products of a dtype are not slower than those of float32."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
