"""What a step would take by each degree and strategy, and of what that is made up."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from longspan.cost.choice import is_feasible
from longspan.cost.forecast import Forecaster, seconds_of
from longspan.cost.limits import Part, only
from longspan.cost.model import CostModel
from longspan.cost.strategy import sent_bytes
from longspan.plan import Segment, Strategy


class Choice(msgspec.Struct, frozen=True):
    """A step of one request on so many ranks by a strategy, and whether that is what is taken.

    The step computes `new_tokens` after `cached_tokens`. Seconds are those of the busiest rank:
    `launches`, reading `weights`, linear layers, attention, exchange, less
    `hidden`, what overlaps. It sends `near_bytes` inside its host and `far_bytes` to others. For a
    prefill the step is the last but one, and `ttft` that of the whole prompt on this degree, each
    step by its fastest strategy.
    """

    phase: Literal["prefill", "decode"]
    degree: int
    strategy: Strategy
    chosen: bool
    new_tokens: int
    cached_tokens: int
    launches: float
    weights: float
    linear: float
    attention: float
    exchange: float
    hidden: float
    total: float
    near_bytes: int
    far_bytes: int
    ttft: float | None = None


def explain(forecaster: Forecaster, tokens: int, degree: int) -> list[Choice]:
    """The choices for one request of so many tokens that is alone, where this degree is taken."""
    config = forecaster.config
    pages = -(-tokens // config.page_size)
    least = -(-pages // forecaster.pages_per_rank)
    doubled = [least << power for power in range(config.num_ranks.bit_length())]
    tried = [each for each in doubled if each < config.num_ranks]
    degrees = sorted({*tried, degree, config.num_ranks})
    prefill, decode = [], []
    for each in degrees:
        ranks = list(range(each))
        chunks = list(forecaster.chunks(tokens, each))
        ttft = seconds_of(chunks, forecaster.cost)
        # The last chunk is what is left, and may be a few tokens.
        chunk = chunks[-2] if len(chunks) > 1 else chunks[-1]
        taken = forecaster.prefill_segment(chunk, ranks)
        for segment in _alternatives(forecaster.cost, taken):
            chosen = each == degree and segment.strategy == taken.strategy
            prefill.append(_choice(forecaster, "prefill", segment, chosen, ttft))
        [taken] = forecaster.decode_segments(tokens, [ranks])
        for segment in _alternatives(forecaster.cost, taken):
            chosen = each == degree and segment.strategy == taken.strategy
            decode.append(_choice(forecaster, "decode", segment, chosen))
    return prefill + decode


def _alternatives(cost: CostModel, taken: Segment) -> Iterator[Segment]:
    """The segment by each strategy that there is for it."""
    hosts = {cost.topology.hosts[shard.rank] for shard in taken.shards}
    for strategy in cost.strategies if len(taken.shards) > 1 else (taken.strategy,):
        one_host = strategy == "tree" and len(hosts) == 1  # where it is pass-Q
        if is_feasible(strategy, taken.shards, cost) and not one_host:
            yield Segment(taken.request_id, strategy, taken.shards)


def _choice(
    forecaster: Forecaster,
    phase: Literal["prefill", "decode"],
    segment: Segment,
    chosen: bool,
    ttft: float | None = None,
) -> Choice:
    """A part's seconds are those of a rank that needs no time for all the others."""
    cost, rates = forecaster.cost, forecaster.rates
    seconds = cost.step_seconds([segment])
    rank = max(seconds, key=seconds.__getitem__)

    def of(*parts: Part) -> float:
        return forecaster.model_of(only(rates, *parts)).step_seconds([segment])[rank]

    # A rank without queries reads no weights.
    weights = cost.base_seconds - rates.step_seconds if segment.shard(rank).queries else 0.0
    launches, linear, exchange = of("launches"), of("linear"), of("messages")
    attention = of("attention", "reading") - weights
    sent = sent_bytes(segment.strategy, segment.shards, cost.shape, cost.topology)
    near, far = sent[[shard.rank for shard in segment.shards].index(rank)]
    return Choice(
        phase=phase,
        degree=len(segment.shards),
        strategy=segment.strategy,
        chosen=chosen,
        new_tokens=sum(shard.num_queries for shard in segment.shards),
        cached_tokens=sum(shard.cached for shard in segment.shards),
        launches=launches,
        weights=weights,
        linear=linear,
        attention=attention,
        exchange=exchange,
        hidden=max(launches + weights + linear + attention + exchange - seconds[rank], 0.0),
        total=seconds[rank],
        near_bytes=cost.shape.num_layers * near,
        far_bytes=cost.shape.num_layers * far,
        ttft=ttft,
    )
