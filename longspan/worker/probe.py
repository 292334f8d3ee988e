"""Proves with a few tiny forwards that a loaded model is exact under Longspan's attention.

Longspan packs tokens of several prompts into one row, at any positions, and replaces nothing but
the attention function. That is exact if tokens meet nowhere else, and if full causal attention is
all that the function is asked for. `longspan.models` reads what a config says; the probe looks at
what the model does: every call of the attention function, every mask that the model would build,
and its logits against those of its own attention.

Shapes: T tokens in the row, S tokens of a prompt, H query heads, G key/value heads, D head size.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from longspan.errors import UnsupportedModelError
from longspan.models import kv_shape

__all__ = ["LayerShape", "probe"]

_PLAIN, _MASKED = "longspan_probe", "longspan_probe_masked"

# Largest error of one token's logits relative to their spread. The probe rounds as models do, so
# most errors are 0; a model that mixes tokens is off by tens of percent.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Rounding may turn a close choice between two experts, but not with every random prompt.
_DRAWS = 3

# Arguments that change nothing in what an attention function computes; dropout is 0 in eval mode.
_HARMLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "output_router_logits"}

# A cache length that shows in the logits of every model that computes with it.
_FAR = 2**20


class _Fault(Exception):
    """Why a model can't be served exactly, without the model's name."""


class _Difference(_Fault):
    """A fault that shows in logits alone."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer hands to the attention function: H, G, D and the scale of the scores."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float


@dataclass(frozen=True)
class _Piece:
    """Tokens `start .. end - 1` of one prompt, whose first token has position `offset`."""

    prompt: int
    start: int
    end: int
    offset: int = 0

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.end)


@dataclass
class _Step:
    """One packed row on its way through the model, which must serve contexts up to `limit`.

    `kv[layer, prompt]` is a prompt's keys and values [2, G, S, D]. A row that is given those of an
    earlier one needs only some of a prompt's tokens, as after a cached prefill.
    """

    pieces: list[_Piece]
    limit: int
    kv: dict[tuple[int, int], Tensor] = dataclasses.field(default_factory=dict)
    shapes: list[LayerShape] = dataclasses.field(default_factory=list)

    def spans(self) -> Iterator[tuple[_Piece, slice]]:
        """Each piece with its rows."""
        row = 0
        for piece in self.pieces:
            yield piece, slice(row, row := row + piece.end - piece.start)


