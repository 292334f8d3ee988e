"""What each strategy computes and sends, and which one a step takes. Pure Python."""

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Self

from longspan.plan import Shard, Strategy

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


def sent_bytes(strategy: Strategy, shards: Sequence[Shard], shape: KVShape) -> list[int]:
    """Bytes that each rank sends for one segment in one layer; together `exchanged_bytes`.

    Shards are in the order of their ranks.
    """
    if strategy == "local":
        return [0] * len(shards)
    asked = [shard.num_queries for shard in shards]
    held = [shard.num_keys for shard in shards]
    if strategy == "pass_q":
        new, holders = sum(asked), sum(1 for keys in held if keys)
        return [
            queries * (holders - bool(keys)) * shape.asked_bytes
            + (new - queries if keys else 0) * shape.answered_bytes
            for queries, keys in zip(asked, held, strict=True)
        ]
    if strategy == "gather_kv":
        askers = sum(1 for queries in asked if queries)
        return [
            keys * (askers - bool(queries)) * shape.key_bytes
            for queries, keys in zip(asked, held, strict=True)
        ]
    return [keys * shape.key_bytes for keys in _passed_on(asked, held)]


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


def num_calls(strategy: Strategy, size: int) -> int:
    """How many exchanges a segment over `size` ranks takes in one layer, one after the other."""
    if size == 1:
        return 0
    return {"local": 0, "pass_kv": size - 1, "gather_kv": 1, "pass_q": 2}[strategy]


def choose(shards: Sequence[Shard], shape: KVShape) -> Strategy:
    """The strategy that sends the fewest bytes.

    That is pass-KV for many new tokens per cached one and pass-Q for few: for even shards queries
    are smaller when `T / S < key_bytes / query_bytes`. Overlap and latency are not weighed yet.
    """
    if len(shards) == 1:
        return "local"
    pass_kv = exchanged_bytes("pass_kv", shards, shape)
    return "pass_q" if exchanged_bytes("pass_q", shards, shape) < pass_kv else "pass_kv"
