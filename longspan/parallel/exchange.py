"""One exchange: the segments of a step that share one strategy, in one layer, on one rank."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longspan.attention.kernel import Kernel
from longspan.attention.state import AttentionState
from longspan.attention.work import MIN_VIEW_KEYS, Share, Work
from longspan.parallel.ring import Ring
from longspan.parallel.routes import Question, Routes
from longspan.parallel.tiles import tiles
from longspan.parallel.transport import Message, Transport, Wait
from longspan.plan import Segment

Job = Generator[None, None, list[AttentionState]]
"""A strategy at work: it yields once, when its first messages are under way, so that the caller
can compute meanwhile, and returns a state for each segment's own queries."""


class Exchange:
    """What this rank knows of the segments before any layer runs: sizes and who sees what.

    It is worked out at first use and serves every layer of the step. `segments` are all those of
    the strategy in which this rank has a share; for pass-KV, whose keys pass through ranks that
    may have no use for them, all ranks of the ring must have the same segments. `ranges` say for
    each segment where this rank's keys lie among those that it attends to.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        transport: Transport,
        ranges: Sequence[Sequence[slice]],
    ) -> None:
        self.segments = segments
        self.ranges = ranges
        self.transport = transport
        self.rank = transport.rank
        self._work_here: dict[tuple[Question, ...], Work] = {}
        self._work_on_block: dict[tuple[int, int], Work] = {}
        self._seeing: dict[tuple[int, int], list[int]] = {}
        self._slots: dict[int, Tensor] = {}

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

    @cached_property
    def own_questions(self) -> list[Question]:
        """This rank's queries of all segments, as they lie one after the other."""
        return [(self.rank, index) for index in range(len(self.segments))]

    def sizes(self, questions: Sequence[Question]) -> list[int]:
        """How many queries each has."""
        return [self.num_queries(index, rank) for rank, index in questions]

    def work_here(self, questions: Sequence[Question]) -> Work:
        """Queries that lie one after the other over this rank's keys of their segments."""
        key = tuple(questions)
        if key not in self._work_here:
            shares, row = [], 0
            for rank, index in questions:
                segment = self.segments[index]
                queries, keys = segment.shard(rank), segment.shard(self.rank)
                if queries.num_queries and keys.num_keys:
                    shares.append(Share(row, tiles(queries, keys), self.ranges[index]))
                row += queries.num_queries
            self._work_here[key] = Work(shares)
        return self._work_here[key]

    def work_on_block(self, index: int, keys_on: int) -> Work:
        """One segment's queries of this rank over its keys of another, which have travelled."""
        key = (index, keys_on)
        if key not in self._work_on_block:
            queries, keys = (self.segments[index].shard(rank) for rank in (self.rank, keys_on))
            share = Share(0, tiles(queries, keys), [slice(0, keys.num_keys)])
            self._work_on_block[key] = Work([share])
        return self._work_on_block[key]

    def copy_own(self, index: int, kv: Tensor, to: Tensor) -> None:
        """Copy this rank's keys and values of one segment, which lie in kv, to [2, G, S, D]."""
        ranges = self.ranges[index]
        if len(ranges) == 1 or self.num_keys(index, self.rank) >= MIN_VIEW_KEYS * len(ranges):
            torch.cat([kv[:, :, place] for place in ranges], dim=2, out=to)
            return
        if index not in self._slots:
            slots = [torch.arange(place.start, place.stop) for place in ranges]
            self._slots[index] = torch.cat(slots).to(kv.device)
        torch.index_select(kv, 2, self._slots[index], out=to)


