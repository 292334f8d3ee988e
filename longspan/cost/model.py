"""How long a step takes: sums of a few rates of a rank's device and its links. Pure Python.

A rank's part of a step is its fixed cost, its tokens through the layers, its attention, and of its
messages what does not travel behind attention (`cost/overlap.py`). Waiting for ranks that have more
to do is not counted: a step takes as long as its slowest rank.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple, Self, get_args

from longspan.cost.attention import KEYS_TRAVEL, AttentionCost, computes_own
from longspan.cost.curve import Curve
from longspan.cost.kv_shape import KVShape
from longspan.cost.overlap import HERE, Hidden, Leg, Shared, legs
from longspan.cost.rates import LinkRates, Rates
from longspan.cost.strategy import Calls, Sent, carried_bytes, num_calls, sent_bytes
from longspan.plan import Run, Segment, Shard, Strategy
from longspan.topology import Link, Topology

if TYPE_CHECKING:
    from longspan.models import ModelSpec

MEETINGS, MEETING_SECONDS = 4, 5e-6
"""How often ranks that decode jointly meet in a layer, in memory of their host; and how long."""

ONE_HOST = Topology.of_hosts([256])
"""Ranks of which nothing else is known."""


def _asking(shards: Sequence[Shard]) -> list[int]:
    return [shard.rank for shard in shards if shard.queries]


class Prediction(NamedTuple):
    """What one strategy costs a segment: seconds, messages one after the other, and bytes.

    `seconds` are those of the slowest rank's attention and of what it waits for beside it, over
    all layers. `calls` are of one layer, `sent` of all ranks in all layers.
    """

    seconds: float
    calls: Calls
    sent: Sent


class _Part:
    """What a rank has to do in a step, as far as it has been counted."""

    __slots__ = ("local", "shared", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.local = 0.0
        self.shared: dict[tuple[Strategy, tuple[int, ...]], Shared] = {}


class CostModel:
    """Seconds of steps, chunks, decode tokens and moves of one model on equal ranks.

    For H query heads of size D, L layers and W active parameters: a token takes
    `2 W / linear_flops`; attention of a segment's queries over one rank's keys `attend_seconds` in
    each layer, and whichever is longer of `4 H D L / attention_flops` for each query that sees a
    key and `L key_bytes / memory_bytes` for each key that is read.
    """

    def __init__(
        self,
        shape: KVShape,
        num_active_parameters: int,
        rates: Rates,
        topology: Topology = ONE_HOST,
        hidden: Hidden = HERE,
        joins: bool = False,
    ) -> None:
        self.shape = shape
        self.rates = rates
        self.topology = topology
        self.hidden = hidden
        layers = shape.num_layers
        weights = num_active_parameters * shape.itemsize / rates.memory_bytes
        self._base = rates.step_seconds + weights
        meetings = layers * MEETINGS * MEETING_SECONDS
        self.joins = joins and weights * (1 - 1 / topology.num_ranks) > meetings
        """Whether ranks decode jointly: if they can, and it is worth their meetings that each of
        them reads but a part of the weights."""
        self._token = 2 * num_active_parameters / rates.linear_flops
        self._attention = AttentionCost(
            attend=layers * rates.attend_seconds,
            pair=4 * shape.num_heads * shape.head_dim * layers / rates.attention_flops,
            key=layers * shape.key_bytes / rates.memory_bytes,
        )
        neighbours = pairwise(range(topology.num_ranks))
        inside = {topology.link(*pair) for pair in neighbours} - {"network"}
        self._inside: Link = "device" if inside == {"device"} else "host"
        self._host_size = max(topology.hosts.count(host) for host in set(topology.hosts))
        self.strategies: tuple[Strategy, ...] = tuple(
            strategy
            for strategy in get_args(Strategy)
            if strategy != "local" and (strategy != "tree" or topology.num_hosts > 1)
        )
        """Those that there are between ranks."""
        self._even: dict[int, list[tuple[Strategy, Sent, list[Leg]]]] = {}

    @classmethod
    def of(
        cls,
        spec: "ModelSpec",
        rates: Rates,
        topology: Topology = ONE_HOST,
        *,
        joins: bool = False,
    ) -> Self:
        parameters = spec.num_active_parameters
        return cls(KVShape.of(spec), parameters, rates, topology, joins=joins)

    @property
    def base_seconds(self) -> float:
        """What a step takes before its first token: its fixed cost, and all weights read once."""
        return self._base

    def predict(self, strategy: Strategy, shards: Sequence[Shard]) -> Prediction:
        """What a segment costs with a strategy, if nothing else is in the step."""
        return self.predict_each((strategy,), shards)[strategy]

    def predict_each(
        self, strategies: Iterable[Strategy], shards: Sequence[Shard]
    ) -> dict[Strategy, Prediction]:
        """What a segment costs with each of some strategies."""
        ranks = [shard.rank for shard in shards]
        asking = _asking(shards)
        attention: dict[bool, list[tuple[float, float]]] = {}
        predicted = {}
        for strategy in strategies:
            here = computes_own(strategy)
            if here not in attention:
                attention[here] = self._attention.seconds(here, shards)
            calls, legs = self._exchange(strategy, ranks, asking)
            sent, carried = self._bytes(strategy, shards)
            seconds = max(
                own + rest + sum(leg.exposed(load, own, rest) for leg in legs)
                for (own, rest), load in zip(attention[here], carried, strict=True)
            )
            near, far = (self.shape.num_layers * sum(kind) for kind in zip(*sent, strict=True))
            predicted[strategy] = Prediction(seconds, calls, Sent(near, far))
        return predicted

    def step_seconds(self, segments: Iterable[Segment]) -> dict[int, float]:
        """Each rank's part of a step: everything in which it has a share.

        Segments of one strategy travel together, so their latency is counted once, for pass-KV
        once for each ring. A rank that only holds keys of others' queries reads no weights. Shards
        are as the engine plans them: see `sent_bytes` and `seen_keys`.
        """
        parts: dict[int, _Part] = {}
        for segment in segments:
            shards = segment.shards
            if len(shards) == 1 and shards[0].num_queries == 1:  # most by far
                part = parts.get(shards[0].rank) or parts.setdefault(shards[0].rank, _Part())
                part.tokens += 1
                part.local += self._attention.of_one(shards[0].cached + 1)
            else:
                self._count(segment, parts)
        return {
            rank: (self._base if part.tokens else self.rates.step_seconds)
            + self._token * part.tokens
            + part.local
            + sum(shared.seconds(part.local) for shared in part.shared.values())
            for rank, part in parts.items()
        }

    def _count(self, segment: Segment, parts: dict[int, _Part]) -> None:
        shards, strategy = segment.shards, segment.strategy
        ranks = tuple(shard.rank for shard in shards)
        attention = self._attention.seconds(computes_own(strategy), shards)
        for rank in ranks:
            parts.setdefault(rank, _Part())
        for shard in shards:
            parts[shard.rank].tokens += shard.num_queries
        if len(shards) == 1:
            parts[ranks[0]].local += sum(attention[0])
            return
        key = strategy, ranks if strategy == "pass_kv" else ()
        legs = self._exchange(strategy, ranks, _asking(shards))[1]
        _, carried = self._bytes(strategy, shards)
        for rank, (own, rest), (near, far) in zip(ranks, attention, carried, strict=True):
            shared = parts[rank].shared.setdefault(key, Shared(legs))
            shared.own += own
            shared.rest += rest
            shared.near += near
            shared.far += far

    def _bytes(self, strategy: Strategy, shards: Sequence[Shard]) -> tuple[list[Sent], list[Sent]]:
        """What each rank sends in a layer, and what its links take time for (`carried_bytes`)."""
        sent = sent_bytes(strategy, shards, self.shape, self.topology)
        return sent, carried_bytes(sent, strategy, shards, self.shape, self.topology)

    def _exchange(
        self, strategy: Strategy, ranks: Sequence[int], asking: Sequence[int] | None = None
    ) -> tuple[Calls, list[Leg]]:
        """How an exchange goes between these ranks. Two ranks need no all-to-all."""
        one = strategy == "pass_kv" or len(ranks) == 2
        link = self.rates.hop if one else self.rates.exchange
        calls = num_calls(strategy, ranks, self.topology, asking)
        if not sum(calls):
            return calls, []
        near, far = link(self._inside), link("network")
        handling = self.rates.attend_seconds
        size, shape, hidden = len(ranks), self.shape, self.hidden
        return calls, legs(strategy, size, calls, near, far, shape, hidden, handling)

    def prefill_seconds(self, new: int, cached: int, degree: int) -> float:
        """What a chunk balanced over `degree` ranks adds to the step of each, in seconds.

        `new` tokens after `cached` ones: `new / degree` of the linear layers,
        `new * cached + new * (new + 1) / 2` pairs shared alike, and the exchange of the strategy
        that is fastest: so more tokens never take less time. Ranks are on as few hosts as can be.
        """
        if new < 1:
            return 0.0
        return _fastest(self._curves(cached, degree), new)

    def tokens_within(self, seconds: float, cached: int, degree: int) -> int:
        """The most new tokens whose `prefill_seconds` are no more than `seconds`."""
        found = self._curves(cached, degree)
        most = max(min(curve.inverse(seconds) for curve in curves) for curves in found)
        tokens = max(int(most), 0)
        # The root is rounded.
        if tokens and _fastest(found, tokens) > seconds:
            return tokens - 1
        return tokens + (_fastest(found, tokens + 1) <= seconds)

    def _curves(self, cached: int, degree: int) -> list[list[Curve]]:
        """Seconds of a chunk with each strategy: the highest of several curves.

        Attention is the higher of computing and of reading: all keys once, or where queries travel
        a rank's own keys for each of the ranks.
        """
        attend, pair, key = self._attention
        start, square = attend * degree, pair / (2 * degree)
        linear = Curve(0.0, self._token / degree, 0.0)
        computing = Curve(square, square * (2 * cached + 1), start)
        reading = Curve(0.0, key, start + key * cached)
        found = []
        for strategy, sent, strategy_legs in self._even_exchanges(degree):
            travelling = cached if strategy in KEYS_TRAVEL else 0
            options = [leg.curves(sent, travelling, degree) for leg in strategy_legs]
            curves = []
            for messages in product(*options):
                whole, part = linear, 1.0
                for curve, hidden in messages:
                    whole, part = whole.plus(curve), part - hidden
                curves += [whole.plus(one.times(max(part, 0.0))) for one in (computing, reading)]
            found.append(curves)
        return found

    def _even_exchanges(self, degree: int) -> list[tuple[Strategy, Sent, list[Leg]]]:
        """The exchanges of a chunk that is even over the first so many ranks.

        What the slowest rank's links carry if one token of each rank travels.
        """
        if degree == 1:
            return [("local", Sent(0, 0), [])]
        if degree not in self._even:
            runs = [(Run(rank, 1),) for rank in range(degree)]
            shards = [Shard(rank, run, 0, run) for rank, run in enumerate(runs)]
            self._even[degree] = []
            for strategy in self.strategies:
                _, found = self._exchange(strategy, range(degree))
                _, carried = self._bytes(strategy, shards)
                most = max(carried, key=lambda one: sum(leg.seconds(one) for leg in found))
                self._even[degree].append((strategy, most, found))
        return self._even[degree]

    def decode_seconds(self, keys: Sequence[int]) -> float:
        """What one decode token adds, with so many keys of its request on each holder.

        On one holder that is all; else the slowest holder's attention, and in every layer a pass-Q
        exchange with each of the others, behind which nothing is computed, and whose answers are
        merged, unless ranks decode jointly.
        """
        seconds = self._token + self._attention.of_one(max(keys))
        size = len(keys)
        if size == 1:
            return seconds
        if self.joins:
            return seconds
        link = self._link(size, one=size == 2)
        sent = self.shape.query_bytes * (size - 1) / link.bytes
        merging = self._attention.attend * (size - 1)
        return seconds + merging + self.shape.num_layers * (2 * link.seconds + sent)

    def move_seconds(self, tokens: int) -> float:
        """Copying so many tokens' keys and values of all layers to another rank, in one message."""
        if tokens < 1:
            return 0.0
        link = self._link(self.topology.num_ranks, one=True)
        return link.seconds + self.shape.token_bytes * tokens / link.bytes

    def _link(self, size: int, one: bool) -> LinkRates:
        """What joins so many ranks, on as few hosts as can be."""
        kind: Link = self._inside if size <= self._host_size else "network"
        return self.rates.hop(kind) if one else self.rates.exchange(kind)


def _fastest(found: Sequence[Sequence[Curve]], new: int) -> float:
    """Seconds of so many tokens, at least 1, with the strategy that is fastest for them."""
    return min(max(curve.at(new) for curve in curves) for curves in found)
