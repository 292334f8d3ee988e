"""Attention states: the result of some queries over some of the keys, and how two become one.

Shape letters everywhere in Longspan: T tokens in a rank's packed batch, S keys, H query heads,
G key/value heads, D head size, P page size, L layers, R ranks, B requests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.absorb import absorb


@dataclass(slots=True)
class AttentionState:
    """Attention of T queries over some keys: `out` [T, H, D] and `lse` [T, H], both float32.

    `out` is the softmax-weighted mean of the values; `lse` is the natural log of the sum of the
    exponentials of the scaled scores. Over no keys, the state is `(0, -inf)`.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(
        cls, tokens: int, heads: int, head_dim: int, device: torch.device
    ) -> "AttentionState":
        """The identity of `merge`: attention over no keys."""
        return cls(
            torch.zeros(tokens, heads, head_dim, dtype=torch.float32, device=device),
            torch.full((tokens, heads), -torch.inf, dtype=torch.float32, device=device),
        )

    def __getitem__(self, rows: slice) -> "AttentionState":
        """The state of some of the queries; a view."""
        return AttentionState(self.out[rows], self.lse[rows])

    def absorb(self, other: "AttentionState") -> None:
        """Merge `other`, of the same queries, into this state in place."""
        if absorb(self.out, self.lse, other.out, other.lse):
            return
        merged = merge(self, other)
        self.out.copy_(merged.out)
        self.lse.copy_(merged.lse)


def merge(first: AttentionState, second: AttentionState) -> AttentionState:
    """Attention of the same queries over both sets of keys, which must have no key in common.

    Associative and commutative up to rounding, with identity `(0, -inf)`; never makes a NaN, also
    for two empty states. This is the one operation of blockwise (arXiv 2305.19370), ring
    (arXiv 2310.01889) and tree attention (arXiv 2408.04093):
    `lse = log(exp(lse_1) + exp(lse_2))`, `out = sum_i exp(lse_i - lse) out_i`, here with weights
    `sigmoid(lse_1 - lse_2)` and `sigmoid(lse_2 - lse_1)`, which sum to 1 at any lse.
    """
    out = _share(first, second.lse) + _share(second, first.lse)
    return AttentionState(out, torch.logaddexp(first.lse, second.lse))


def _share(state: AttentionState, other_lse: Tensor) -> Tensor:
    # An empty state weighs nothing whatever its `out` holds: 0 times NaN would be NaN.
    empty = (state.lse == -torch.inf).unsqueeze(-1)
    weight = torch.sigmoid(state.lse - other_lse).unsqueeze(-1)
    return (state.out * weight).masked_fill(empty, 0.0)
