"""How far a request is, as a person who waits for it wants to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from longspan.cost.model import CostModel
from longspan.engine.request import Request
from longspan.engine.stream import Stream


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """Tokens of all prompts of a request together, and where their keys and values are.

    `prompt_tokens` counts a prompt once, whatever its `n`. `kv_tokens[r]` are the tokens with keys
    on rank r, those of the step under way included. `seconds_left` is how long the prefill will
    still take, None where nothing is known: the predicted time of what is left, at the pace of what
    is done.
    """

    state: Literal["waiting", "prefill", "decode", "finished"]
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ranks: tuple[int, ...] = ()
    kv_tokens: tuple[int, ...] = ()
    seconds_left: float | None = None

    @classmethod
    def of(cls, stream: Stream, cost: CostModel, now: float) -> Self:
        """Groups that another thread adds and steps may be looked at: each number is read once."""
        groups = list(stream.groups)
        requests = [request for group in groups for request in list(group.requests)]
        firsts = [group.requests[0] for group in groups]
        ranks = sorted({rank for request in requests for rank in list(request.ranks)})
        left = [seconds_left(request, cost, now) for request in firsts]
        known = [seconds for seconds in left if seconds is not None]
        return cls(
            state=_state(requests),
            prompt_tokens=stream.prompt_tokens,
            prefilled_tokens=sum(map(prefilled_tokens, firsts)),
            cached_tokens=sum(request.num_cached_tokens for request in firsts),
            output_tokens=sum(len(request.output_token_ids) for request in requests),
            ranks=tuple(ranks),
            kv_tokens=_kv_tokens(requests, cost.topology.num_ranks),
            seconds_left=max(known) if len(known) == len(left) and known else None,
        )


def prefilled_tokens(request: Request) -> int:
    """How many of a prompt's tokens have been computed."""
    prompt = len(request.prompt_token_ids)
    if request.finish_reason or request.output_token_ids:
        return prompt
    return min(request.num_computed, prompt)


def seconds_left(request: Request, cost: CostModel, now: float) -> float | None:
    """How long a prompt's prefill will still take; None before its first step is done."""
    total, done = len(request.prompt_token_ids), prefilled_tokens(request)
    if done == total:
        return 0.0
    begun, cached = request.metrics.first_scheduled_time, request.num_cached_tokens
    ranks = len(request.ranks)
    if begun is None or done <= cached or not ranks:
        return None
    left = cost.prefill_seconds(total - done, done, ranks)
    whole = cost.prefill_seconds(total - cached, cached, ranks)
    return left * (now - begun) / max(whole - left, 1e-9)


def _kv_tokens(requests: Sequence[Request], num_ranks: int) -> tuple[int, ...]:
    holdings = [request.holdings.copy() for request in requests]
    return tuple(sum(held[r].tokens for held in holdings if r in held) for r in range(num_ranks))


def _state(
    requests: Sequence[Request],
) -> Literal["waiting", "prefill", "decode", "finished"]:
    """That of the one that has come least far."""
    running = [request for request in requests if not request.finish_reason]
    if requests and not running:
        return "finished"
    if all(request.metrics.first_scheduled_time is None for request in running):
        return "waiting"
    if any(request.metrics.first_token_time is None for request in running):
        return "prefill"
    return "decode"
