"""pass-Q: queries go to the keys' ranks, partial states come back (arXiv 2411.01783)."""

import torch
from torch import Tensor

from longspan.attention.state import AttentionState
from longspan.parallel.exchange import Job, LayerExchange


def pass_q(layer: LayerExchange) -> Job:
    """Two all-to-alls: queries out in the model's type, `out` and `lse` back in float32.

    Sends for even shares `(R - 1) * T / R * H * D` numbers out and `(R - 1) * T / R * H * (D + 1)`
    float32 back. All queries of a step leave at once instead of going round a ring: the bytes are
    the same, and one token's query crosses one link instead of R - 1.
    """
    exchange = layer.exchange
    rank, others = exchange.rank, exchange.others
    asked = [(peer, layer.pack_queries(exchange.seeing(rank, peer))) for peer in others]
    asking = [(peer, layer.empty_queries(exchange.num_seeing(peer, rank))) for peer in others]
    wait = layer.send("pass_q", asked, asking)
    yield
    wait()
    answers = [(peer, _answer(layer, peer, queries)) for peer, queries in asking]
    answered = [
        (peer, layer.like.new_empty(_state_shape(layer, len(queries)), dtype=torch.float32))
        for peer, queries in asked
    ]
    wait = layer.send("pass_q", answers, answered)
    states = layer.empty_states()
    layer.absorb_own(states)
    wait()
    for peer, packed in answered:
        indices = exchange.seeing(rank, peer)
        sizes = [exchange.num_queries(index, rank) for index in indices]
        for index, part in zip(indices, torch.split(packed, sizes), strict=True):
            states[index].absorb(AttentionState(part[..., :-1], part[..., -1]))
    return states


def _state_shape(layer: LayerExchange, tokens: int) -> tuple[int, int, int]:
    heads, _, head_dim = layer.shape
    return tokens, heads, head_dim + 1


def _answer(layer: LayerExchange, peer: int, queries: Tensor) -> Tensor:
    """Partial states of a peer's queries over this rank's keys, packed [T, H, D + 1]."""
    exchange = layer.exchange
    indices = exchange.seeing(peer, exchange.rank)
    packed = queries.new_empty(_state_shape(layer, len(queries)), dtype=torch.float32)
    sizes = [exchange.num_queries(index, peer) for index in indices]
    for index, q, part in zip(
        indices, torch.split(queries, sizes), torch.split(packed, sizes), strict=True
    ):
        state = layer.empty_state(len(q))
        layer.attend(index, state, q, peer, layer.keys[index], exchange.rank)
        part[..., :-1], part[..., -1] = state.out, state.lse
    return packed
