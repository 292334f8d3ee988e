"""Ranks in predicted time: an executor for simulations and replays."""

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush

from longspan.cost.model import CostModel
from longspan.plan import RankPlan, RankResult, Sampled, Sampling

Plans = Mapping[int, RankPlan]


class VirtualExecutor:
    """Ranks that compute nothing and take the time that a cost model predicts.

    A step takes as long as its slowest rank. `done_at` says otherwise: it gets the time and the
    plans of a step, and returns when each rank is done. `token_of` draws tokens, `on_start` sees
    the plans of each step before it begins. Ranks that are done at the same time are done in the
    order of their numbers.
    """

    def __init__(
        self,
        num_pages: Sequence[int],
        page_size: int,
        cost: CostModel,
        *,
        token_of: Callable[[Sampling], int] = lambda sampling: 0,
        done_at: Callable[[float, Plans], Mapping[int, float]] | None = None,
        on_start: Callable[[Plans], None] = lambda plans: None,
        queues: bool = True,
    ) -> None:
        self.num_pages = tuple(num_pages)
        self.page_size = page_size
        self.cost = cost
        self.rates = cost.rates
        self.topology = cost.topology
        self.joins = cost.joins
        self.queues = queues
        self.time = 0.0
        """Seconds since the beginning; may be set to a later time while no rank is at work."""
        self.num_steps = 0
        self.busy_seconds = [0.0] * len(num_pages)
        """How long each rank had work of its own, without waiting for others in its steps."""
        self._token_of = token_of
        self._done_at = done_at or self._predicted
        self._on_start = on_start
        self._plans: dict[int, list[RankPlan]] = {}
        self._ready = [0.0] * len(num_pages)
        """When each rank is done with all that it was given."""
        self._ends: list[tuple[float, int]] = []

    def clock(self) -> float:
        return self.time

    @property
    def at_work(self) -> bool:
        """Whether any rank is."""
        return bool(self._plans)

    def start(self, plans: Plans) -> None:
        """Begin a step, or queue it."""
        self._on_start(plans)
        self.num_steps += 1
        begin = max(self.time, *(self._ready[rank] for rank in plans))
        for rank, time in self._done_at(begin, plans).items():
            self._plans.setdefault(rank, []).append(plans[rank])
            self._ready[rank] = time
            heappush(self._ends, (time, rank))

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        """Go on to the end of the first step; if that is later than `timeout`, go so far only."""
        if not self._ends:
            return {}
        first = self._ends[0][0]
        if timeout is not None and first > self.time + timeout:
            self.time += timeout
            return {}
        self.time = max(first, self.time)
        results = {}
        while self._ends and self._ends[0][0] <= self.time and self._ends[0][1] not in results:
            _, rank = heappop(self._ends)
            token_of, samplings = self._token_of, self._plans[rank].pop(0).samplings
            if not self._plans[rank]:
                del self._plans[rank]
            drawn = [Sampled(sampling.request_id, token_of(sampling)) for sampling in samplings]
            results[rank] = RankResult(tuple(drawn), {})
        return results

    def close(self) -> None:
        self._plans, self._ends = {}, []

    def _predicted(self, time: float, plans: Plans) -> dict[int, float]:
        segments = {id(p.segment): p.segment for plan in plans.values() for p in plan.parts}
        seconds = self.cost.step_seconds(segments.values())
        for rank, plan in plans.items():
            if plan.moves:
                seconds[rank] = max(seconds.get(rank, 0.0), self._move_seconds(plan))
        for rank, own in seconds.items():
            self.busy_seconds[rank] += own
        return dict.fromkeys(plans, time + max(seconds.values(), default=0.0))

    def _move_seconds(self, plan: RankPlan) -> float:
        """Moves travel while the step computes, one after the other."""
        pages = (sum(extent.length for extent in move.sources) for move in plan.moves)
        return sum(self.cost.move_seconds(number * self.page_size) for number in pages)
