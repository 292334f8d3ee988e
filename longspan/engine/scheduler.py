"""Decides what every rank computes in its next step. Pure Python: no tensors, no processes."""

from bisect import insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, count

from longspan.config import EngineConfig
from longspan.cost.choice import decide
from longspan.cost.model import CostModel
from longspan.engine.admission import Admission
from longspan.engine.ahead import goes_on
from longspan.engine.cut import cut
from longspan.engine.draft import Draft
from longspan.engine.gather import Gatherer
from longspan.engine.ledger import Ledger
from longspan.engine.placement import Placer
from longspan.engine.request import Request
from longspan.engine.running import Running, by_order
from longspan.engine.step import Step, decode_chunk, prefill_chunk
from longspan.engine.under_way import UnderWay
from longspan.plan import MOST_JOINT_ROWS, RankResult, Shard, Strategy

LOOKAHEAD = 8
"""So many waiting requests whose ranks are busy or full may be passed by others in a round."""


class Scheduler:
    """Waiting and running requests, and the ledger of the pages that hold their keys.

    Ranks that have a request in common are a team and step together; all others step each at its
    own pace. A step takes decode tokens first, then prefill chunks, and prompts that are waiting
    begin with them, until every rank's tokens and time are spent.
    """

    def __init__(
        self, config: EngineConfig, ledger: Ledger, cost: CostModel, *, ahead: bool = False
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.cost = cost
        self.waiting: list[Request] = []
        """In the order in which they are admitted."""
        self.num_prefilled = self.num_generated = 0
        """Prompt tokens that have been computed, again after a preemption, and tokens drawn."""
        self._running = Running(ledger)
        self.ahead = ahead
        """Whether ranks at work take another step."""
        self._under_way = UnderWay()
        self._joint_steps = count(1)
        self._gatherer = Gatherer(cost, ledger)
        self._placer = Placer.of(config, cost)

    @property
    def running(self) -> Collection[Request]:
        return self._running.requests.keys()

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=by_order)

    def abort(self, request: Request) -> None:
        """End a request wherever it stands; its pages are free at once, or after its step."""
        request.finish("abort")
        if request not in self.running:
            self.waiting.remove(request)
        elif not request.in_flight:
            self._running.release(request)

    def schedule(self) -> list[Step]:
        """Make a step for each idle team with anything to do; its ranks are busy from now on.

        Ranks that decode jointly wait for each other while there is nothing else to do. Steps that
        only decode are followed by the next one at once, whose tokens ranks will know by then.
        """
        steps: list[Step] = []
        if not (self._under_way and self._decodes_jointly()):
            draft = self._draft(self._running.teams.without(self._under_way.ranks))
            self._decode(draft)
            self._admit(draft)
            self._prefill(draft)
            steps += self._begin(draft)
        if self.ahead:
            steps += self._look_ahead()
        if not self._under_way and self.running:
            # Claims keep this from happening as far as is known; if prompts should ever hold each
            # other's pages all the same, the last gives way rather than all stand still.
            self._preempt(self._running.last())
            return self.schedule()
        return steps

    def update(self, results: Mapping[int, RankResult]) -> list[Request]:
        """Take what ranks give back; returns the requests that drew a token.

        A rank's results come in the order of its steps. A step's tokens count when all of its ranks
        are done.
        """
        drawn: list[Request] = []
        for step in self._under_way.take(results):
            drawn += self._finish(step)
        return drawn

    def _finish(self, step: Step) -> list[Request]:
        for gathering in step.gatherings:
            self._gatherer.settle(gathering)
        for request, end, _ in step.chunks:
            request.in_flight -= 1
            self._computed(request, end)
        requests = {chunk.request.request_id: chunk.request for chunk in step.chunks}
        drawn = []
        for sampled in chain.from_iterable(step.results[rank].sampled for rank in step.plans):
            request = requests[sampled.request_id]
            if request.finish_reason is None:
                request.append(sampled)
                drawn.append(request)
        self.num_generated += len(drawn)
        for request in requests.values():
            if request.in_flight:
                continue
            if request.finish_reason is not None:
                self._running.release(request)
            elif request.doomed:
                self._preempt(request)
            elif request.num_pending == 1 and len(request.ranks) > len(request.holdings):
                self._running.part(request)
        return drawn

    def _draft(self, ranks: Iterable[int]) -> Draft:
        return Draft(ranks, self.ledger.num_ranks, self.config, self.cost)

    def _begin(self, draft: Draft) -> list[Step]:
        steps = draft.steps(self._running.teams, self._joint_steps)
        for step in steps:
            self._under_way.begin(step)
        return steps

    def _look_ahead(self) -> list[Step]:
        """The steps after those under way, where they are the same whatever tokens are drawn."""
        if self._may_begin:
            return []
        found: list[Step] = []
        for step in self._under_way.last:
            will_join = not step.is_joint and self._decodes_jointly(after=step)
            if not will_join and goes_on(step, self._running):
                draft = self._draft(step.plans)
                for request, end, _ in step.chunks:
                    assert request.home is not None
                    self._running.hold_next(request, request.home, end)
                    draft.take_decode(decode_chunk(request, request.home, end, self._strategy))
                found += self._begin(draft)
        return found

    @property
    def _may_begin(self) -> bool:
        """Whether a request waits for which there may be room."""
        return bool(self.waiting) and len(self.running) < self.config.max_num_seqs

    def _decodes_jointly(self, after: Step | None = None) -> bool:
        """Whether ranks have nothing to do but to decode together, once a step is done."""
        done = {chunk.request for chunk in after.chunks} if after else set()
        prefilling = self._running.prefilling.keys() - done
        few = len(self.running) <= MOST_JOINT_ROWS
        return self.cost.joins and few and not (self._may_begin or prefilling)

    def _decode(self, draft: Draft) -> None:
        """Give every decoding request of an idle team its next token."""
        teams = {self._running.teams.of(rank): None for rank in sorted(draft.idle)}
        requests = [request for team in teams for request in team.requests]
        prefilling = self._running.prefilling
        for request in requests:
            if request in prefilling or request not in self.running:
                continue  # or preempted for another one in this very loop
            rank = self._next_home(request)
            if rank is None or not draft.idle.issuperset(request.ranks) or not draft.tokens[rank]:
                continue
            position = request.num_computed
            self._running.hold_next(request, rank, position)
            draft.take_decode(decode_chunk(request, rank, position, self._strategy))
            if len(request.holdings) > 1:
                self._gather(request, draft)
        for request in requests:
            if request in prefilling:
                draft.add_prefilling(request)

    def _next_home(self, request: Request) -> int | None:
        """The rank with room for a decoding request's next token; None if it has to wait.

        When its home is full the request spreads: first to another of its ranks, then to the
        emptiest. When all are full the last of all running requests gives up its pages.
        """
        home, free = request.home, self.ledger.free
        assert home is not None
        if request.num_computed % self.ledger.page_size or free[home]:
            return home
        request.to_gather = []
        while not any(free):
            victim = self._running.last()
            if victim.in_flight:
                victim.doomed = True
                return None
            self._preempt(victim)
            if victim is request:
                return None
        return self._running.rank_with_room(request)

    def _gather(self, request: Request, draft: Draft) -> None:
        home, size = request.home, self.ledger.page_size
        assert home is not None
        # Not in the step in which it grows onto another rank, which is slower than others anyhow.
        settled = request.holdings[home].tokens > size
        if request.num_computed % size == 0 and settled and not request.to_gather:
            self._gatherer.begin(request, self._running.claims.unclaimed()[home])
        if request.to_gather and (gathering := self._gatherer.next_pages(request)):
            draft.gatherings.append(gathering)

    def _admit(self, draft: Draft) -> None:
        """Start waiting requests on idle ranks, in order, as far as pages and the step allow."""
        if not self.waiting or not draft.has_room:
            return
        admission = Admission(
            self._placer,
            self.ledger,
            self._running.claims.unclaimed(),
            self._delays(draft),
            waiting_tokens=sum(request.num_tokens for request in self.waiting[:LOOKAHEAD]),
        )
        num_passed = 0
        for request in list(self.waiting):
            full = len(self.running) >= self.config.max_num_seqs or not draft.has_room
            if full or num_passed == LOOKAHEAD:
                break
            if self.config.enable_prefix_caching and request.follows(self.ledger.page_size):
                continue
            hits = self._running.cached(request) if self.config.enable_prefix_caching else []
            placement = admission.place(request, hits)
            if placement is None:
                break
            cached = len(placement.places) * self.ledger.page_size
            new, priority = request.num_tokens - cached, request.order[0]
            if draft.idle.isdisjoint(placement.ranks) or not draft.has_room_for(
                new, cached, placement.ranks, priority
            ):
                num_passed += 1
                continue
            self.waiting.remove(request)
            self._running.start(request, placement)
            if draft.idle.issuperset(request.ranks):
                draft.add_prefilling(request)

    def _delays(self, draft: Draft) -> list[float]:
        """How long each rank is predicted to be at work before a new prompt's turn comes."""
        delays = list(draft.decode_seconds)
        for rank, seconds in self._under_way.seconds.items():
            delays[rank] = seconds
        for request in self._running.prefilling:
            seconds = self.cost.prefill_seconds(
                request.num_pending, request.num_computed, len(request.ranks)
            )
            for rank in request.ranks:
                delays[rank] += seconds
        return delays

    def _prefill(self, draft: Draft) -> None:
        """Share what is left of the step among prompts, those that need least of it first."""
        by_need = sorted(
            draft.prefilling,
            key=lambda request: (request.order[0], request.num_pending / len(request.ranks)),
        )
        for request in by_need:
            ranks = list(request.ranks)
            if self._has_room(request, draft):
                budgets = draft.fair_budgets(request)
                if runs := cut(request, self.ledger.free, budgets, self.ledger.page_size):
                    for rank, new in runs.items():
                        self._running.hold(request, rank, new)
                    self._running.claims.renew(request)
                    request.metrics.degree = max(request.metrics.degree, len(runs))
                    draft.take_prefill(prefill_chunk(request, runs, self._strategy))
            draft.remove_prefilling(request, ranks)

    def _has_room(self, request: Request, draft: Draft) -> bool:
        """Whether a prefilling request has a rank with room; it spreads to another if need be."""
        free, begun = self.ledger.free, request.num_computed % self.ledger.page_size
        if not begun and any(free):
            self._running.rank_with_room(request)
        return draft.idle.issuperset(request.ranks)

    def _strategy(self, request: Request, shards: Sequence[Shard]) -> Strategy:
        """How a request's ranks share its attention in this step."""
        if len(shards) == 1:
            return "local"
        forced = self.config.attention_strategy
        if forced != "auto":
            return forced
        begin = min(run.start for shard in shards for run in shard.queries)
        begins_page = begin % self.ledger.page_size == 0
        request.choice = decide(shards, self.cost, request.choice, begins_page)
        return request.choice.strategy

    def _computed(self, request: Request, end: int) -> None:
        """Count a request's tokens before `end` as computed; its full pages may be shared."""
        size, before = self.ledger.page_size, request.num_computed
        request.num_computed = end
        self.num_prefilled += max(min(end, len(request.prompt_token_ids)) - before, 0)
        if request.num_pending <= 1:
            self._running.prefilling.pop(request, None)
        filled = range(before // size, end // size)
        if filled and self.config.enable_prefix_caching and request.finish_reason is None:
            hashes = request.page_hashes(filled.stop, size)
            for index in filled:
                self.ledger.cache.add(hashes[index], request.places[index])

    def _preempt(self, request: Request) -> None:
        """Take a running request's pages; it is computed again later, its output kept."""
        self._running.release(request)
        request.metrics.num_preemptions += 1
        insort(self.waiting, request, key=by_order)
