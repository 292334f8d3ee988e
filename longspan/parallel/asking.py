"""Queries go to the keys' ranks and partial states come back: what pass-Q and tree share."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from longspan.attention.state import AttentionState
from longspan.parallel.exchange import Job, LayerExchange
from longspan.parallel.routes import Question, Route, Routes
from longspan.parallel.transport import Message, Wait


def ask(layer: LayerExchange, label: str, routes: Routes) -> Job:
    """Queries out in the model's type, `out` and `lse` back in float32, along `routes`.

    A gateway relays what it is asked from other hosts and answers with the merged state of its
    host. Without gateways two of the four exchanges are empty, and an empty one isn't made.
    """
    own = {(layer.exchange.rank, index): q for index, q in enumerate(layer.queries)}
    wait, asked = _queries(layer, label, own, routes.asks, routes.asked)
    yield
    wait()
    wait, relayed = _queries(layer, label, asked, routes.relays, routes.relayed)
    answers = _answers(layer, asked)
    wait()
    wait, partial = _states(layer, label, _answers(layer, relayed), routes.relayed, routes.relays)
    wait()
    for question, state in partial:
        answers[question].absorb(state)
    wait, answered = _states(layer, label, answers, routes.asked, routes.asks)
    states = layer.empty_states()
    layer.absorb_own(states)
    wait()
    for (_, index), state in answered:
        states[index].absorb(state)
    return states


def _answers(
    layer: LayerExchange, questions: Mapping[Question, Tensor]
) -> dict[Question, AttentionState]:
    """Partial states of others' queries over this rank's keys."""
    answers = {}
    for (rank, index), q in questions.items():
        answers[rank, index] = state = layer.empty_state(len(q))
        layer.attend(index, state, q, rank)
    return answers


def _queries(
    layer: LayerExchange, label: str, queries: Mapping[Question, Tensor], out: Route, come: Route
) -> tuple[Wait, dict[Question, Tensor]]:
    """Start to send queries [T, H, D]; those that come are filled after the wait."""
    wait, parts = _send(layer, label, queries, out, come, layer.empty_queries)
    return wait, dict(parts)


def _states(
    layer: LayerExchange,
    label: str,
    states: Mapping[Question, AttentionState],
    out: Route,
    come: Route,
) -> tuple[Wait, list[tuple[Question, AttentionState]]]:
    """Start to send states as [T, H, D + 1]; those that come are filled after the wait."""
    packed = {
        question: torch.cat((state.out, state.lse.unsqueeze(-1)), dim=-1)
        for question, state in states.items()
    }
    wait, parts = _send(layer, label, packed, out, come, layer.empty_packed_states)
    return wait, [(question, AttentionState(p[..., :-1], p[..., -1])) for question, p in parts]


def _send(
    layer: LayerExchange,
    label: str,
    parts: Mapping[Question, Tensor],
    out: Route,
    come: Route,
    empty: Callable[[int], Tensor],
) -> tuple[Wait, Iterable[tuple[Question, Tensor]]]:
    """One message to each rank of `out`, and one from each of `come` with room made by `empty`."""
    sends = [
        (peer, _joined([parts[question] for question in questions]))
        for peer, questions in out.items()
    ]
    receives: list[Message] = []
    received: list[tuple[Question, Tensor]] = []
    for peer, questions in come.items():
        sizes = [layer.exchange.num_queries(index, rank) for rank, index in questions]
        message = empty(sum(sizes))
        receives.append((peer, message))
        received += zip(questions, torch.split(message, sizes), strict=True)
    return layer.send(label, sends, receives), received


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
