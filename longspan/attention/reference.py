"""The definition of attention that every kernel and every strategy is tested against."""

import torch
from torch import Tensor

from longspan.attention.state import AttentionState


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False
) -> AttentionState:
    """Attention of q [T, H, D] over k, v [S, G, D] in float32, all scores in memory at once.

    Query head h uses key/value head `h // (H // G)`. With `causal`, T equals S and query t sees
    keys 0 to t. Returns a float32 state, on the device of q.
    """
    visible = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    return masked_attention(q, k, v, visible.tril() if causal else visible, scale=scale)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float
) -> AttentionState:
    """Attention where query t sees the keys for which `visible` [T, S] (bool) holds."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->ths", q.float() * scale, keys)
    scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~visible.unsqueeze(1), 0.0)
    return AttentionState(torch.einsum("ths,shd->thd", weights, values), lse)
