"""What each strategy sends, and which one a step takes. Pure Python."""

from collections.abc import Sequence
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
        return self.num_heads * (self.head_dim * self.itemsize + self.head_dim * 4 + 4)


def exchanged_bytes(strategy: Strategy, shards: Sequence[Shard], shape: KVShape) -> int:
    """Bytes that all ranks together send for one segment in one layer.

    For even shards over R ranks these are the known formulas (arXiv 2411.01783, table 2): a rank
    sends `(R - 1) * S / R` keys, or `(R - 1) * T / R` queries and as many states.
    """
    if strategy == "local":
        return 0
    asking = [shard for shard in shards if shard.num_queries]
    holding = [shard for shard in shards if shard.num_keys]
    if strategy == "pass_q":
        pairs = sum(
            query.num_queries for query in asking for key in holding if query.rank != key.rank
        )
        return pairs * shape.query_bytes
    if strategy == "gather_kv":
        pairs = sum(key.num_keys for query in asking for key in holding if query.rank != key.rank)
        return pairs * shape.key_bytes
    ring = sorted(shard.rank for shard in shards)
    hops = sum(key.num_keys * _reach(key.rank, asking, ring) for key in holding)
    return hops * shape.key_bytes


def choose(shards: Sequence[Shard], shape: KVShape) -> Strategy:
    """The strategy that sends the fewest bytes.

    That is pass-KV for many new tokens per cached one and pass-Q for few: for even shards queries
    are smaller when `T / S < key_bytes / query_bytes`. Overlap and latency are not weighed yet.
    """
    if len(shards) == 1:
        return "local"
    pass_kv = exchanged_bytes("pass_kv", shards, shape)
    return "pass_q" if exchanged_bytes("pass_q", shards, shape) < pass_kv else "pass_kv"


def _reach(origin: int, asking: Sequence[Shard], ring: list[int]) -> int:
    start = ring.index(origin)
    return max((ring.index(shard.rank) - start) % len(ring) for shard in asking)
