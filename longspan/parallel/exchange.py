"""One exchange: the segments of a step that share one strategy, in one layer, on one rank."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longspan.attention.kernel import Kernel
from longspan.attention.state import AttentionState
from longspan.parallel.blockwise import Blocks, attend
from longspan.parallel.ring import Ring
from longspan.parallel.routes import Routes
from longspan.parallel.tiles import Tile, tiles
from longspan.parallel.transport import Message, Transport, Wait
from longspan.plan import Segment

Job = Generator[None, None, list[AttentionState]]
"""A strategy at work: it yields once, when its first messages are under way, so that the caller
can compute meanwhile, and returns a state for each segment's own queries."""


class Exchange:
    """What this rank knows of the segments before any layer runs: sizes and who sees what.

    It is worked out at first use and serves every layer of the step. `segments` are all those of
    the strategy in which this rank has a share; for pass-KV, whose keys pass through ranks that
    may have no use for them, all ranks of the ring must have the same segments.
    """

    def __init__(self, segments: Sequence[Segment], transport: Transport) -> None:
        self.segments = segments
        self.transport = transport
        self.rank = transport.rank
        self._tiles: dict[tuple[int, int, int], list[Tile]] = {}
        self._seeing: dict[tuple[int, int], list[int]] = {}

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks with a share in any of the segments, ascending."""
        return sorted({shard.rank for segment in self.segments for shard in segment.shards})

    @cached_property
    def others(self) -> list[int]:
        return [rank for rank in self.ranks if rank != self.rank]

    @cached_property
    def ring(self) -> Ring:
        """pass-KV's way of keys."""
        return Ring(self.segments, self.ranks, self.transport.topology.hosts, self.rank)

    @cached_property
    def direct_routes(self) -> Routes:
        """pass-Q's way of queries: every rank is asked by itself."""
        return Routes(self.segments, self.rank, range(self.transport.size))

    @cached_property
    def host_routes(self) -> Routes:
        """tree's way of queries: every host is asked by itself."""
        return Routes(self.segments, self.rank, self.transport.topology.hosts)

    def num_queries(self, index: int, rank: int) -> int:
        return self.segments[index].shard(rank).num_queries

    def num_keys(self, index: int, rank: int) -> int:
        return self.segments[index].shard(rank).num_keys

    def seeing(self, queries_on: int, keys_on: int) -> list[int]:
        """The segments with queries on one rank and keys on another, by index."""
        key = (queries_on, keys_on)
        if key not in self._seeing:
            self._seeing[key] = [
                index
                for index in range(len(self.segments))
                if self.num_queries(index, queries_on) and self.num_keys(index, keys_on)
            ]
        return self._seeing[key]

    def count_keys(self, indices: Sequence[int], rank: int) -> int:
        """How many tokens' keys of some segments a rank has."""
        return sum(self.num_keys(index, rank) for index in indices)

    def tiles(self, index: int, queries_on: int, keys_on: int) -> list[Tile]:
        key = (index, queries_on, keys_on)
        if key not in self._tiles:
            segment = self.segments[index]
            self._tiles[key] = tiles(segment.shard(queries_on), segment.shard(keys_on))
        return self._tiles[key]


@dataclass(frozen=True)
class LayerExchange:
    """An exchange in one layer: this rank's tensors of each segment, and the arithmetic on them.

    `queries[i]` is [T_i, H, D]; `keys[i]` the blocks [2, G, S, D] of this rank's share; empty
    tensors where the rank has none. `like` is any tensor of the messages' dtype and device.
    """

    exchange: Exchange
    queries: Sequence[Tensor]
    keys: Sequence[Blocks]
    kernel: Kernel
    scale: float
    shape: tuple[int, int, int]
    like: Tensor

    def send(self, label: str, sends: Sequence[Message], receives: Sequence[Message]) -> Wait:
        return self.exchange.transport.exchange(label, sends, receives)

    def empty_states(self) -> list[AttentionState]:
        return [self.empty_state(len(q)) for q in self.queries]

    def empty_state(self, tokens: int) -> AttentionState:
        heads, _, head_dim = self.shape
        return AttentionState.empty(tokens, heads, head_dim, self.like.device)

    def empty_queries(self, tokens: int) -> Tensor:
        heads, _, head_dim = self.shape
        return self.like.new_empty(tokens, heads, head_dim)

    def empty_packed_states(self, tokens: int) -> Tensor:
        """Room for states as they travel: `out` and `lse` side by side, float32."""
        heads, _, head_dim = self.shape
        return self.like.new_empty(tokens, heads, head_dim + 1, dtype=torch.float32)

    def key_numbers(self, tokens: int) -> int:
        """How many numbers the keys and values of so many tokens are."""
        _, kv_heads, head_dim = self.shape
        return tokens * 2 * kv_heads * head_dim

    def empty_keys(self, tokens: int) -> Tensor:
        """Room for the packed keys and values of so many tokens: flat, as they travel."""
        return self.like.new_empty(self.key_numbers(tokens))

    def pack_keys(self, indices: Sequence[int]) -> Tensor:
        """This rank's keys and values of some segments, one [2, G, S, D] after the other, flat."""
        origin = self.exchange.rank
        packed = self.empty_keys(self.exchange.count_keys(indices, origin))
        for index, part in zip(indices, self._unpack(packed, indices, origin), strict=True):
            torch.cat(tuple(self.keys[index]), dim=2, out=part)
        return packed

    def cut(
        self, packed: Tensor, origin: int, indices: Sequence[int], rest: Sequence[int]
    ) -> Tensor:
        """What remains of packed keys of the segments `indices`: those of `rest`, in its order."""
        if rest == indices[: len(rest)]:
            return packed[: self.key_numbers(self.exchange.count_keys(rest, origin))]
        parts = dict(zip(indices, self._unpack(packed, indices, origin), strict=True))
        return torch.cat([parts[index].flatten() for index in rest])

    def attend(
        self,
        index: int,
        state: AttentionState,
        q: Tensor,
        queries_on: int,
        keys: Blocks,
        keys_on: int,
    ) -> None:
        """Merge one segment's attention into `state`: queries of one rank, keys of another."""
        found = self.exchange.tiles(index, queries_on, keys_on)
        attend(state, q, keys, found, self.kernel, self.scale)

    def absorb_own(self, states: Sequence[AttentionState]) -> None:
        """Merge attention of this rank's queries over its own keys into `states`."""
        rank = self.exchange.rank
        for index in self.exchange.seeing(rank, rank):
            q = self.queries[index]
            self.attend(index, states[index], q, rank, self.keys[index], rank)

    def absorb_block(
        self, states: Sequence[AttentionState], block: Tensor, indices: Sequence[int], origin: int
    ) -> None:
        """Merge attention over another rank's packed keys of the segments `indices`."""
        rank = self.exchange.rank
        for index, keys in zip(indices, self._unpack(block, indices, origin), strict=True):
            if len(self.queries[index]):
                self.attend(index, states[index], self.queries[index], rank, [keys], origin)

    def _unpack(self, packed: Tensor, indices: Sequence[int], origin: int) -> list[Tensor]:
        """Views [2, G, S, D] of each segment's keys from one rank in a packed message."""
        _, kv_heads, head_dim = self.shape
        tokens = [self.exchange.num_keys(index, origin) for index in indices]
        parts = torch.split(packed, [self.key_numbers(count) for count in tokens])
        return [
            part.view(2, kv_heads, count, head_dim)
            for part, count in zip(parts, tokens, strict=True)
        ]
