"""Queries go to the keys' ranks and partial states come back: what pass-Q and tree share."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from longspan.attention.state import AttentionState
from longspan.parallel.exchange import Job, LayerExchange, joined
from longspan.parallel.routes import Question, Route, Routes
from longspan.parallel.transport import Wait

States = dict[int, AttentionState]
"""By the rank that asks or is asked: of all its questions, one after the other."""


def ask(layer: LayerExchange, label: str, routes: Routes) -> Job:
    """Queries out in the model's type, `out` and `lse` back in float32, along `routes`.

    A gateway relays what it is asked from other hosts and answers with the merged state of its
    host. Without gateways two of the four exchanges are empty, and an empty one isn't made.
    """
    own = dict(zip(layer.exchange.own_questions, layer.queries, strict=True))
    wait, asked = _queries(layer, label, own, routes.asks, routes.asked)
    yield
    wait()
    others = {
        question: q
        for peer, message in asked.items()
        for question, q in zip(
            routes.asked[peer],
            torch.split(message, layer.exchange.sizes(routes.asked[peer])),
            strict=True,
        )
    }
    wait, relayed = _queries(layer, label, others, routes.relays, routes.relayed)
    answers = _answers(layer, asked, routes.asked)
    wait()
    partial = _answers(layer, relayed, routes.relayed)
    wait, found = _states(layer, label, partial, routes.relays)
    wait()
    given = dict(_parts(layer, answers, routes.asked)) if found else {}
    for question, state in _parts(layer, found, routes.relays):
        given[question].absorb(state)
    wait, found = _states(layer, label, answers, routes.asks)
    state, states = layer.own_states()
    layer.absorb_own(state)
    wait()
    for peer, answer in found.items():
        if len(answer.lse) == len(state.lse):
            state.absorb(answer)
        else:
            for (_, index), part in _parts(layer, {peer: answer}, routes.asks):
                states[index].absorb(part)
    return states


def _answers(layer: LayerExchange, messages: Mapping[int, Tensor], route: Route) -> States:
    """Partial states of others' queries over this rank's keys."""
    answers = {}
    for peer, q in messages.items():
        answers[peer] = layer.empty_state(len(q))
        layer.attend(answers[peer], q, route[peer])
    return answers


def _parts(
    layer: LayerExchange, states: States, route: Route
) -> Iterator[tuple[Question, AttentionState]]:
    for peer, state in states.items():
        yield from zip(route[peer], layer.parts(state, route[peer]), strict=True)


def _queries(
    layer: LayerExchange, label: str, queries: Mapping[Question, Tensor], out: Route, come: Route
) -> tuple[Wait, dict[int, Tensor]]:
    """Start to send queries [T, H, D]; those that come are filled after the wait."""
    sends = [
        (peer, joined([queries[question] for question in questions]))
        for peer, questions in out.items()
    ]
    sizes = {peer: sum(layer.exchange.sizes(questions)) for peer, questions in come.items()}
    found = {peer: layer.empty_queries(size) for peer, size in sizes.items()}
    return layer.send(label, sends, list(found.items())), found


def _states(layer: LayerExchange, label: str, states: States, come: Route) -> tuple[Wait, States]:
    """Start to send states as [T, H, D + 1]; those that come are filled after the wait."""
    sends = [
        (peer, torch.cat((state.out, state.lse.unsqueeze(-1)), dim=-1))
        for peer, state in states.items()
    ]
    sizes = {peer: sum(layer.exchange.sizes(questions)) for peer, questions in come.items()}
    room = {peer: layer.empty_packed_states(size) for peer, size in sizes.items()}
    found = {peer: AttentionState(x[..., :-1], x[..., -1]) for peer, x in room.items()}
    return layer.send(label, sends, list(room.items())), found
