"""What each strategy computes and sends. Pure Python."""

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Self

from longspan.plan import Shard, Strategy
from longspan.topology import Topology

if TYPE_CHECKING:
    from longspan.models import ModelSpec

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVShape(NamedTuple):
    """Sizes of a model's attention: layers, heads, and bytes of one number of its type."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int

    @classmethod
    def of(cls, spec: "ModelSpec") -> Self:
        itemsize = _ITEMSIZE[spec.dtype]
        return cls(spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, itemsize)

    @property
    def token_bytes(self) -> int:
        """One token's keys and values in all layers."""
        return self.num_layers * self.key_bytes

    @property
    def key_bytes(self) -> int:
        """One token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def query_bytes(self) -> int:
        """One token's query out in the model's type, its `out` and `lse` back in float32."""
        return self.asked_bytes + self.answered_bytes

    @property
    def asked_bytes(self) -> int:
        """One token's query in one layer."""
        return self.num_heads * self.head_dim * self.itemsize

    @property
    def answered_bytes(self) -> int:
        """One token's state in one layer, `out` and `lse`."""
        return self.num_heads * (self.head_dim + 1) * 4


def exchanged_bytes(strategy: Strategy, shards: Sequence[Shard], shape: KVShape) -> int:
    """Bytes that all ranks together send for one segment in one layer.

    For even shards over R ranks these are the known formulas (arXiv 2411.01783, table 2): a rank
    sends `(R - 1) * S / R` keys, or `(R - 1) * T / R` queries and as many states.
    """
    if strategy == "local":
        return 0
    ring = sorted(shards, key=attrgetter("rank"))
    asked = [shard.num_queries for shard in ring]
    held = [shard.num_keys for shard in ring]
    if strategy == "pass_q":
        at_home = sum(queries for queries, keys in zip(asked, held, strict=True) if keys)
        holders = sum(1 for keys in held if keys)
        return (sum(asked) * holders - at_home) * shape.query_bytes
    if strategy == "gather_kv":
        at_home = sum(keys for queries, keys in zip(asked, held, strict=True) if queries)
        askers = sum(1 for queries in asked if queries)
        return (sum(held) * askers - at_home) * shape.key_bytes
    hops, last = 0, max(place for place, queries in enumerate(asked) if queries)
    for place, keys in enumerate(held):  # a block goes on to the last rank that asks before it
        hops += keys * ((last - place) % len(ring))
        if asked[place]:
            last = place
    return hops * shape.key_bytes


class Sent(NamedTuple):
    """Bytes that one rank sends in one layer: to ranks of its own host, and to other hosts."""

    near: int
    far: int


class Calls(NamedTuple):
    """Exchanges of one layer, one after the other: inside a host, and between hosts."""

    near: int
    far: int


def sent_bytes(
    strategy: Strategy, shards: Sequence[Shard], shape: KVShape, topology: Topology
) -> list[Sent]:
    """Bytes that each rank sends for one segment in one layer; together `exchanged_bytes`.

    Shards are in the order of their ranks.
    """
    size = len(shards)
    asked = [shard.num_queries for shard in shards]
    held = [shard.num_keys for shard in shards]
    sent = [[0, 0] for _ in shards]

    def send(source: int, target: int, number: int) -> None:
        far = topology.link(shards[source].rank, shards[target].rank) == "network"
        sent[source][far] += number

    if strategy == "pass_kv":
        for place, keys in enumerate(_passed_on(asked, held)):
            send(place, (place + 1) % size, keys * shape.key_bytes)
    elif strategy != "local":
        for source in range(size):
            for target in range(size):
                if source != target and strategy == "gather_kv" and asked[target]:
                    send(source, target, held[source] * shape.key_bytes)
                elif source != target and strategy == "pass_q":
                    send(source, target, asked[source] * shape.asked_bytes * bool(held[target]))
                    send(source, target, asked[target] * shape.answered_bytes * bool(held[source]))
    return [Sent(near, far) for near, far in sent]


def _passed_on(asked: Sequence[int], held: Sequence[int]) -> list[int]:
    """Keys that each rank sends to the next in a ring: a block goes as far as the last query."""
    size = len(held)
    last = max(place for place, queries in enumerate(asked) if queries)
    # By how much more keys are sent at a place than at the one before. The ring is laid out twice,
    # so that a block that goes past its end needs no other care.
    change = [0] * (2 * size)
    for place, keys in enumerate(held):
        change[place] += keys
        change[place + (last - place) % size] -= keys
        if asked[place]:
            last = place
    sent = list(accumulate(change))
    return [first + second for first, second in zip(sent[:size], sent[size:], strict=True)]


def seen_keys(strategy: Strategy, shards: Sequence[Shard]) -> list[tuple[int, int]]:
    """Pairs of a query and a key it sees that each rank computes for a segment; keys it reads.

    They are of its queries and all keys; for pass-Q, of all queries and its keys. The segment's
    new tokens are consecutive, and a rank that has the query of one has its key.
    """
    start = min(shard.queries[0].start for shard in shards if shard.queries)
    asked = [shard.num_queries for shard in shards]
    new, cached = sum(asked), sum(shard.cached for shard in shards)
    seen = []
    for shard, queries in zip(shards, asked, strict=True):
        if strategy == "pass_q":
            pairs = new * shard.cached
            for run in shard.keys:  # the last key of a run is seen by so many queries more
                later = start + new - run.start - run.length
                pairs += run.length * later + run.length * (run.length + 1) // 2
            seen.append((pairs, shard.cached + queries))
        else:
            pairs = queries * cached
            for run in shard.queries:
                earlier = run.start - start
                pairs += run.length * earlier + run.length * (run.length + 1) // 2
            seen.append((pairs, cached + new if queries else 0))
    return seen


def num_calls(strategy: Strategy, ranks: Sequence[int], topology: Topology) -> Calls:
    """How many exchanges a segment over these ranks takes in one layer, one after the other."""
    size = len(ranks)
    calls = {"local": 0, "pass_kv": size - 1, "gather_kv": 1, "pass_q": 2}[strategy]
    if size == 1:
        return Calls(0, 0)
    far = any(topology.link(ranks[0], rank) == "network" for rank in ranks[1:])
    return Calls(0, calls) if far else Calls(calls, 0)
