"""How long attention takes on one rank, over all layers. Pure Python."""

from collections.abc import Sequence
from typing import NamedTuple

from longspan.cost.strategy import seen_keys
from longspan.plan import Shard, Strategy

KEYS_TRAVEL: frozenset[Strategy] = frozenset(("pass_kv", "gather_kv"))
"""Strategies in which a rank computes its own queries; in the others queries travel."""


def computes_own(strategy: Strategy) -> bool:
    """Whether a rank computes its own queries, be it with keys that come from others."""
    return strategy == "local" or strategy in KEYS_TRAVEL


class AttentionCost(NamedTuple):
    """Seconds of a part (a segment's queries over one rank's keys), a pair, and a key that is read.

    A pair is a query and a key that it sees.
    """

    attend: float
    pair: float
    key: float

    def seconds(self, here: bool, shards: Sequence[Shard]) -> list[tuple[float, float]]:
        """Each rank's seconds of attention: its queries over its keys, and all other.

        The other is of its own queries, or where they travel, not `here`, of others' over its keys,
        which it reads again for each rank that asks.
        """
        seen = seen_keys("pass_kv" if here else "pass_q", shards)
        asked = [shard.num_queries for shard in shards]
        held = [shard.num_keys for shard in shards]
        num_asking, num_holding = sum(map(bool, asked)), sum(map(bool, held))
        seconds = []
        for shard, queries, keys, (pairs, _) in zip(shards, asked, held, seen, strict=True):
            inside = queries * shard.cached + queries * (queries + 1) // 2
            own = self._part(1, inside, keys) if queries else 0.0
            if here:
                times, reads = num_holding - bool(keys), sum(held) - keys
                rest = self._part(times, pairs - inside, reads) if queries else 0.0
            else:
                times = num_asking - bool(queries)
                rest = self._part(times, pairs - inside, times * keys) if keys else 0.0
            seconds.append((own, rest))
        return seconds

    def of_one(self, keys: int) -> float:
        """One query over so many keys of its own rank."""
        return self.attend + max(self.pair, self.key) * keys

    def _part(self, times: int, pairs: int, keys: int) -> float:
        """Attention in so many parts: pairs of a query and a key that it sees, keys read."""
        return self.attend * times + max(self.pair * pairs, self.key * keys)
