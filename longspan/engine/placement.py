"""Which ranks a new request gets, by the predicted time to its first token."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self

from longspan.config import EngineConfig
from longspan.cost.model import CostModel
from longspan.engine.prefix_cache import Hit, Place

EFFICIENCY = 0.75
"""More ranks are worth it if the first token comes sooner by this part of how many times more."""


class Fleet(NamedTuple):
    """What placement sees of the ranks: for each its pages that nobody claims, and its delay.

    The delay is the predicted time in seconds until it could begin with a new prompt. Cached pages
    that are idle count as free, and no longer do when a request begins with them.
    """

    free: Sequence[int]
    delays: Sequence[float]
    is_idle: Callable[[Place], bool] = lambda place: False

    def num_owned(self, places: Iterable[Place]) -> int:
        """How many of these pages a request would share with others, taking no room."""
        return sum(not self.is_idle(place) for place in places)


class Placement(NamedTuple):
    """The ranks of a request, the cached pages that it begins with, and its predicted TTFT."""

    ranks: list[int]
    places: list[Place]
    seconds: float

    @property
    def degree(self) -> int:
        return len(self.ranks)


class Placer:
    """Chooses a request's degree and ranks.

    A prompt that one rank computes in `one_step` seconds stays on one rank and talks to nobody.
    For a longer one the degree doubles until it can be computed in that time too, or until its
    first token gains too little by it; or its pages need it. With `min_tokens_per_rank` the degree
    follows from the length alone.
    """

    def __init__(
        self, cost: CostModel, page_size: int, one_step: float, min_tokens_per_rank: int | None
    ) -> None:
        self.cost = cost
        self.page_size = page_size
        self.one_step = one_step
        self.min_tokens_per_rank = min_tokens_per_rank

    @classmethod
    def of(cls, config: EngineConfig, cost: CostModel) -> Self:
        """As an engine places: what fits one of its steps stays on one rank."""
        one_step = cost.prefill_seconds(config.max_num_batched_tokens, 0, 1)
        one_step = min(one_step, config.max_step_time or one_step)
        return cls(cost, config.page_size, one_step, config.min_tokens_per_rank)

    def place(
        self, tokens: int, hits: Sequence[Hit], fleet: Fleet, max_degree: int
    ) -> Placement | None:
        """Ranks for a prompt of so many tokens whose first pages are the cache's `hits`.

        More than `max_degree` ranks are taken only where fewer lack the pages, or know less of the
        prompt. None if even all ranks lack the pages.
        """
        local = self._local(tokens, hits, fleet)
        if self.min_tokens_per_rank is None:
            if local and self._work(local, tokens) <= self.one_step:
                return local
            options = ([local] if local else []) + self._spread(tokens, hits, fleet)
            return self._widest(tokens, options, max_degree)
        cached = len(local.places if local else hits) * self.page_size
        degree = max((tokens - cached) // self.min_tokens_per_rank, 1)
        if degree == 1 and local:
            return local
        wider = self._spread(tokens, hits, fleet, min(degree, len(fleet.free)))
        return wider[0] if wider else None

    def _work(self, placement: Placement, tokens: int) -> float:
        """Predicted seconds of the prompt's own prefill."""
        cached = len(placement.places) * self.page_size
        return self.cost.prefill_seconds(tokens - cached, cached, placement.degree)

    def _widest(
        self, tokens: int, options: Sequence[Placement], max_degree: int
    ) -> Placement | None:
        """The most ranks that are worth it, from options of rising degree."""
        chosen = options[0] if options else None
        for wider in options[1:]:
            assert chosen is not None
            gain, more = chosen.seconds / wider.seconds, wider.degree / chosen.degree
            fast_enough = self._work(chosen, tokens) <= self.one_step
            # Ranks that know more of the prompt cost others nothing: it is not computed again.
            too_wide = wider.degree > max_degree and len(wider.places) <= len(chosen.places)
            if too_wide or fast_enough or gain < EFFICIENCY * more:
                break
            chosen = wider
        return chosen

    def _local(self, tokens: int, hits: Sequence[Hit], fleet: Fleet) -> Placement | None:
        """One rank: one that knows the prompt's beginning, or the one that is free first."""
        pages = -(-tokens // self.page_size)
        known = hits[0] if hits else {}
        fitting = [
            rank
            for rank in range(len(fleet.free))
            if rank not in known and fleet.free[rank] >= pages
        ]
        options: list[tuple[int, list[Place]]] = [
            (rank, [Place(rank, hit[rank]) for hit in hits[: _num_leading(hits, rank)]])
            for rank in known
        ]
        options = [
            (rank, places)
            for rank, places in options
            if fleet.free[rank] >= pages - fleet.num_owned(places)
        ]
        if fitting:
            free_first = min(fitting, key=lambda rank: (fleet.delays[rank], -fleet.free[rank]))
            options.append((free_first, []))
        placements = []
        for rank, places in options:
            cached = len(places) * self.page_size
            seconds = fleet.delays[rank] + self.cost.prefill_seconds(tokens - cached, cached, 1)
            placements.append(Placement([rank], places, seconds))
        return min(placements, key=lambda option: option.seconds, default=None)

    def _spread(
        self, tokens: int, hits: Sequence[Hit], fleet: Fleet, least: int | None = None
    ) -> list[Placement]:
        """Placements over several ranks, or at least so many, that have the pages together.

        The holders of cached pages come first, then the ranks that are free first.
        """
        places = _on_few_ranks(hits)
        holders = {place.rank for place in places}
        cached = len(places) * self.page_size
        pages = -(-tokens // self.page_size) - fleet.num_owned(places)
        preferred = sorted(
            range(len(fleet.free)),
            key=lambda rank: (rank not in holders, fleet.delays[rank], -fleet.free[rank], rank),
        )
        options, room, delay, degree = [], 0, 0.0, least or 2
        for count, rank in enumerate(preferred, 1):
            room += fleet.free[rank]
            delay = max(delay, fleet.delays[rank])
            enough = room >= pages and count >= max(len(holders), least or 1)
            if enough and (count >= degree or count == len(preferred)):
                seconds = delay + self.cost.prefill_seconds(tokens - cached, cached, count)
                options.append(Placement(preferred[:count], places, seconds))
                degree = 2 * count
        return options


def _num_leading(hits: Sequence[Hit], rank: int) -> int:
    """How many of the first pages one rank has without a gap."""
    return next((index for index, hit in enumerate(hits) if rank not in hit), len(hits))


def _on_few_ranks(hits: Sequence[Hit]) -> list[Place]:
    """One place for each page, on the rank of the page before or another used one if possible."""
    places: list[Place] = []
    used: list[int] = []
    for hit in hits:
        rank = next((rank for rank in reversed(used) if rank in hit), None)
        if rank is None:
            rank = max(hit, key=lambda rank: (_num_leading(hits[len(places) :], rank), -rank))
        if rank in used:
            used.remove(rank)
        used.append(rank)
        places.append(Place(rank, hit[rank]))
    return places
