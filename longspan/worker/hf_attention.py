"""Longspan's attention as transformers sees it: one registered function, no model patched."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from longspan.worker.step import Step

NAME = "longspan"


def longspan_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    step: Step,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    `step` comes through `model(..., step=step)`. What else a model passes here has been looked at
    when it was loaded.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    rows = step.rows(layer)
    out = step.attend(layer, q if rows is None else q[rows], k, v).to(query.dtype)
    if rows is not None:
        out = out.new_zeros(q.shape).index_copy_(0, rows, out)
    return out.unsqueeze(0), None


def register() -> None:
    """Make `attn_implementation="longspan"` known to transformers."""
    AttentionInterface.register(NAME, longspan_attention)
