"""What a step takes on each rank, defined plainly: one rank and one pair of shards at a time."""

from collections.abc import Sequence
from typing import NamedTuple

from longspan.cost.model import Rates
from longspan.cost.strategy import KVShape, num_calls
from longspan.plan import Segment, Shard
from longspan.topology import Topology


class PlainCost(NamedTuple):
    """The time of steps by the formulas of the cost model, which is made of the same three."""

    shape: KVShape
    num_active_parameters: int
    rates: Rates

    def step_seconds(self, segments: Sequence[Segment]) -> dict[int, float]:
        ranks = {shard.rank for segment in segments for shard in segment.shards}
        return {rank: self.rank_seconds(rank, segments) for rank in ranks}

    def rank_seconds(self, rank: int, segments: Sequence[Segment]) -> float:
        """Fixed cost, weights, tokens, attention, bytes and latencies of one rank, added up."""
        weights, layers, rates = self.num_active_parameters, self.shape.num_layers, self.rates
        own = [one for one in segments if any(shard.rank == rank for shard in one.shards)]
        tokens = sum(segment.shard(rank).num_queries for segment in own)
        sent = sum(sent_bytes(segment, rank, self.shape) for segment in own)
        calls = {}
        for segment in own:
            ring = tuple(shard.rank for shard in segment.shards)
            if len(ring) > 1:
                key = segment.strategy, ring if segment.strategy == "pass_kv" else ()
                one_host = Topology.of_hosts([1 + ring[-1]])
                calls[key] = num_calls(segment.strategy, ring, one_host).near
        seconds = rates.step_seconds
        if tokens:
            seconds += weights * self.shape.itemsize / rates.memory_bytes
        seconds += 2 * weights * tokens / rates.linear_flops
        seconds += sum(self.attention_seconds(rank, segment) for segment in own)
        seconds += layers * sent / rates.link_bytes
        return seconds + layers * rates.link_seconds * sum(calls.values())

    def attention_seconds(self, rank: int, segment: Segment) -> float:
        """One rank's queries over all keys; for pass-Q and tree, all ranks' over its keys."""
        shape, own, shards = self.shape, (segment.shard(rank),), segment.shards
        by_queries = segment.strategy in ("pass_q", "tree")
        asking, holding = (shards, own) if by_queries else (own, shards)
        if not any(shard.num_queries for shard in asking):
            return 0.0
        pairs = sum(num_pairs(query, key) for query in asking for key in holding)
        keys = sum(shard.num_keys for shard in holding)
        computing = 4 * shape.num_heads * shape.head_dim * pairs / self.rates.attention_flops
        return shape.num_layers * max(computing, shape.key_bytes * keys / self.rates.memory_bytes)


def num_pairs(asking: Shard, holding: Shard) -> int:
    """Pairs of a query of one shard and a key of the other at the same position or before it."""
    positions = [query for run in asking.queries for query in range(run.start, run.end)]
    return asking.num_queries * holding.cached + sum(
        min(max(query - run.start + 1, 0), run.length)
        for query in positions
        for run in holding.keys
    )


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
