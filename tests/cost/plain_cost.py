"""What a step takes on each rank, defined plainly: one rank and one pair of shards at a time."""

from collections.abc import Sequence
from typing import NamedTuple

from longspan.cost.kv_shape import KVShape
from longspan.cost.rates import LinkRates, Rates
from longspan.plan import Segment, Shard


class PlainCost(NamedTuple):
    """The time of steps on one host, by the formulas of the cost model, made of the same three."""

    shape: KVShape
    num_active_parameters: int
    rates: Rates

    def step_seconds(self, segments: Sequence[Segment]) -> dict[int, float]:
        ranks = {shard.rank for segment in segments for shard in segment.shards}
        return {rank: self.rank_seconds(rank, segments) for rank in ranks}

    def rank_seconds(self, rank: int, segments: Sequence[Segment]) -> float:
        """Fixed cost, weights, tokens, local attention, and each exchange with its attention."""
        weights, rates = self.num_active_parameters, self.rates
        own = [one for one in segments if any(shard.rank == rank for shard in one.shards)]
        tokens = sum(segment.shard(rank).num_queries for segment in own)
        seconds = rates.step_seconds
        if tokens:
            seconds += weights * self.shape.itemsize / rates.memory_bytes
        seconds += 2 * weights * tokens / rates.linear_flops
        local = sum(self.attention(rank, one, True) for one in own if len(one.shards) == 1)
        exchanges: dict[object, list[Segment]] = {}
        for segment in own:
            ring = tuple(shard.rank for shard in segment.shards)
            if len(ring) > 1:
                key = segment.strategy, ring if segment.strategy == "pass_kv" else ()
                exchanges.setdefault(key, []).append(segment)
        return seconds + local + sum(self.exchange(rank, g, local) for g in exchanges.values())

    def exchange(self, rank: int, segments: Sequence[Segment], local: float) -> float:
        """Attention of segments that travel together, and what they wait for beside it.

        The first of them says how many ranks there are: latency is taken from it in the model too.
        """
        size, strategy = len(segments[0].shards), segments[0].strategy
        own = sum(self.attention(rank, segment, True) for segment in segments)
        rest = sum(self.attention(rank, segment, False) for segment in segments)
        sent = sum(carried_bytes(segment, rank, self.shape) for segment in segments)
        alone = strategy == "pass_kv" or size == 2
        link = self.rates.hop("host") if alone else self.rates.exchange("host")
        latency, byte = self.shape.num_layers * link.seconds, self.shape.num_layers / link.bytes
        handling = self.shape.num_layers * self.rates.attend_seconds
        merging = handling * (size - 1)
        if strategy == "pass_kv":
            hop = latency + handling + byte * sent / (size - 1)
            waited = (size - 1) * left(hop, (own + rest) / size, link)
        elif strategy == "gather_kv":
            waited = left(latency + byte * sent, own + local, link)
        else:
            out = byte * sent * self.shape.asked_bytes / self.shape.query_bytes
            back = byte * sent * self.shape.answered_bytes / self.shape.query_bytes
            waited = left(latency + out, local, link) + left(latency + merging + back, own, link)
        return own + rest + waited

    def attention(self, rank: int, segment: Segment, own: bool) -> float:
        """A rank's attention of its queries over its own keys, or all other that it computes.

        That is of its queries over the others' keys, or for pass-Q of theirs over its own.
        """
        shape, mine = self.shape, segment.shard(rank)
        others = [shard for shard in segment.shards if shard.rank != rank]
        pairs = [(mine, mine)] if own else [(mine, other) for other in others]
        if segment.strategy in ("pass_q", "tree") and not own:
            pairs = [(other, mine) for other in others]
        pairs = [(query, key) for query, key in pairs if query.num_queries and key.num_keys]
        seen = sum(num_pairs(query, key) for query, key in pairs)
        computing = 4 * shape.num_heads * shape.head_dim * seen / self.rates.attention_flops
        keys = sum(key.num_keys for _, key in pairs)
        reading = shape.key_bytes * keys / self.rates.memory_bytes
        starts = self.rates.attend_seconds * len(pairs)
        return shape.num_layers * (starts + max(computing, reading))


def left(seconds: float, behind: float, link: LinkRates) -> float:
    """What is left of messages that travel while a rank computes."""
    return seconds - link.overlap * min(seconds, behind)


def num_pairs(asking: Shard, holding: Shard) -> int:
    """Pairs of a query of one shard and a key of the other at the same position or before it."""
    positions = [query for run in asking.queries for query in range(run.start, run.end)]
    return asking.num_queries * holding.cached + sum(
        min(max(query - run.start + 1, 0), run.length)
        for query in positions
        for run in holding.keys
    )


def carried_bytes(segment: Segment, rank: int, shape: KVShape) -> int:
    """What one rank sends in one layer; half of what it sends and receives if it gathers."""
    sent, received = sent_bytes(segment, rank, shape), 0
    if segment.strategy != "gather_kv":
        return sent
    if segment.shard(rank).num_queries:
        received = sum(shard.num_keys for shard in segment.shards if shard.rank != rank)
    return (sent + received * shape.key_bytes) // 2


def sent_bytes(segment: Segment, rank: int, shape: KVShape) -> int:
    """What one rank sends in one layer."""
    own = segment.shard(rank)
    others = [shard for shard in segment.shards if shard.rank != rank]
    if segment.strategy == "local":
        return 0
    if segment.strategy in ("pass_q", "tree"):
        asked = own.num_queries * sum(1 for shard in others if shard.num_keys)
        answered = sum(shard.num_queries for shard in others) if own.num_keys else 0
        return asked * shape.asked_bytes + answered * shape.answered_bytes
    if segment.strategy == "gather_kv":
        return own.num_keys * sum(1 for shard in others if shard.num_queries) * shape.key_bytes
    return sum(key.num_keys for key in segment.shards if passes(segment, key.rank, rank)) * (
        shape.key_bytes
    )


def passes(segment: Segment, origin: int, rank: int) -> bool:
    """Whether a rank of a ring sends on the keys of `origin`: if one that asks comes after it."""
    ring = sorted(shard.rank for shard in segment.shards)
    start = ring.index(origin)
    order = ring[start:] + ring[:start]
    return any(segment.shard(after).num_queries for after in order[order.index(rank) + 1 :])
