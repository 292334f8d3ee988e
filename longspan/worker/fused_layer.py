"""Decoder layers on CPU that are two calls, with attention between them.

A layer of a small model spends more time between its matrix products than in them, and one of many
rows reads and writes them again at each step between. Most models have the layer that Llama has:
RMSNorm, projections, rotary positions, attention, and a gated MLP with SiLU. One that looks like it
is computed by `csrc/layer.cpp`, once it has been seen to give what the layer's own modules give;
every other layer is left as it is.

Shapes: T rows, N numbers of a row, H query heads, G key/value heads, D head size.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from longspan.compiled import NUMBER, POINTER, SOURCES, THREADS, function, library
from longspan.worker.linear import INPUTS_MULTIPLE, PARALLEL_WEIGHTS, suits_kernels

__all__ = ["FusedLayer", "fuse_layers"]

_SOURCE, _JOINT_SOURCE = SOURCES / "layer.cpp", SOURCES / "joint.cpp"
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


_BEFORE = (*[POINTER] * 4, NUMBER, *[POINTER] * 3, NUMBER, THREADS)
_AFTER = (*[POINTER] * 4, NUMBER, THREADS)
"""Arguments of the two functions in `csrc/layer.cpp`."""
_AFTER_JOINTLY = (*[POINTER] * 6, NUMBER, THREADS)
"""Of the one in `csrc/joint.cpp`."""


class FusedLayer:
    """Takes the place of a layer's `forward` in steps."""

    def __init__(self, layer: Any, kernels: ctypes.CDLL, *, rotates: bool) -> None:
        self.forward = layer.forward
        self.rotates = rotates
        parts = _parts(layer)
        self.index: int = layer.self_attn.layer_idx
        self._kept: list[Tensor] = []  # what the structure points to
        self._layer = self._structure(parts, layer.self_attn.head_dim)
        self.dtype: torch.dtype = parts["q"].weight.dtype
        dtype = str(self.dtype).removeprefix("torch.")
        self._before = function(kernels, f"before_{dtype}", _BEFORE)
        self._after = function(kernels, f"after_{dtype}", _AFTER)
        joint = library(_JOINT_SOURCE)
        assert joint is not None  # the other one was made by the same compiler
        self._after_jointly = function(joint, f"after_jointly_{dtype}", _AFTER_JOINTLY)
        weights = sum(parts[name].weight.numel() for name in _PROJECTIONS)
        self._is_parallel = weights >= PARALLEL_WEIGHTS

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [1, T, N] -> [1, T, N], of the same dtype."""
        if args or not self._takes(hidden_states, **kwargs):
            return self.forward(hidden_states, *args, **kwargs)
        x, step = hidden_states[0].contiguous(), kwargs["step"]
        tables = [table.to(x.dtype).contiguous() for table in kwargs["position_embeddings"]]
        rows = step.rows(self.index)
        if rows is None:
            q, k, v = self._project(x, *tables)
            return self._finish(step, q, k, v, x).unsqueeze(0)
        _, k, v = self._project(x, *tables, with_queries=False)
        kept = x[rows]
        q, _, _ = self._project(kept, *(table[:, rows] for table in tables))
        out = self._finish(step, q, k, v, kept)
        return x.new_zeros(x.shape).index_copy_(0, rows, out).unsqueeze(0)

    def _project(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, with_queries: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows x [T, N] with cos and sin [1, T, ...].

        Queries may be unwanted; then there are none.
        """
        layer, rows = self._layer, x.shape[0]
        q = x.new_empty(rows if with_queries else 0, layer.heads, layer.head_dim)
        k, v = x.new_empty(2, rows, layer.kv_heads, layer.head_dim).unbind()
        if rows:
            self._before(
                ctypes.addressof(layer),
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                cos.shape[-1] if self.rotates else 0,
                q.data_ptr() if with_queries else None,
                k.data_ptr(),
                v.data_ptr(),
                rows,
                self._threads,
            )
        return q, k, v

    def _finish(self, step: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The layer's output [T, N] of the rows x [T, N] that q [T, H, D] are of."""
        attention, out, rows = step.attend(self.index, q, k, v), torch.empty_like(x), x.shape[0]
        to = (x.data_ptr(), out.data_ptr(), rows, self._threads)
        if not isinstance(attention, Tensor):  # a state of this rank's keys alone
            states = (attention.out.data_ptr(), attention.lse.data_ptr())
            address = ctypes.addressof(self._layer)
            self._after_jointly(address, step.meeting.address, *states, *to)
        elif rows:
            self._after(ctypes.addressof(self._layer), attention.data_ptr(), *to)
        return out

    @property
    def _threads(self) -> int:
        return torch.get_num_threads() if self._is_parallel else 1

    @property
    def row_floats(self) -> int:
        """The most numbers of a row that ranks tell each other in `csrc/joint.cpp`."""
        layer = self._layer
        states = layer.heads * (layer.head_dim + 1)
        return int(max(states, 2 * layer.gate.outputs, layer.hidden))

    def _takes(
        self, x: Tensor, step: Any = None, position_embeddings: Any = None, **_: Any
    ) -> bool:
        batch, rows, hidden = x.shape
        if step is None or position_embeddings is None or x.dtype != self.dtype:
            return False
        table = position_embeddings[0]
        return (
            batch == 1
            and suits_kernels(rows)
            and hidden == self._layer.hidden
            and table.shape[:-1] == (1, rows)
            and table.shape[-1] <= self._layer.head_dim
        )

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


def fuse_layers(model: nn.Module) -> list[FusedLayer]:
    """Let a model on CPU compute with `FusedLayer` where that is the same; returns those.

    The model must have Longspan's attention. It runs once, and each layer that looks right is
    compared with the fused ones on what it is given there.
    """
    kernels = library(_SOURCE)
    if kernels is None:
        return []
    alike = [module for module in model.modules() if _is_alike(module)]
    found: list[tuple[nn.Module, FusedLayer]] = []

    def compare(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        for rotates in (True, False):
            fused = FusedLayer(layer, kernels, rotates=rotates)
            if fused._takes(x, **kwargs) and _is_same(fused(*args, **kwargs), output, x):
                found.append((layer, fused))
                return

    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in alike]
    try:
        if alike:
            _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, fused in found:
        layer.forward = fused
    return [fused for _, fused in found]


class _AnyAttention:
    """A step whose attention needs no other tokens, and shows each of its inputs."""

    def rows(self, layer: int) -> None:
        pass

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


def _is_alike(layer: Any) -> bool:
    """Whether a layer has the parts and the weights of Llama's, of sizes that fit each other."""
    parts = _parts(layer)
    attention: Any = getattr(layer, "self_attn", None)
    if not all(isinstance(part, nn.Module) for part in parts.values()):
        return False
    if not all(isinstance(getattr(part, "weight", None), Tensor) for part in parts.values()):
        return False
    if not all(
        isinstance(getattr(attention, name, None), int) for name in ("head_dim", "layer_idx")
    ):
        return False
    owned = {id(weight) for part in parts.values() for weight in part.parameters()}
    dtypes = {part.weight.dtype for part in parts.values()}
    return (
        owned == {id(weight) for weight in layer.parameters()}
        and len(dtypes) == 1
        and dtypes <= _TOLERANCE.keys()
        and _sizes_fit(parts, attention.head_dim)
    )


def _parts(layer: Any) -> dict[str, Any]:
    """The parts of a layer like Llama's, by the names that `csrc/layer.cpp` has for them."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    found = {
        **{name: getattr(attention, f"{name}_proj", None) for name in ("q", "k", "v", "o")},
        **{name: getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")},
        "norm1": getattr(layer, "input_layernorm", None),
        "norm2": getattr(layer, "post_attention_layernorm", None),
    }
    optional = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
    return found | {name: norm for name, norm in optional.items() if norm is not None}


def _sizes_fit(parts: dict[str, Any], head_dim: int) -> bool:
    if not all(isinstance(parts[name], nn.Linear) for name in _PROJECTIONS):
        return False
    norms = [name for name in _NORMS if name in parts]
    if not all(isinstance(getattr(parts[name], "variance_epsilon", None), float) for name in norms):
        return False
    hidden = parts["q"].in_features
    shapes = {name: tuple(part.weight.shape) for name, part in parts.items()}
    queries, keys, inner = (shapes[name][0] for name in ("q", "k", "gate"))
    expected = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        **{name: (hidden,) if name in ("norm1", "norm2") else (head_dim,) for name in norms},
    }
    lengths = {shape[-1] for shape in expected.values()}
    return (
        shapes == expected
        and queries % head_dim == keys % head_dim == 0
        and all(length % INPUTS_MULTIPLE == 0 for length in lengths)
    )
