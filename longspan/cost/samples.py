"""What a fleet measures of itself, and the rates that come nearest to it. Plain data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal

import msgspec

from longspan.cost.fit import fit
from longspan.cost.kv_shape import KVShape
from longspan.cost.model import CostModel
from longspan.cost.rates import LinkRates, Rates
from longspan.topology import Link

MessageKind = Literal["hop", "all_to_all"]


class StepSample(msgspec.Struct, frozen=True):
    """A step of so many new tokens of one request, with nothing cached."""

    tokens: int
    seconds: float


class AttentionSample(msgspec.Struct, frozen=True):
    """Attention of some queries over keys that all of them see, in one layer."""

    queries: int
    keys: int
    seconds: float


class MessageSample(msgspec.Struct, frozen=True):
    """One message to the next rank, or one to each of several: bytes that a rank sends in all."""

    kind: MessageKind
    link: Link
    bytes: int
    seconds: float


class OverlapSample(msgspec.Struct, frozen=True):
    """A message to the next rank, attention that takes about as long, and both at once."""

    link: Link
    message: float
    attention: float
    both: float

    @property
    def overlap(self) -> float:
        """The part of the shorter one's time that was saved."""
        saved = self.message + self.attention - self.both
        return min(max(saved / min(self.message, self.attention), 0.0), 1.0)


class Samples(msgspec.Struct, frozen=True):
    """What one rank measured, all ranks at work at the same time. Seconds are medians."""

    steps: tuple[StepSample, ...] = ()
    attention: tuple[AttentionSample, ...] = ()
    messages: tuple[MessageSample, ...] = ()
    overlaps: tuple[OverlapSample, ...] = ()


def fit_rates(ranks: Sequence[Samples], shape: KVShape, num_active_parameters: int) -> Rates:
    """The rates of the cost model that come nearest to what the ranks measured.

    Attention of one query tells its fixed cost and how fast keys are read, that of many how fast
    it is computed. What steps take beside reading weights and attention is their fixed cost and the
    linear layers. Errors count as parts of what was measured.
    """
    attention = [one for rank in ranks for one in rank.attention]
    reading = [one for one in attention if one.queries == 1]
    attend, byte = fit(
        [[1, one.keys * shape.key_bytes] for one in reading], [one.seconds for one in reading]
    )
    computing = [one for one in attention if one.queries > 1]
    flops = 4 * shape.num_heads * shape.head_dim
    (pair,) = fit(
        [[flops * one.queries * one.keys] for one in computing],
        [one.seconds - attend for one in computing],
        scales=[one.seconds for one in computing],
    )
    messages = [one for rank in ranks for one in rank.messages]
    overlaps = [one for rank in ranks for one in rank.overlaps]

    def overlap_of(link: Link) -> float:
        return median([one.overlap for one in overlaps if one.link == link] or [0.0])

    rates = Rates(
        step_seconds=0.0,
        linear_flops=float("inf"),
        attention_flops=_per_second(pair),
        memory_bytes=_per_second(byte),
        attend_seconds=attend,
        links=_links(messages, "hop", overlap_of),
        all_to_all=_links(messages, "all_to_all", overlap_of),
    )
    model = CostModel(shape, num_active_parameters, rates)
    steps = [one for rank in ranks for one in rank.steps]
    step, flop = fit(
        [[1, 2 * num_active_parameters * one.tokens] for one in steps],
        [
            one.seconds - model.base_seconds - model.prefill_seconds(one.tokens, 0, 1)
            for one in steps
        ],
        scales=[one.seconds for one in steps],
    )
    return replace(rates, step_seconds=step, linear_flops=_per_second(flop))


def with_links(rates: Rates, messages: Sequence[MessageSample]) -> Rates:
    """The same ranks with the links that were measured; what overlaps is still assumed."""
    return replace(
        rates,
        links={**rates.links, **_links(messages, "hop", lambda link: rates.hop(link).overlap)},
        all_to_all=_links(messages, "all_to_all", lambda link: rates.hop(link).overlap),
    )


def _links(
    messages: Iterable[MessageSample], kind: MessageKind, overlap_of: Callable[[Link], float]
) -> dict[Link, LinkRates]:
    """Latency and bandwidth of each kind of link that was measured."""
    messages = [one for one in messages if one.kind == kind]
    links: dict[Link, LinkRates] = {}
    for link in sorted({one.link for one in messages}):
        own = [one for one in messages if one.link == link]
        seconds, byte = fit([[1, one.bytes] for one in own], [one.seconds for one in own])
        links[link] = LinkRates(seconds, _per_second(byte), overlap_of(link))
    return links


def _per_second(seconds: float) -> float:
    """How many a second; where they were too fast to be told from none, very many."""
    return 1 / seconds if seconds > 0 else 1e18