class _FarCache(DynamicCache):
    """An empty cache that claims to hold `_FAR` tokens of each layer."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return _FAR


def probe(model: PreTrainedModel, name: str, max_model_len: int | None = None) -> list[LayerShape]:
    """Run a few forwards of at most 21 tokens; return the shape of every layer's attention.

    Args:
        model: in eval mode, on its device; it is left as it was. What stays behind are the probe's
            two names in transformers' attention interface.
        name: what an error calls the model.
        max_model_len: longest context to be served, the model's own limit if None; a window that
            never bites within it is no fault.

    Raises:
        UnsupportedModelError: Longspan would not compute what the model computes alone.
    """
    assert not model.training
    text = model.config.get_text_config(decoder=True)
    limit = max_model_len or getattr(text, "max_position_embeddings", None) or _FAR
    AttentionInterface.register(_PLAIN, _attend)
    AttentionInterface.register(_MASKED, _attend_masked)
    AttentionMaskInterface.register(_MASKED, partial(_mask, limit))
    try:
        with torch.no_grad():
            for seed in range(1, _DRAWS):
                with suppress(_Difference):
                    return _Probe(model, limit, seed).run()
            return _Probe(model, limit, _DRAWS).run()
    except _Fault as fault:
        raise UnsupportedModelError(
            f"model={name!r} ({type(model).__name__}) can't be served exactly: {fault}"
        ) from fault


class _Probe:
    """Two short prompts with the model's own logits, and a third one to disturb them."""

    def __init__(self, model: PreTrainedModel, limit: int, seed: int) -> None:
        self.model = model
        self.limit = limit
        self.text = model.config.get_text_config(decoder=True)
        # Special tokens, at either end of a vocabulary, are left out.
        low, high = self.text.vocab_size // 4, self.text.vocab_size // 4 * 3
        draw = partial(torch.randint, generator=torch.Generator().manual_seed(seed))
        self.prompts = [draw(low, high, (min(size, limit),)) for size in (11, 7, 3)]
        with _attention(model, "eager"):
            self.own = [_forward(model, input_ids=ids[None])[0] for ids in self.prompts[:2]]

    def run(self) -> list[LayerShape]:
        a, b, c = (len(prompt) for prompt in self.prompts)
        alone = [_Piece(0, 0, a)]
        # The third prompt is at the far end of the context.
        packed = [*alone, _Piece(1, 0, b), _Piece(2, 0, c, offset=self.limit - c)]
        slices = [_Piece(1, b // 2, b), _Piece(0, a - a // 3, a), _Piece(0, 0, a // 3)]
        whole = _Step(packed, self.limit)
        with _attention(self.model, _PLAIN):
            self._compare(whole, "packed with other prompts")
            self._compare(_Step(slices, self.limit, whole.kv), "given slices of prompts")
            cache = {"past_key_values": _FarCache(), "use_cache": True}
            self._compare(_Step(alone, self.limit), "told a cache's length", **cache)
        self._check_shapes(whole)
        with _attention(self.model, _MASKED):
            self._logits(_Step(alone, self.limit), torch.arange(0))
        return whole.shapes

    def _compare(self, step: _Step, when: str, **kwargs: Any) -> None:
        """Check a packed row against the prompts' own logits, where they are known."""
        known = [(piece, rows) for piece, rows in step.spans() if piece.prompt < len(self.own)]
        rows = torch.cat([torch.arange(rows.start, rows.stop) for _, rows in known])
        wanted = torch.cat([self.own[piece.prompt][piece.tokens] for piece, _ in known]).float()
        found = self._logits(step, rows, **kwargs).float()
        spread = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
        error = float(((found - wanted).norm(dim=-1) / spread).max())
        if not error <= _TOLERANCE[self.model.dtype]:  # also if it is NaN
            raise _Difference(
                f"its output under Longspan's attention differs from its own by {error:.1%} when "
                f"{when}"
            )

    def _logits(self, step: _Step, rows: Tensor, **kwargs: Any) -> Tensor:
        """Logits [len(rows), vocab] of some rows, computed as Longspan's workers do."""
        ids = torch.cat([self.prompts[p.prompt][p.tokens] for p in step.pieces])[None]
        positions = torch.cat([torch.arange(p.start, p.end) + p.offset for p in step.pieces])[None]
        inputs = {"input_ids": ids, "position_ids": positions, "logits_to_keep": rows, "step": step}
        logits = _forward(self.model, **inputs, **kwargs)[0]
        if len(step.shapes) != self.text.num_hidden_layers:
            raise _Fault(f"{len(step.shapes)} of its {self.text.num_hidden_layers} layers attend")
        if len(logits) != len(rows):
            raise _Fault("it ignores logits_to_keep")
        return logits

    def _check_shapes(self, step: _Step) -> None:
        """Check that a KV cache laid out by the config, in the weights' dtype, fits all layers."""
        told = kv_shape(self.text)[:2]
        found = (step.shapes[0].num_kv_heads, step.shapes[0].head_dim)
        if found != told:
            raise _Fault(f"its KV heads have number and size {found}, in its config {told}")
        if {kv.dtype for kv in step.kv.values()} != {self.model.dtype}:
            raise _Fault(f"its keys and values aren't all {self.model.dtype}, as its weights")


def _forward(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Logits [1, rows, vocab]. Whatever fails in the model, memory apart, is a fault of it."""
    for name, value in inputs.items():
        inputs[name] = value.to(model.device) if isinstance(value, Tensor) else value
    try:
        logits: Tensor = model(**{"use_cache": False, **inputs}).logits
    except (_Fault, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise _Fault(f"its forward fails: {reason}") from error
    return logits


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model use another attention function for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise _Fault("its attention function can't be replaced")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _mask(
    limit: int, *, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **_: Any
) -> Tensor:
    """A mask [1, 1, T, S] that says whether the one asked for is causal up to `limit`."""
    first, last = torch.tensor(0), torch.tensor(limit - 1)
    try:
        plain = mask_function(0, 0, last, first) & ~mask_function(0, 0, first, first + 1)
    except IndexError:  # it looks at more than positions
        plain = torch.tensor(False)
    return plain.expand(1, 1, q_length, kv_length)


def _attend_masked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """As `_attend`, for a layer that is handed the mask that it would get without Longspan."""
    if attention_mask is not None and not attention_mask.all():
        limit = kwargs["step"].limit
        raise _Fault(f"its attention isn't causal, or sees less than {limit} tokens (a window)")
    return _attend(module, query, key, value, None, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    step: _Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full causal attention of each piece over its prompt's keys so far.

    query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]
    """
    if step is None:
        raise _Fault("it doesn't pass its keyword arguments on to its attention")
    if attention_mask is not None:
        raise _Fault("it hands a mask or bias to its attention")
    _check_arguments(module, step.limit, kwargs)
    layer = len(step.shapes)
    if getattr(module, "layer_idx", None) != layer:
        raise _Fault("its layers don't attend once each, in order")
    shape = _shape(query, key, value, scaling)
    if layer and dataclasses.replace(step.shapes[0], scaling=shape.scaling) != shape:
        raise _Fault("its layers differ in the number or size of their heads")
    step.shapes.append(shape)

    new = torch.stack((key[0], value[0]))
    for piece, rows in step.spans():
        kv = step.kv.setdefault((layer, piece.prompt), new[:, :, rows].clone())
        kv[:, :, piece.tokens] = new[:, :, rows]
    out = [
        _causal(query[0, :, rows], step.kv[layer, piece.prompt][:, :, : piece.end], shape)
        for piece, rows in step.spans()
    ]
    return torch.cat(out, 1).transpose(0, 1)[None].contiguous(), None


def _causal(query: Tensor, kv: Tensor, shape: LayerShape) -> Tensor:
    """Attention [H, T, D] of the last T of S tokens, from kv [2, G, S, D], rounded as eager is."""
    kv = kv.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1)
    scores = query @ kv[0].mT * shape.scaling
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + kv.shape[2] - query.shape[1])
    weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ kv[1]


def _shape(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> LayerShape:
    _, heads, tokens, dim = query.shape
    groups = key.shape[1]
    if value.shape[3] != key.shape[3]:
        raise _Fault(f"its keys have size {key.shape[3]}, its values {value.shape[3]}")
    if key.shape != (1, groups, tokens, dim) or value.shape != key.shape or heads % groups:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise _Fault(f"its attention gets queries, keys and values of shapes {shapes}")
    return LayerShape(heads, groups, dim, dim**-0.5 if scaling is None else scaling)


def _check_arguments(module: nn.Module, limit: int, kwargs: dict[str, Any]) -> None:
    """Refuse whatever would make attention differ from plain causal attention."""
    if kwargs.pop("is_causal", True) is False or getattr(module, "is_causal", True) is False:
        raise _Fault("its attention isn't causal")
    window = kwargs.pop("sliding_window", None)
    if window is not None and window < limit:
        raise _Fault(f"its attention has a window of {window}; set max_model_len<={window}")
    for name, value in kwargs.items():
        if value is not None and name not in _HARMLESS:
            raise _Fault(f"it hands {name} to its attention")
