"""A fleet of simulated ranks under audit: each plan is followed, and where each key is worked out.

The audit knows nothing from the scheduler but what the plans say; what the scheduler believes,
its ledger and its cache is then compared with it.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from random import Random
from typing import Any

from simulated import VOCAB_SIZE, Plans, SimulatedExecutor, simulated_engine

from longspan.cost.rates import CPU_THREAD, LinkRates
from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.engine.prefix_cache import Place
from longspan.engine.request import Request
from longspan.outputs import CompletionOutput
from longspan.plan import MOST_JOINT_ROWS, UNKNOWN, Extent, RankPlan, Segment
from longspan.sampling_params import SamplingParams

FAST_LINKS = replace(CPU_THREAD, attention_flops=1e6, links={"host": LinkRates(0.0, 1e15)})
"""Prompts of a few tokens are worth spreading, and gathering again."""

SLOW = replace(
    CPU_THREAD,
    attention_flops=1e6,
    linear_flops=1e6,
    links={"host": LinkRates(1e-2, 2.4e9, overlap=0)},
)
"""A few tokens fill a step; keys are worth gathering soon."""

Slot = tuple[int, int, int]
"""Rank, page and offset of one token's key."""


class Audit:
    """What the plans of all steps so far say, and whether it is consistent and true."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        num_pages = engine.ledger.num_pages
        self.pages = [pages_in([Extent(0, n)], rank) for rank, n in enumerate(num_pages)]
        """All pages of each rank."""
        self.slots_of: dict[tuple[str, int], list[Slot]] = {}
        """Where each running request's keys are, by position; a preempted one starts anew."""
        self.contents: dict[Place, tuple[int, ...]] = {}
        """For each full page in the pools the tokens up to its last, from its request's first."""
        self.moving: Counter[Place] = Counter()
        """The pages to which others are under way."""
        self.arrived: list[tuple[Place, Place]] = []
        """The pages that have moved in steps that are done, but whose request is not known yet."""
        self.idle: set[Place] = set()
        """Pages without an owner that were in the cache at the last look."""
        self.homes: dict[tuple[str, int], int | None] = {}
        self.seen: Counter[str] = Counter()
        """How often it came to what the tests want to come to."""

    @property
    def running(self) -> dict[str, Request]:
        return {request.request_id: request for request in self.engine.scheduler.running}

    def check_plans(self, plans: Plans) -> None:
        """Call for each step between `schedule` and `wait`."""
        life = {life_of(request) for request in self.running.values()}
        self.slots_of = {key: slots for key, slots in self.slots_of.items() if key in life}
        assert plans, "a step always computes something"
        self.check_agreement(plans)
        for rank, plan in plans.items():
            self.check_batch(rank, plan)
        for segment in segments(plans):
            self.check_segment(segment, plans)
            self.check_sampling(segment, plans)
        self.check_moves(plans)
        self.seen["steps"] += 1

    def slots(self, request: Request) -> list[Slot]:
        """Where a request's keys are; it may begin with pages that others have computed."""
        if life_of(request) not in self.slots_of:
            size = self.engine.config.page_size
            known = request.prompt_token_ids + request.output_token_ids
            cached = [request.places[index] for index in range(request.num_computed // size)]
            assert len(cached) * size == request.num_computed
            assert self.engine.config.enable_prefix_caching or not cached
            for index, place in enumerate(cached):
                assert self.contents[place] == tuple(known[: (index + 1) * size])
            begun = [(*place, offset) for place in cached for offset in range(size)]
            self.slots_of[life_of(request)] = begun
            self.seen["pages found in the cache"] += len(cached)
        return self.slots_of[life_of(request)]

    def check_moves(self, plans: Plans) -> None:
        """Keys of full pages go to other ranks of the step, to pages that nobody has."""
        moves = {move for plan in plans.values() for move in plan.moves}
        if not moves:
            return
        taken = {slot for slots in self.slots_of.values() for slot in slots}
        for move in moves:
            assert move.source != move.target
            assert {move.source, move.target} <= plans.keys()
            targets = self.slots_in(move.targets, move.target)
            assert taken.issuperset(self.slots_in(move.sources, move.source))
            assert taken.isdisjoint(targets)
            for place in pages_in(move.targets, move.target):
                assert not self.moving[place]
                self.moving[place] += 1
                self.begin(place)

    def end_step(self, plans: Plans) -> None:
        """Call when a step is done: pages that it filled or moved are read from now on."""
        size = self.engine.config.page_size
        for segment in segments(plans):
            request = self.running[segment.request_id]
            known = request.prompt_token_ids + request.output_token_ids
            slots = self.slots(request)
            start = min(run.start for shard in segment.shards for run in shard.queries)
            end = max(run.end for shard in segment.shards for run in shard.queries)
            for index in range(start // size, end // size):
                rank, page, _ = slots[index * size]
                self.contents[Place(rank, page)] = tuple(known[: (index + 1) * size])
        for move in {move for plan in plans.values() for move in plan.moves}:
            sources = pages_in(move.sources, move.source)
            for source, target in zip(sources, pages_in(move.targets, move.target), strict=True):
                self.contents[target] = self.contents[source]
                self.moving[target] -= 1
                self.arrived.append((source, target))

    def follow_moves(self) -> None:
        """Call after a step: whoever is said to have a page elsewhere now had it moved there."""
        size = self.engine.config.page_size
        for request in self.running.values() if self.arrived else ():
            slots = self.slots(request)
            for index, place in request.places.items():
                was = Place(*slots[index * size][:2])
                if was != place:
                    self.arrived.remove((was, place))
                    slots[index * size : (index + 1) * size] = [(*place, o) for o in range(size)]
                    self.seen["pages gathered"] += 1
        self.arrived.clear()  # those that are left were for requests that ended with the step

    def begin(self, place: Place) -> None:
        """A page is about to be filled anew."""
        self.contents.pop(place, None)
        if place in self.idle:
            self.idle.remove(place)
            self.seen["pages evicted"] += 1

    def check_agreement(self, plans: Plans) -> None:
        """Exactly the ranks with a share have a part, all the same one, all in the same order.

        In a joint step all ranks have a part of everything.
        """
        joint = all(plan.joint for plan in plans.values())
        assert not joint or len(plans) == self.engine.ledger.num_ranks
        contacted: dict[Segment, set[int]] = {}
        for rank, plan in plans.items():
            assert plan.parts, "no rank is contacted without a part"
            for part in plan.parts:
                contacted.setdefault(part.segment, set()).add(rank)
        for segment, ranks in contacted.items():
            held = [shard.rank for shard in segment.shards]
            assert held == sorted(held)
            assert ranks == (set(plans) if joint else set(held))
        names = [segment.request_id for segment in contacted]
        assert len(set(names)) == len(names) <= self.engine.config.max_num_seqs
        orders = [[part.segment.request_id for part in plan.parts] for plan in plans.values()]
        for one, other in combinations(orders, 2):
            assert [n for n in one if n in other] == [n for n in other if n in one]

    def check_batch(self, rank: int, plan: RankPlan) -> None:
        """A packed batch is the tokens at its parts' positions, no more than the budget.

        In a joint step it is those of all ranks, each of which keeps to its own.
        """
        expected: list[int] = []
        for part in plan.parts:
            request = self.running[part.segment.request_id]
            known = request.prompt_token_ids + request.output_token_ids
            shards = part.segment.shards if plan.joint else [part.segment.shard(rank)]
            for run in (run for shard in shards for run in shard.queries):
                expected += [*known, UNKNOWN][run.start : run.end]
        assert list(plan.token_ids) == expected
        own = sum(part.segment.shard(rank).num_queries for part in plan.parts)
        assert own <= self.engine.config.max_num_batched_tokens
        if plan.joint:
            assert len(expected) == len(plan.parts) <= MOST_JOINT_ROWS
            self.seen["joint steps"] += rank == plan.joint.ranks[0]

    def check_segment(self, segment: Segment, plans: Plans) -> None:
        """Cached keys are what was written before; new ones are the next positions."""
        request = self.running[segment.request_id]
        slots, size = self.slots(request), self.engine.config.page_size
        new: dict[int, Slot] = {}
        for shard in segment.shards:
            assert shard.queries == shard.keys, "a token's key is where it is computed"
            assert shard.num_keys > 0, "no rank is asked for keys that it hasn't"
            held = self.slots_in(extents_of(plans[shard.rank], segment), shard.rank)
            written = [slot for slot in slots if slot[0] == shard.rank]
            assert sorted(held[: shard.cached]) == sorted(written)
            begun = slots[-1:] if len(slots) % size else []
            if begun and begun[0][0] == shard.rank:
                assert held[shard.cached - 1] == begun[0], "the page that was begun comes last"
            assert len(held) - shard.num_keys < size, "no page too many"
            new_positions = [p for run in shard.keys for p in range(run.start, run.end)]
            assert new_positions == sorted(new_positions)
            new |= zip(new_positions, held[shard.cached : shard.num_keys], strict=True)
        assert sum(shard.cached for shard in segment.shards) == len(slots), "every key is read"
        assert sorted(new) == list(range(len(slots), len(slots) + len(new)))
        slots += [new[position] for position in sorted(new)]
        self.check_pages(slots)
        for rank, page, offset in new.values():
            if offset == 0:
                self.begin(Place(rank, page))
        home, _, _ = slots[-1]
        assert request.home == home, "the home holds the last key"
        self.check_strategy(segment)
        if self.homes.get(life_of(request), home) != home and len(new) == 1:
            self.seen["homes moved"] += 1
        self.homes[life_of(request)] = home
        self.seen["requests over all ranks"] += len(segment.shards) == len(self.engine.kv_usage) > 1

    def slots_in(self, extents: Iterable[Extent], rank: int) -> list[Slot]:
        size, places = self.engine.config.page_size, pages_in(extents, rank)
        assert all(0 <= place.page < self.engine.ledger.num_pages[rank] for place in places)
        return [(*place, offset) for place in places for offset in range(size)]

    def check_pages(self, slots: Sequence[Slot]) -> None:
        """Consecutive positions fill one page after the other, each on one rank."""
        size = self.engine.config.page_size
        for position, (rank, page, offset) in enumerate(slots):
            assert offset == position % size
            assert (rank, page, 0) == slots[position - offset]

    def check_strategy(self, segment: Segment) -> None:
        forced = self.engine.config.attention_strategy
        if len(segment.shards) == 1:
            assert segment.strategy == "local"
        elif forced != "auto":
            assert segment.strategy == forced
        else:
            assert segment.strategy in ("pass_kv", "gather_kv", "pass_q")

    def check_sampling(self, segment: Segment, plans: Plans) -> None:
        """A token is drawn on the home if the last known token is computed, else nowhere."""
        request = self.running[segment.request_id]
        drawn = [
            (rank, sampling.row, sampling.position)
            for rank, plan in plans.items()
            for sampling in plan.samplings
            if sampling.request_id == segment.request_id
        ]
        end = max(run.end for shard in segment.shards for run in shard.queries)
        ahead = UNKNOWN in (token for plan in plans.values() for token in plan.token_ids)
        assert end <= request.num_tokens + ahead
        self.seen["steps ahead"] += ahead
        if end < request.num_tokens:
            assert drawn == []
        else:
            home = request.home
            assert home is not None
            row = -1
            for part in plans[home].parts:
                row += 1 if plans[home].joint else part.segment.shard(home).num_queries
                if part.segment == segment:
                    break
            assert drawn == [(home, row, end)]

    def check_owners(self) -> None:
        """Every page has the owners that the plans gave it, and holdings are what they said."""
        owners = Counter(self.moving)
        for request in self.running.values():
            slots = self.slots(request)
            for rank, holding in request.holdings.items():
                held = self.slots_in(holding.extents, rank)
                mine = [slot for slot in slots if slot[0] == rank]
                assert sorted(held[: holding.tokens]) == sorted(mine)
                owners.update(pages_in(holding.extents, rank))
            assert {slot[0] for slot in slots} <= request.holdings.keys(), "no key is lost"
        ledger, self.idle = self.engine.ledger, set()
        for rank, places in enumerate(self.pages):
            for place in places:
                assert ledger.num_owners(place) == owners[place]
                if place in ledger.cache:
                    assert place in self.contents, "what is found again has been computed"
                    if not owners[place]:
                        self.idle.add(place)
                assert ledger.is_idle(place) == (place in self.idle)
                self.seen["pages shared"] += owners[place] > 1
            assert ledger.num_used(rank) == sum(owners[place] > 0 for place in places)
        if not self.engine.config.enable_prefix_caching:
            assert all(number <= 1 for number in owners.values())
            assert not self.idle

    def check_counters(self) -> None:
        """Call after a step: what is computed is what was planned, and nobody is lost."""
        self.follow_moves()
        self.check_owners()
        for request in self.running.values():
            assert request.in_flight or request.finish_reason is None
            assert set(request.holdings) <= set(request.ranks)
            assert request.home is None or request.home in request.holdings
            if not request.in_flight:
                assert request.num_computed == len(self.slots(request)) < request.num_tokens
            self.seen["victims doomed"] += request.doomed
        for request in self.engine.scheduler.waiting:
            assert not request.holdings
            assert request.num_computed == 0
            assert request.home is None
        names = [*self.running, *(r.request_id for r in self.engine.scheduler.waiting)]
        assert len(set(names)) == len(names)
        assert len(self.running) <= self.engine.config.max_num_seqs


def life_of(request: Request) -> tuple[str, int]:
    return request.request_id, request.metrics.num_preemptions


def segments(plans: Plans) -> Iterable[Segment]:
    return {part.segment.request_id: part.segment for part in parts(plans)}.values()


def parts(plans: Plans) -> Iterable[Any]:
    return (part for plan in plans.values() for part in plan.parts)


def extents_of(plan: RankPlan, segment: Segment) -> tuple[Extent, ...]:
    (extents,) = (part.extents for part in plan.parts if part.segment == segment)
    return extents


def pages_in(extents: Iterable[Extent], rank: int) -> list[Place]:
    return [Place(rank, page) for e in extents for page in range(e.start, e.end)]


@dataclass(frozen=True)
class Arrival:
    """A prompt that comes before some step, and perhaps goes some steps later."""

    step: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    aborted_after: int | None = None
    in_a_step: bool = False
    """Whether it is aborted while a step is under way, rather than between two."""
    priority: int = 0


@dataclass(frozen=True)
class Fleet:
    num_pages: tuple[int, ...]
    page_size: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_pages) * self.page_size

    def engine(self) -> tuple[Engine, SimulatedExecutor]:
        """Ranks that are done in an order that chance gives, by a fixed seed."""
        random = Random(1)
        return simulated_engine(
            self.num_pages,
            page_size=self.page_size,
            order=lambda ranks: random.sample(ranks, random.randint(1, len(ranks))),
            **self.options,
        )


@dataclass
class Service:
    """A fleet that serves arrivals under audit."""

    fleet: Fleet
    arrivals: Sequence[Arrival]
    groups: list[Group] = field(default_factory=list)
    num_holders: int = 0
    """The most ranks that held one request's keys."""
    strategies: set[str] = field(default_factory=set)

    def run(self) -> "Service":
        self.engine, executor = self.fleet.engine()
        self.audit = Audit(self.engine)
        self.in_step: list[str] = []
        executor.before_step = self._before_step
        executor.after_step = self.audit.end_step
        coming = deque(sorted(enumerate(self.arrivals), key=lambda item: item[1].step))
        aborts: dict[int, list[tuple[str, bool]]] = {}
        groups: dict[int, Group] = {}
        step = 0
        while coming or self.engine.has_requests:
            assert step < self.patience, "requests hold each other up for ever"
            while coming and coming[0][1].step <= step:
                number, arrival = coming.popleft()
                groups[number] = self.engine.add_request(
                    arrival.prompt_token_ids,
                    arrival.params,
                    request_id=f"r/{number}",
                    priority=arrival.priority,
                )
                if arrival.aborted_after is not None:
                    at = aborts.setdefault(step + arrival.aborted_after, [])
                    at.append((f"r/{number}", arrival.in_a_step))
            for request_id, in_a_step in aborts.pop(step, []):
                self.in_step.append(request_id) if in_a_step else self.abort(request_id)
            if self.engine.has_requests:
                self.engine.step()
                self.audit.check_counters()
            step += 1
        self.groups = [groups[number] for number in range(len(self.arrivals))]
        self.check_end()
        return self

    @property
    def patience(self) -> int:
        """Far more steps than one token a step takes, with every request recomputed often."""
        most = self.fleet.num_tokens
        tokens = sum(
            len(a.prompt_token_ids) + a.params.n * (a.params.max_tokens or most)
            for a in self.arrivals
        )
        return 1000 + 50 * tokens

    @property
    def requests(self) -> list[Request]:
        return [request for group in self.groups for request in group.requests]

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    def _before_step(self, plans: Plans) -> None:
        self.audit.check_plans(plans)
        for segment in segments(plans):
            self.num_holders = max(self.num_holders, len(segment.shards))
            self.strategies.add(segment.strategy)
        while self.in_step:
            self.abort(self.in_step.pop())

    def check_end(self) -> None:
        for rank, pages in enumerate(self.fleet.num_pages):
            assert self.engine.ledger.free[rank] == pages, "pages are lost"
            given = pages_in(self.engine.ledger.allocate(rank, pages), rank)
            assert sorted(given) == [(rank, page) for page in range(pages)], "pages are lost"
        for arrival, group in zip(self.arrivals, self.groups, strict=True):
            assert group.finished
            assert self.engine.abort(group.request_id) is None, "what ended is forgotten"
            undisturbed = alone(arrival, self.fleet.num_tokens)
            for got, wanted in zip(group.output().outputs, undisturbed, strict=True):
                check_output(got, wanted, arrival)
        for request in self.requests:
            if request.finish_reason != "abort":
                keys = sum(request.metrics.kv_tokens)
                ended_by_chance = request.finish_reason == "stop" and self.engine.scheduler.ahead
                assert keys - (request.num_tokens - 1) in ((0, 1) if ended_by_chance else (0,))


def alone(arrival: Arrival, max_model_len: int) -> list[CompletionOutput]:
    """The outputs on one rank with room for everything, with nobody else about."""
    engine, _ = simulated_engine(
        [10_000], max_model_len=max_model_len, max_num_batched_tokens=10**6, page_size=16
    )
    group = engine.add_request(arrival.prompt_token_ids, arrival.params)
    while engine.has_requests:
        engine.step()
    return group.output().outputs


def check_output(got: CompletionOutput, wanted: CompletionOutput, arrival: Arrival) -> None:
    if got.finish_reason == "abort":
        assert arrival.aborted_after is not None
        assert got.token_ids == wanted.token_ids[: len(got.token_ids)]
    else:
        assert got == wanted


def some_tokens(number: int, seed: int) -> tuple[int, ...]:
    random = Random(seed)
    return tuple(random.randrange(VOCAB_SIZE) for _ in range(number))