@dataclass(frozen=True)
class LayerExchange:
    """An exchange in one layer: this rank's tensors of each segment, and the arithmetic on them.

    `queries[i]` is [T_i, H, D] of each segment, empty where the rank has none; `kv` [2, G, N, D]
    has this rank's keys and values of all of them, at the exchange's `ranges`.
    """

    exchange: Exchange
    queries: Sequence[Tensor]
    kv: Tensor
    kernel: Kernel
    scale: float

    def send(self, label: str, sends: Sequence[Message], receives: Sequence[Message]) -> Wait:
        return self.exchange.transport.exchange(label, sends, receives)

    def parts(self, state: AttentionState, questions: Sequence[Question]) -> list[AttentionState]:
        """A state of queries that lie one after the other, as views of each question's."""
        ends = [0, *accumulate(self.exchange.sizes(questions))]
        return [state[first:last] for first, last in pairwise(ends)]

    def own_states(self) -> tuple[AttentionState, list[AttentionState]]:
        """Empty states of this rank's queries: of all, and views of each segment's."""
        state = self.empty_state(sum(len(q) for q in self.queries))
        return state, self.parts(state, self.exchange.own_questions)

    def empty_state(self, tokens: int) -> AttentionState:
        _, heads, head_dim = self.queries[0].shape
        return AttentionState.empty(tokens, heads, head_dim, self.kv.device)

    def empty_queries(self, tokens: int) -> Tensor:
        like = self.queries[0]
        return like.new_empty(tokens, *like.shape[1:])

    def empty_packed_states(self, tokens: int) -> Tensor:
        """Room for states as they travel: `out` and `lse` side by side, float32."""
        _, heads, head_dim = self.queries[0].shape
        return self.kv.new_empty(tokens, heads, head_dim + 1, dtype=torch.float32)

    def key_numbers(self, tokens: int) -> int:
        """How many numbers the keys and values of so many tokens are."""
        _, kv_heads, _, row = self.kv.shape
        return tokens * 2 * kv_heads * row

    def empty_keys(self, tokens: int) -> Tensor:
        """Room for the packed keys and values of so many tokens: flat, as they travel."""
        return self.kv.new_empty(self.key_numbers(tokens))

    def pack_keys(self, indices: Sequence[int]) -> Tensor:
        """This rank's keys and values of some segments, one [2, G, S, D] after the other, flat."""
        origin = self.exchange.rank
        packed = self.empty_keys(self.exchange.count_keys(indices, origin))
        for index, part in zip(indices, self._unpack(packed, indices, origin), strict=True):
            self.exchange.copy_own(index, self.kv, part)
        return packed

    def cut(
        self, packed: Tensor, origin: int, indices: Sequence[int], rest: Sequence[int]
    ) -> Tensor:
        """What remains of packed keys of the segments `indices`: those of `rest`, in its order."""
        if rest == indices[: len(rest)]:
            return packed[: self.key_numbers(self.exchange.count_keys(rest, origin))]
        parts = dict(zip(indices, self._unpack(packed, indices, origin), strict=True))
        return torch.cat([parts[index].flatten() for index in rest])

    def attend(self, state: AttentionState, q: Tensor, questions: Sequence[Question]) -> None:
        """Merge attention of some queries over this rank's keys, all in one call."""
        self.kernel(state, q, self.kv, self.exchange.work_here(questions), scale=self.scale)

    def absorb_own(self, state: AttentionState) -> None:
        """Merge attention of this rank's queries over its own keys into the state of all."""
        self.attend(state, joined(self.queries), self.exchange.own_questions)

    def absorb_block(
        self, states: Sequence[AttentionState], block: Tensor, indices: Sequence[int], origin: int
    ) -> None:
        """Merge attention over another rank's packed keys of the segments `indices`."""
        for index, kv in zip(indices, self._unpack(block, indices, origin), strict=True):
            q = self.queries[index]
            if len(q):
                work = self.exchange.work_on_block(index, origin)
                self.kernel(states[index], q, kv, work, scale=self.scale)

    def _unpack(self, packed: Tensor, indices: Sequence[int], origin: int) -> list[Tensor]:
        """Views [2, G, S, D] of each segment's keys from one rank in a packed message."""
        _, kv_heads, _, row = self.kv.shape
        tokens = [self.exchange.num_keys(index, origin) for index in indices]
        parts = torch.split(packed, [self.key_numbers(count) for count in tokens])
        return [
            part.view(2, kv_heads, count, row) for part, count in zip(parts, tokens, strict=True)
        ]


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))
