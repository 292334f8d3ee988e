"""What an engine is doing at one moment, for those who watch it."""

from dataclasses import dataclass
from typing import Literal, Self

from longspan.engine.engine import Engine
from longspan.engine.request import Request
from longspan.engine.request_progress import prefilled_tokens, seconds_left


@dataclass(frozen=True, slots=True)
class RankView:
    """Pages of one rank's pool; of those not used, `cached` hold keys of requests that ended."""

    used: int
    cached: int
    total: int


@dataclass(frozen=True, slots=True)
class RequestView:
    """A sequence that takes part in steps.

    `pages[r]` are its pages on rank r, which it may share with others. `strategy` is how its
    holders share attention in its last step, "local" if there is one holder, None before its
    first. Times are in seconds; None where they are not known.
    """

    id: str
    state: Literal["prefill", "decode", "ending"]
    prompt_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    output_tokens: int
    pages: tuple[int, ...]
    home: int | None
    strategy: str | None
    seconds_left: float | None
    time_to_first_token: float | None

    @classmethod
    def of(cls, request: Request, engine: Engine) -> Self:
        holdings, num_ranks = request.holdings.copy(), engine.ledger.num_ranks
        pages = [0] * num_ranks
        for rank, holding in holdings.items():
            pages[rank] = sum(extent.length for extent in holding.extents)
        first = request.metrics.first_token_time
        state: Literal["prefill", "decode"] = "prefill" if first is None else "decode"
        return cls(
            id=request.request_id,
            state="ending" if request.finish_reason else state,
            prompt_tokens=len(request.prompt_token_ids),
            prefilled_tokens=prefilled_tokens(request),
            cached_tokens=request.num_cached_tokens,
            output_tokens=len(request.output_token_ids),
            pages=tuple(pages),
            home=request.home,
            strategy=_strategy(request, len(holdings), engine.config.attention_strategy),
            seconds_left=seconds_left(request, engine.scheduler.cost, engine.clock()),
            time_to_first_token=request.metrics.time_to_first_token,
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Ranks and running requests. What another thread steps is read a number at a time.

    `now` is in seconds on the engine's clock. Since its start, `prefilled_tokens` of prompts have
    been computed (again after a preemption), `generated_tokens` drawn, and `sent_bytes` sent from
    rank to rank for each strategy.
    """

    now: float
    page_size: int
    ranks: list[RankView]
    requests: list[RequestView]
    prefilled_tokens: int
    generated_tokens: int
    sent_bytes: dict[str, int]

    @classmethod
    def of(cls, engine: Engine) -> Self:
        scheduler, ledger = engine.scheduler, engine.ledger
        return cls(
            now=engine.clock(),
            page_size=ledger.page_size,
            ranks=[
                RankView(usage.used, ledger.num_idle(rank), usage.total)
                for rank, usage in enumerate(engine.kv_usage)
            ],
            requests=[RequestView.of(request, engine) for request in list(scheduler.running)],
            prefilled_tokens=scheduler.num_prefilled,
            generated_tokens=scheduler.num_generated,
            sent_bytes={name: traffic.bytes for name, traffic in list(engine.traffic.items())},
        )


def _strategy(request: Request, num_holders: int, forced: str) -> str | None:
    if num_holders < 2:
        return "local" if num_holders else None
    if forced != "auto":
        return forced
    choice = request.choice
    return None if choice is None else choice.strategy
