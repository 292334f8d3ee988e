"""One step of some ranks: which tokens of which requests they compute, and the plans for it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longspan.engine.prefix_cache import Place
from longspan.engine.request import Request, joined
from longspan.plan import (
    MOST_JOINT_ROWS,
    Extent,
    Joint,
    Move,
    Part,
    RankPlan,
    RankResult,
    Run,
    Sampling,
    Segment,
    Shard,
    Strategy,
)


class Chunk(NamedTuple):
    """The new tokens of one request in one step, those before position `end`."""

    request: Request
    end: int
    segment: Segment


def prefill_chunk(
    request: Request,
    runs: Mapping[int, Sequence[Run]],
    choose: Callable[[Request, Sequence[Shard]], Strategy],
) -> Chunk:
    """New tokens on several ranks, each of which has the pages for its own.

    From now on their keys count as held, and the last of them is on the home.
    """
    cached = {rank: holding.tokens for rank, holding in request.holdings.items()}
    shards = tuple(
        Shard(rank, tuple(new), cached[rank], tuple(new))
        for rank in sorted(cached)
        for new in (runs.get(rank, ()),)
    )
    for rank, new in runs.items():
        request.holdings[rank].tokens += sum(run.length for run in new)
    end, request.home = max((new[-1].end, rank) for rank, new in runs.items())
    request.in_flight += 1
    strategy = choose(request, shards)
    draws = end == request.num_tokens
    return Chunk(request, end, Segment(request.request_id, strategy, shards, draws))


def decode_chunk(
    request: Request,
    rank: int,
    position: int,
    choose: Callable[[Request, Sequence[Shard]], Strategy],
) -> Chunk:
    """The next token of a decoding request, on a rank that has the page for its position."""
    new, holdings = (Run(position, 1),), request.holdings
    shards = tuple(
        Shard(holder, new, holding.tokens, new)
        if holder == rank
        else Shard(holder, (), holding.tokens, ())
        for holder, holding in (
            holdings.items() if len(holdings) == 1 else sorted(holdings.items())
        )
    )
    strategy: Strategy = "local" if len(shards) == 1 else choose(request, shards)
    holdings[rank].tokens += 1
    request.home = rank
    request.in_flight += 1
    return Chunk(request, position + 1, Segment(request.request_id, strategy, shards))


class Gathering(NamedTuple):
    """Pages of one request that move to its home in one step: page `indices[i]` to `places[i]`."""

    request: Request
    indices: Sequence[int]
    places: Sequence[Place]


@dataclass(slots=True, eq=False)
class Step:
    """What ranks that have requests in common compute together."""

    chunks: list[Chunk] = field(default_factory=list)
    gatherings: list[Gathering] = field(default_factory=list)
    plans: dict[int, RankPlan] = field(default_factory=dict)
    seconds: float = 0.0
    """How long it is predicted to take."""
    results: dict[int, RankResult] = field(default_factory=dict)

    @property
    def can_be_joint(self) -> bool:
        """Whether it is but one token of each request, of not too many."""
        return len(self.chunks) <= MOST_JOINT_ROWS and all(
            sum(shard.num_queries for shard in chunk.segment.shards) == 1 for chunk in self.chunks
        )

    @property
    def is_joint(self) -> bool:
        return any(plan.joint for plan in self.plans.values())

    def make_joint_plans(self, ranks: tuple[int, ...], number: int) -> None:
        """Tell ranks to compute all of the step together, also those that hold none of its keys."""
        packed: list[int] = []
        samplings: dict[int, list[Sampling]] = {rank: [] for rank in ranks}
        for row, (request, end, segment) in enumerate(self.chunks):
            for run in (run for shard in segment.shards for run in shard.queries):
                packed += request.tokens_of(run)
            if segment.draws:
                assert request.home is not None
                samplings[request.home].append(request.sampling(row, end))
        moves = list(_moves(self.gatherings))
        for rank in ranks:
            parts = (
                Part(segment, request.holdings[rank].extents if rank in request.holdings else ())
                for request, _, segment in self.chunks
            )
            own = tuple(move for move in moves if rank in (move.source, move.target))
            self.plans[rank] = RankPlan(
                tuple(packed), tuple(parts), tuple(samplings[rank]), own, Joint(ranks, number)
            )

    def make_plans(self) -> None:
        """Tell every rank with a share in the step what it is to do."""
        packed: dict[int, list[int]] = {}
        parts: dict[int, list[Part]] = {}
        samplings: dict[int, list[Sampling]] = {}
        for request, end, segment in self.chunks:
            holdings = request.holdings
            for shard in segment.shards:
                rank = shard.rank
                if rank not in parts:
                    packed[rank], parts[rank], samplings[rank] = [], [], []
                parts[rank].append(Part(segment, holdings[rank].extents))
                for run in shard.queries:
                    packed[rank] += request.tokens_of(run)
                if rank == request.home and segment.draws:
                    samplings[rank].append(request.sampling(len(packed[rank]) - 1, end))
        moves = list(_moves(self.gatherings))
        self.plans = {
            rank: RankPlan(
                tuple(packed[rank]),
                tuple(parts[rank]),
                tuple(samplings[rank]),
                tuple(move for move in moves if rank in (move.source, move.target)),
            )
            for rank in sorted(parts)
        }


def _moves(gatherings: Iterable[Gathering]) -> Iterable[Move]:
    for request, indices, places in gatherings:
        by_source: dict[int, tuple[list[Extent], list[Extent]]] = {}
        for index, place in zip(indices, places, strict=True):
            source = request.places[index]
            sources, targets = by_source.setdefault(source.rank, ([], []))
            sources.append(Extent(source.page, 1))
            targets.append(Extent(place.page, 1))
        for rank, (sources, targets) in by_source.items():
            yield Move(rank, places[0].rank, joined(sources), joined(targets))
