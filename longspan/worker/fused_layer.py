"""Decoder layers on CPU that compute few rows in two calls, with attention between them.

A layer of a small model spends more time between its matrix products than in them. Most models
have the layer that Llama has: RMSNorm, projections, rotary positions, attention, and a gated MLP
with SiLU. One that looks like it is computed by `csrc/layer.cpp`, once it has been seen to give
what the layer's own modules give; every other layer is left as it is.

Shapes: T rows, N numbers of a row, H query heads, G key/value heads, D head size.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from longspan.compiled import SOURCES, library
from longspan.worker.linear import INPUTS_MULTIPLE, MOST_ROWS, PARALLEL_WEIGHTS

__all__ = ["FusedLayer", "fuse_layers"]

_SOURCE = SOURCES / "layer.cpp"
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("norm1", "q_norm", "k_norm", "norm2")

# Largest error relative to the largest number: some roundings, where another computation is off
# by tens of percent.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim")),
        *((name, _Norm) for name in _NORMS),
        *((name, _Linear) for name in _PROJECTIONS),
    )


class _Unlike(Exception):
    """The layer has something that the fused one has not."""


class FusedLayer:
    """Takes the place of a layer's `forward` for steps of at most `MOST_ROWS` rows."""

    def __init__(self, layer: nn.Module, kernels: ctypes.CDLL, *, rotates: bool) -> None:
        self.forward = layer.forward
        self.rotates = rotates
        parts = _parts(layer)
        attention: Any = layer.self_attn
        self.index: int = attention.layer_idx
        self._kept: list[Tensor] = []  # what the structure points to
        self._layer = self._structure(parts, attention.head_dim)
        dtype = parts["q"].weight.dtype
        self._before = getattr(kernels, f"longspan_before_{str(dtype).removeprefix('torch.')}")
        self._after = getattr(kernels, f"longspan_after_{str(dtype).removeprefix('torch.')}")
        weights = sum(parts[name].weight.numel() for name in _PROJECTIONS)
        self._is_parallel = weights >= PARALLEL_WEIGHTS

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [1, T, N] -> [1, T, N], of the same dtype."""
        step, positions = kwargs.get("step"), kwargs.get("position_embeddings")
        batch, rows, _ = hidden_states.shape
        if step is None or positions is None or args or batch != 1 or not 0 < rows <= MOST_ROWS:
            return self.forward(hidden_states, *args, **kwargs)
        x, layer = hidden_states.contiguous(), self._layer
        cos, sin = (table.to(x.dtype).contiguous() for table in positions)
        threads = ctypes.c_int(torch.get_num_threads() if self._is_parallel else 1)
        q = x.new_empty(rows, layer.heads, layer.head_dim)
        k, v = x.new_empty(2, rows, layer.kv_heads, layer.head_dim)
        self._before(
            ctypes.byref(layer),
            *map(_address, (x, cos, sin)),
            ctypes.c_int64(cos.shape[-1] if self.rotates else 0),
            *map(_address, (q, k, v)),
            ctypes.c_int64(rows),
            threads,
        )
        attention = step.attend(self.index, q, k, v)
        out = torch.empty_like(x)
        self._after(
            ctypes.byref(layer),
            *map(_address, (attention, x, out)),
            ctypes.c_int64(rows),
            threads,
        )
        return out

    def _structure(self, parts: dict[str, Any], head_dim: int) -> _Layer:
        linears = {name: self._linear(parts[name]) for name in _PROJECTIONS}
        return _Layer(
            hidden=parts["q"].in_features,
            heads=parts["q"].out_features // head_dim,
            kv_heads=parts["k"].out_features // head_dim,
            head_dim=head_dim,
            **linears,
            **{name: self._norm(parts[name]) for name in _NORMS if name in parts},
        )

    def _linear(self, linear: nn.Linear) -> _Linear:
        bias = None if linear.bias is None else self._keep(linear.bias.float())
        weight = self._keep(linear.weight)
        return _Linear(weight=weight, bias=bias, outputs=linear.out_features)

    def _norm(self, norm: Any) -> _Norm:
        return _Norm(weight=self._keep(norm.weight.float()), epsilon=norm.variance_epsilon)

    def _keep(self, tensor: Tensor) -> int:
        kept = tensor.detach().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def fuse_layers(model: nn.Module) -> int:
    """Let a model on CPU compute with `FusedLayer` where that is the same; returns how often.

    The model must have Longspan's attention. It runs once, and each layer that looks right is
    compared with the fused ones on what it is given there.
    """
    kernels = library(_SOURCE)
    if kernels is None:
        return 0
    found: list[tuple[nn.Module, FusedLayer]] = []

    def compare(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for rotates in (True, False):
            fused = FusedLayer(layer, kernels, rotates=rotates)
            if _is_same(fused(*args, **kwargs), output, args[0]):
                found.append((layer, fused))
                return

    alike = [module for module in model.modules() if _is_alike(module)]
    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in alike]
    try:
        _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, fused in found:
        layer.forward = fused  # type: ignore[method-assign]
    return len(found)


class _AnyAttention:
    """A step whose attention needs no other tokens, and shows each of its inputs."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return sum(heads, q.float())


@torch.inference_mode()
def _run(model: nn.Module) -> None:
    """A few tokens at positions that are far apart."""
    positions = torch.tensor([[0, 1, 5, 77]])
    model(input_ids=positions % 2, position_ids=positions, use_cache=False, step=_AnyAttention())


def _is_same(found: Any, expected: Any, x: Tensor) -> bool:
    """Whether two results of a layer differ only by rounding; both contain its input."""
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return False
    added = (expected.float() - x.float()).abs().max()
    rounding = 2 * torch.finfo(x.dtype).eps * expected.float().abs().max()
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= _TOLERANCE[x.dtype] * added + rounding)


def _is_alike(layer: nn.Module) -> bool:
    try:
        _parts(layer)
    except _Unlike:
        return False
    return True


def _parts(layer: nn.Module) -> dict[str, Any]:
    """The parts of a layer that looks like Llama's, by the names that `csrc/layer.cpp` has."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    found = {
        **{name: getattr(attention, f"{name}_proj", None) for name in ("q", "k", "v", "o")},
        **{name: getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")},
        "norm1": getattr(layer, "input_layernorm", None),
        "norm2": getattr(layer, "post_attention_layernorm", None),
    }
    found |= {
        name: norm
        for name in ("q_norm", "k_norm")
        if (norm := getattr(attention, name, None)) is not None
    }
    if not all(isinstance(part, nn.Module) for part in found.values()):
        raise _Unlike
    owned = {id(weight) for part in found.values() for weight in part.parameters()}
    if owned != {id(weight) for weight in layer.parameters()}:
        raise _Unlike
    if not all(_fits(name, part) for name, part in found.items()):
        raise _Unlike
    return found


def _fits(name: str, part: Any) -> bool:
    weight = getattr(part, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dtype in _TOLERANCE
        and weight.shape[-1] % INPUTS_MULTIPLE == 0
        and (isinstance(part, nn.Linear) if name in _PROJECTIONS else weight.ndim == 1)
        and (name in _PROJECTIONS or hasattr(part, "variance_epsilon"))
    )


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
