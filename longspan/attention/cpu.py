"""Attention with LSE on CPU, on PyTorch's own blocked kernel."""

import torch
from torch import Tensor

from longspan.attention.state import AttentionState

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False
) -> AttentionState:
    """Attention of q [T, H, D] over k, v [S, G, D]; with `causal`, T equals S.

    Half-precision inputs are widened first: the kernel rounds its output to its input's type, and
    states must stay float32 until the last merge. Strides are free except the last.
    """
    (tokens, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    if tokens == 0 or keys == 0:  # the kernel divides by its number of blocks
        return AttentionState.empty(tokens, heads, head_dim, q.device)
    # The kernel reads a head's numbers as if they were adjacent, whatever the last stride says.
    q, k, v = (x.float() if x.stride(-1) == 1 else x.float().contiguous() for x in (q, k, v))
    group = heads // kv_heads
    grouped = q.view(tokens, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    if causal:
        # One head of keys serves its group of query heads with stride 0, without a copy.
        k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
        out, lse = _flash(grouped, k, v, 0.0, True, scale=scale)
    else:
        # Without a mask the queries of a group are just more rows over the same keys.
        folded = grouped.reshape(1, kv_heads, group * tokens, head_dim)
        out, lse = _flash(folded, k.unsqueeze(0), v.unsqueeze(0), scale=scale)
    return AttentionState(
        out.view(kv_heads, group, tokens, head_dim)
        .permute(2, 0, 1, 3)
        .reshape(tokens, heads, head_dim),
        lse.reshape(kv_heads, group, tokens).permute(2, 0, 1).reshape(tokens, heads),
    )
