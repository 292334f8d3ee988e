"""Whatever comes and goes, every token's key is where the plans say, and outputs never change.

Requests run over simulated ranks with tiny unequal pools, so that they grow from rank to rank and
take pages from each other. An audit follows every plan and works out by itself where each key is;
the simulated model makes every token depend on all keys before it (see `simulated.py`).
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import VOCAB_SIZE, Plans, SimulatedExecutor, simulated_engine

from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.engine.request import Request
from longspan.errors import InvalidRequestError
from longspan.outputs import CompletionOutput
from longspan.plan import Extent, RankPlan, Sampling, Segment
from longspan.sampling_params import SamplingParams

Place = tuple[int, int, int]
"""Rank, page and offset of one token's key."""


class Audit:
    """What the plans of all steps so far say, and whether it is consistent and true."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.places: dict[tuple[str, int], list[Place]] = {}
        """Where each running request's keys are, by position; a preempted one starts anew."""

    @property
    def running(self) -> dict[str, Request]:
        return {request.request_id: request for request in self.engine.scheduler.running}

    def check_plans(self, plans: Plans) -> None:
        """Call between `schedule` and `execute`."""
        running = self.running
        life = {(name, r.metrics.num_preemptions) for name, r in running.items()}
        self.places = {key: places for key, places in self.places.items() if key in life}
        assert plans, "a step always computes something"
        self.check_agreement(plans)
        for rank, plan in plans.items():
            self.check_batch(rank, plan)
        for segment in {part.segment.request_id: part.segment for part in parts(plans)}.values():
            self.check_segment(segment, plans)
            self.check_sampling(segment, plans)
        self.check_owners()

    def check_agreement(self, plans: Plans) -> None:
        """Exactly the ranks with a share have a part, all the same one, all in the same order."""
        contacted: dict[Segment, set[int]] = {}
        for rank, plan in plans.items():
            assert plan.parts, "no rank is contacted without a part"
            for part in plan.parts:
                contacted.setdefault(part.segment, set()).add(rank)
        for segment, ranks in contacted.items():
            assert [shard.rank for shard in segment.shards] == sorted(ranks)
        names = [segment.request_id for segment in contacted]
        assert len(set(names)) == len(names) <= self.engine.config.max_num_seqs
        orders = [[part.segment.request_id for part in plan.parts] for plan in plans.values()]
        for one, other in combinations(orders, 2):
            assert [n for n in one if n in other] == [n for n in other if n in one]

    def check_batch(self, rank: int, plan: RankPlan) -> None:
        """A packed batch is the tokens at its parts' positions, no more than the budget."""
        expected: list[int] = []
        for part in plan.parts:
            request = self.running[part.segment.request_id]
            known = request.prompt_token_ids + request.output_token_ids
            for run in part.segment.shard(rank).queries:
                expected += known[run.start : run.end]
        assert list(plan.token_ids) == expected
        assert len(expected) <= self.engine.config.max_num_batched_tokens

    def check_segment(self, segment: Segment, plans: Plans) -> None:
        """Cached keys are what was written before; new ones are the next positions."""
        request = self.running[segment.request_id]
        key = (segment.request_id, request.metrics.num_preemptions)
        places = self.places.setdefault(key, [])
        new: dict[int, Place] = {}
        for shard in segment.shards:
            assert shard.queries == shard.keys, "a token's key is where it is computed"
            assert shard.num_keys > 0, "no rank is asked for keys that it hasn't"
            slots = self.slots(extents_of(plans[shard.rank], segment), shard.rank)
            written = [place for place in places if place[0] == shard.rank]
            assert slots[: shard.cached] == written, "in the order in which they were written"
            assert len(slots) - shard.num_keys < self.engine.config.page_size, "no page too many"
            new_positions = [p for run in shard.keys for p in range(run.start, run.end)]
            assert new_positions == sorted(new_positions)
            new |= zip(new_positions, slots[shard.cached : shard.num_keys], strict=True)
        assert sorted(new) == list(range(len(places), len(places) + len(new)))
        places += [new[position] for position in sorted(new)]
        self.check_pages(places)
        home, _, _ = places[-1]
        assert request.home == home, "the home holds the last key"
        self.check_strategy(segment)

    def slots(self, extents: Iterable[Extent], rank: int) -> list[Place]:
        size = self.engine.config.page_size
        pages = [page for extent in extents for page in range(extent.start, extent.end)]
        assert all(0 <= page < self.engine.ledger.num_pages[rank] for page in pages)
        return [(rank, page, offset) for page in pages for offset in range(size)]

    def check_pages(self, places: Sequence[Place]) -> None:
        """Consecutive positions fill one page after the other, each on one rank."""
        size = self.engine.config.page_size
        for position, (rank, page, offset) in enumerate(places):
            assert offset == position % size
            assert (rank, page, 0) == places[position - offset]

    def check_strategy(self, segment: Segment) -> None:
        forced = self.engine.config.attention_strategy
        if len(segment.shards) == 1:
            assert segment.strategy == "local"
        elif forced != "auto":
            assert segment.strategy == forced
        else:
            assert segment.strategy in ("pass_kv", "pass_q")

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
        assert end <= request.num_tokens
        if end < request.num_tokens:
            assert drawn == []
        else:
            home = request.home
            assert home is not None
            row = -1
            for part in plans[home].parts:
                row += part.segment.shard(home).num_queries
                if part.segment == segment:
                    break
            assert drawn == [(home, row, request.num_tokens)]

    def check_owners(self) -> None:
        """No page has two owners, none is lost, and holdings are what the plans said."""
        owned: Counter[tuple[int, int]] = Counter()
        for request in self.running.values():
            key = (request.request_id, request.metrics.num_preemptions)
            places = self.places.get(key, [])
            for rank, holding in request.holdings.items():
                mine = [place for place in places if place[0] == rank]
                slots = self.slots(holding.extents, rank)
                assert slots[: holding.tokens] == mine
                owned.update({(rank, page) for _, page, _ in slots})
        assert all(owners == 1 for owners in owned.values())
        ledger = self.engine.ledger
        for rank in range(ledger.num_ranks):
            assert ledger.num_used(rank) == sum(1 for of_rank, _ in owned if of_rank == rank)

    def check_counters(self) -> None:
        """Call after a step: what is computed is what was planned, and nobody is lost."""
        for name, request in self.running.items():
            key = (name, request.metrics.num_preemptions)
            assert request.num_computed == len(self.places[key]) < request.num_tokens
            assert request.finish_reason is None
        for request in self.engine.scheduler.waiting:
            assert not request.holdings
            assert request.num_computed == 0
            assert request.home is None
        names = [*self.running, *(r.request_id for r in self.engine.scheduler.waiting)]
        assert len(set(names)) == len(names)
        assert len(self.running) <= self.engine.config.max_num_seqs


def parts(plans: Plans) -> Iterable[Any]:
    return (part for plan in plans.values() for part in plan.parts)


def extents_of(plan: RankPlan, segment: Segment) -> tuple[Extent, ...]:
    (extents,) = (part.extents for part in plan.parts if part.segment == segment)
    return extents


@dataclass(frozen=True)
class Arrival:
    """A prompt that comes before some step, and perhaps goes some steps later."""

    step: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    aborted_after: int | None = None
    in_a_step: bool = False
    """Whether it is aborted while a step is under way, rather than between two."""


@dataclass(frozen=True)
class Fleet:
    num_pages: tuple[int, ...]
    page_size: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_pages) * self.page_size

    def engine(self) -> tuple[Engine, SimulatedExecutor]:
        return simulated_engine(self.num_pages, page_size=self.page_size, **self.options)


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
        coming = deque(sorted(enumerate(self.arrivals), key=lambda item: item[1].step))
        aborts: dict[int, list[tuple[str, bool]]] = {}
        groups: dict[int, Group] = {}
        step = 0
        while coming or self.engine.has_requests:
            assert step < self.patience, "requests hold each other up for ever"
            while coming and coming[0][1].step <= step:
                number, arrival = coming.popleft()
                groups[number] = self.engine.add_request(
                    arrival.prompt_token_ids, arrival.params, request_id=f"r/{number}"
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
        for part in parts(plans):
            self.num_holders = max(self.num_holders, len(part.segment.shards))
            self.strategies.add(part.segment.strategy)
        while self.in_step:
            self.abort(self.in_step.pop())

    def check_end(self) -> None:
        for rank, pages in enumerate(self.fleet.num_pages):
            assert self.engine.ledger.num_free(rank) == pages, "pages are lost"
        for arrival, group in zip(self.arrivals, self.groups, strict=True):
            assert group.finished
            assert self.engine.abort(group.request_id) is None, "what ended is forgotten"
            undisturbed = alone(arrival, self.fleet.num_tokens)
            for got, wanted in zip(group.output().outputs, undisturbed, strict=True):
                check_output(got, wanted, arrival)
        for request in self.requests:
            if request.finish_reason != "abort":
                assert sum(request.metrics.kv_tokens) == request.num_tokens - 1


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


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    page_size = draw(st.sampled_from((1, 2, 3, 4, 16)))
    num_pages = draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    return Fleet(
        tuple(num_pages),
        page_size,
        {
            "max_num_batched_tokens": draw(st.integers(1, 6) | st.integers(1, 80)),
            "max_num_seqs": draw(st.integers(1, 6)),
            "min_tokens_per_rank": draw(st.sampled_from((1, 5, 16, 1024))),
            "attention_strategy": draw(st.sampled_from(("auto", "pass_kv", "gather_kv", "pass_q"))),
        },
    )


@st.composite
def arrivals(draw: st.DrawFn, fleet: Fleet) -> Arrival:
    longest = fleet.num_tokens - 1
    length = draw(st.integers(1, min(longest, 12)) | st.integers(1, min(longest, 400)))
    max_tokens = draw(st.integers(1, 40) | st.none())
    return Arrival(
        step=draw(st.integers(0, 20)),
        prompt_token_ids=some_tokens(length, seed=draw(st.integers(0, 99))),
        params=SamplingParams(
            n=draw(st.sampled_from((1, 1, 1, 2, 3))),
            seed=draw(st.integers(0, 9)),
            max_tokens=max_tokens,
            min_tokens=draw(st.sampled_from((0, 0, min(max_tokens or 5, 5)))),
            stop_token_ids=draw(st.sampled_from(((), (1, 2, 3)))),
            ignore_eos=draw(st.booleans()),
            repetition_penalty=draw(st.sampled_from((1.0, 1.0, 1.5))),
        ),
        aborted_after=draw(st.none() | st.none() | st.integers(0, 30)),
        in_a_step=draw(st.booleans()),
    )


@st.composite
def services(draw: st.DrawFn) -> Service:
    fleet = draw(fleets())
    if fleet.num_tokens == 1:  # has no room for a prompt and a token
        fleet = Fleet((2,), 1, fleet.options)
    return Service(fleet, draw(st.lists(arrivals(fleet), min_size=1, max_size=8)))


@given(services())
@settings(max_examples=150)
def test_every_trace_keeps_all_invariants_and_all_outputs(service: Service) -> None:
    service.run()


TINY = {"max_num_seqs": 8, "min_tokens_per_rank": 16}

FLEETS = {
    "one rank": Fleet((40,), 16, {"max_num_batched_tokens": 64, "max_num_seqs": 8}),
    "unequal pools": Fleet(
        (3, 30, 9),
        16,
        {"max_num_batched_tokens": 50, "max_num_seqs": 16, "min_tokens_per_rank": 64},
    ),
    "budgets smaller than a page": Fleet((6, 2, 9), 32, {"max_num_batched_tokens": 23, **TINY}),
    "pages of one token": Fleet(
        (150, 300), 1, {"max_num_batched_tokens": 64, "min_tokens_per_rank": 32}
    ),
}


def a_crowd(fleet: Fleet, number: int) -> list[Arrival]:
    """So many random requests of 1 to 400 tokens, one of ten aborted, one of ten with n = 2."""
    random = Random(number)
    return [
        Arrival(
            step=random.randrange(2 * number),
            prompt_token_ids=some_tokens(
                min(random.randint(1, random.choice((30, 400))), fleet.num_tokens - 1), seed=index
            ),
            params=SamplingParams(
                n=random.choice((1,) * 9 + (2,)), seed=index, max_tokens=random.randint(1, 60)
            ),
            aborted_after=random.choice((None,) * 9 + (random.randrange(60),)),
            in_a_step=random.random() < 0.5,
        )
        for index in range(number)
    ]


def several(number: int, length: int, **params: Any) -> list[Arrival]:
    """So many prompts of one length, all there from the start."""
    asked = SamplingParams(**{"ignore_eos": True, "seed": 1, **params})
    return [Arrival(0, some_tokens(length, seed=index), asked) for index in range(number)]


def preemptions(service: Service) -> list[int]:
    return [request.metrics.num_preemptions for request in service.requests]


@pytest.mark.parametrize("name", FLEETS)
def test_a_crowd_of_200_loses_no_page_and_no_token(name: str) -> None:
    fleet = FLEETS[name]
    service = Service(fleet, a_crowd(fleet, 200)).run()
    assert {r.finish_reason for r in service.requests} == {"abort", "stop", "length"}
    assert sum(preemptions(service)) > 0, "or the pools are too large to show anything"
    assert service.num_holders == len(fleet.num_pages), "a request grows over all ranks"


@pytest.mark.parametrize(
    "fleet",
    [
        Fleet((1,), 8, {"max_num_batched_tokens": 1}),
        Fleet((1, 1), 8, {"max_num_batched_tokens": 1}),
        Fleet((1, 1, 1), 1, {"max_num_batched_tokens": 1, "min_tokens_per_rank": 1}),
        Fleet((2, 1, 3), 4, {"max_num_batched_tokens": 3, "min_tokens_per_rank": 1}),
        Fleet((5, 1), 3, {"max_num_batched_tokens": 4, "max_num_seqs": 2}),
    ],
    ids=str,
)
def test_a_prompt_may_fill_all_pools_but_one_token(fleet: Fleet) -> None:
    """Many of them wait for each other, and each is served."""
    longest = fleet.num_tokens - 1
    waiting = [
        *several(3, longest, max_tokens=1),
        *several(3, 1, max_tokens=longest),
        *several(3, max(longest // 2, 1), max_tokens=None),
    ]
    service = Service(fleet, waiting).run()
    for request in service.requests[6:]:
        assert request.num_tokens == fleet.num_tokens, "None goes on until all pools are full"


def test_a_prompt_that_fills_all_pools_is_refused() -> None:
    engine, _ = Fleet((2, 1), 4).engine()
    with pytest.raises(InvalidRequestError, match=r"the prompt has 12 tokens.*\(12 tokens\)"):
        engine.add_request([1] * 12, SamplingParams())
    assert not engine.has_requests


def test_requests_on_one_rank_each_share_nothing() -> None:
    """Short requests are data-parallel: each on one rank, the ranks used alike."""
    fleet = Fleet((30, 30, 30), 4)
    service = Service(fleet, several(9, 20, max_tokens=10)).run()
    assert service.num_holders == 1
    ranks = [[tokens > 0 for tokens in r.metrics.kv_tokens] for r in service.requests]
    assert [sum(each) for each in zip(*ranks, strict=True)] == [3, 3, 3]


@pytest.mark.parametrize("strategy", ["pass_kv", "gather_kv", "pass_q"])
def test_a_forced_strategy_is_taken_wherever_keys_are_shared(strategy: str) -> None:
    """The audit of each step says so too; here it is certain that some keys are."""
    fleet = Fleet((9, 9), 4, {"attention_strategy": strategy, "min_tokens_per_rank": 16})
    service = Service(fleet, [*several(2, 40, max_tokens=5), *several(1, 5, max_tokens=5)]).run()
    assert service.strategies == {"local", strategy}


def test_strategies_are_chosen_for_each_step_by_themselves() -> None:
    fleet = Fleet((99, 99), 4, {"min_tokens_per_rank": 16})
    service = Service(fleet, several(1, 200, max_tokens=5)).run()
    assert service.strategies == {"pass_kv", "pass_q"}


def test_a_request_that_outgrows_its_rank_goes_on_on_the_next() -> None:
    service = Service(Fleet((3, 2, 4), 4), several(1, 6, max_tokens=30)).run()
    (request,) = service.requests
    assert request.metrics.kv_tokens == [12, 7, 16]
    assert preemptions(service) == [0]


def test_the_older_request_takes_the_younger_one_s_pages() -> None:
    service = Service(Fleet((20,), 4), several(2, 3, max_tokens=60)).run()
    older, younger = preemptions(service)
    assert older == 0 < younger


def test_a_preempted_request_goes_on_before_those_that_came_later() -> None:
    fleet = Fleet((20,), 4, {"max_num_seqs": 2})
    service = Service(fleet, several(3, 3, max_tokens=60)).run()
    first, second, third = (request.metrics for request in service.requests)
    assert second.num_preemptions > 0
    assert first.num_preemptions == 0
    assert second.finished_time is not None
    assert third.first_scheduled_time is not None
    assert third.first_scheduled_time > second.finished_time


def test_a_request_grows_behind_its_own_pages_rather_than_into_a_hole() -> None:
    engine, _ = simulated_engine([20], page_size=4)
    short, long = several(1, 4, max_tokens=1)[0], several(1, 8, max_tokens=30)[0]
    for each in (short, long):
        engine.add_request(each.prompt_token_ids, each.params)
    for _ in range(20):
        engine.step()
    (request,) = engine.scheduler.running
    assert request.holdings[0].extents == [Extent(1, 7)]


def test_a_prompt_under_way_keeps_the_pages_that_it_still_needs() -> None:
    """The second prompt waits, though there are pages free and a token's budget left."""
    fleet = Fleet((10,), 4, {"max_num_batched_tokens": 9})
    service = Service(fleet, [*several(1, 36, max_tokens=4), *several(1, 8, max_tokens=4)]).run()
    assert preemptions(service) == [0, 0]


def test_prompts_whose_pages_were_eaten_by_decode_tokens_come_to_an_end() -> None:
    fleet = Fleet((16, 16), 2, {"max_num_batched_tokens": 1, "min_tokens_per_rank": 2})
    crowd = [*several(1, 3, max_tokens=55), *several(1, 40, max_tokens=3)]
    service = Service(fleet, crowd).run()
    assert preemptions(service)[0] == 0
    assert sum(preemptions(service)) > 0


@pytest.mark.parametrize("in_a_step", [False, True], ids=["between steps", "in a step"])
@pytest.mark.parametrize("aborted_after", [0, 1, 2, 5])
def test_an_abort_frees_all_pages_at_once(in_a_step: bool, aborted_after: int) -> None:
    """Before a prompt's first chunk, between two, or while it decodes."""
    fleet = Fleet((9, 9), 4, {"max_num_batched_tokens": 12, "min_tokens_per_rank": 24})
    (stays,) = several(1, 10, max_tokens=12)
    goes = Arrival(0, some_tokens(48, 7), stays.params, aborted_after, in_a_step)
    service = Service(fleet, [goes, stays]).run()
    assert [r.finish_reason for r in service.requests] == ["abort", "length"]


def test_n_completions_differ_and_each_has_keys_of_its_own() -> None:
    service = Service(Fleet((30,), 4), several(1, 9, n=4, max_tokens=8)).run()
    assert len({tuple(r.output_token_ids) for r in service.requests}) == 4


def test_a_sampling_says_all_that_a_draw_depends_on() -> None:
    engine, executor = simulated_engine([9])
    samplings: list[Sampling] = []
    executor.before_step = lambda plans: samplings.extend(plans[0].samplings)
    params = SamplingParams(
        seed=7, max_tokens=3, min_tokens=2, stop_token_ids=[5], repetition_penalty=1.5, top_k=-1
    )
    group = engine.add_request([9, 8, 9], params)
    while engine.has_requests:
        engine.step()
    tokens = group.requests[0].output_token_ids
    assert [each.position for each in samplings] == [3, 4, 5]
    assert [each.banned_ids for each in samplings] == [(0, 5), (0, 5), ()], "0 ends a text too"
    assert [each.output_counts for each in samplings] == [Counter(tokens[:i]) for i in range(3)]
    for each in samplings:
        assert (each.prompt_ids, each.seed, each.repetition_penalty) == ((8, 9), 7, 1.5)
        assert each.top_k == 0, "which is how plans say that there is no such filter"


def test_a_token_that_ends_a_request_in_two_ways_ends_it_once() -> None:
    """It completes a stop string and is a stop token: the string counts, as it cuts the text."""
    (plain,) = lettered(SamplingParams(seed=1, max_tokens=5, ignore_eos=True))
    last = plain.token_ids[2]
    params = SamplingParams(
        seed=1, max_tokens=5, ignore_eos=True, stop_token_ids=[last], stop=Letters.decode([last])
    )
    (cut,) = lettered(params)
    assert (cut.token_ids, cut.text) == (plain.token_ids[:3], plain.text[:2])
    assert (cut.finish_reason, cut.stop_reason) == ("stop", params.stop)


class Letters:
    """A tokenizer whose tokens are letters."""

    @staticmethod
    def decode(token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("A") + token_id) for token_id in token_ids)


def lettered(params: SamplingParams) -> list[CompletionOutput]:
    engine, _ = simulated_engine([9], tokenizer=Letters())
    group = engine.add_request([1, 2, 3], params)
    while engine.has_requests:
        engine.step()
    return group.output().outputs


def test_a_key_that_is_changed_anywhere_changes_the_tokens_after_it() -> None:
    """The simulated model shows what it is there to show."""
    arrival = several(1, 20, max_tokens=6)[0]
    (right,) = alone(arrival, 100)
    for rank, slot in [(0, 0), (0, 7), (1, 3)]:
        engine, executor = simulated_engine([4, 4], min_tokens_per_rank=10)
        group = engine.add_request(arrival.prompt_token_ids, arrival.params)
        engine.step()
        executor.damage(rank, slot)
        while engine.has_requests:
            engine.step()
        (wrong,) = group.output().outputs
        assert wrong.token_ids[:1] == right.token_ids[:1]
        assert wrong.token_ids[1:] != right.token_ids[1:]


@pytest.mark.parametrize("pools", [(4000, 4000), (4000, 2000), (3000, 3500, 3200)], ids=str)
def test_short_requests_stay_on_one_rank_while_pools_are_nearly_empty(
    pools: tuple[int, ...],
) -> None:
    """With the default budget of 2048 and 1024 tokens a rank."""
    holders: list[int] = []
    for seed in range(5):
        random = Random(seed)
        engine, executor = simulated_engine(pools, page_size=16)
        executor.before_step = lambda plans: holders.extend(
            len(part.segment.shards) for part in parts(plans)
        )
        for _ in range(12):
            length = random.randint(10, 1900)
            engine.add_request(some_tokens(length, seed), SamplingParams(max_tokens=2))
        while engine.has_requests:
            engine.step()
    assert set(holders) == {1}


def test_a_request_is_not_put_where_a_running_prompt_needs_the_pages() -> None:
    """Both fit a rank alone: the first the first rank, the second the second."""
    for num_pages in [(12, 8), (14, 8)]:
        fleet = Fleet(num_pages, 4, {"max_num_batched_tokens": 18})
        long, short = several(1, 40, max_tokens=4), several(1, 20, max_tokens=4)
        assert Service(fleet, [*long, *short]).run().num_holders == 1


def test_no_two_completions_of_a_prompt_are_alike_unless_they_share_a_seed() -> None:
    engine, _ = simulated_engine([99])
    groups = [
        engine.add_request([1, 2, 3], SamplingParams(n=2, max_tokens=9, ignore_eos=True, seed=seed))
        for seed in (None, None, None, 7, 8, 9)
    ]
    while engine.has_requests:
        engine.step()
    outputs = [tuple(out.token_ids) for group in groups for out in group.output().outputs]
    assert len(set(outputs)) == len(outputs)


def test_a_name_that_a_user_gave_is_given_to_nobody_else() -> None:
    engine, _ = simulated_engine([99])
    named = engine.add_request([1], SamplingParams(), request_id="1")
    unnamed = [engine.add_request([1], SamplingParams()) for _ in range(3)]
    assert len({group.request_id for group in (named, *unnamed)}) == 4
    while engine.has_requests:
        engine.step()
    assert all(group.finished for group in (named, *unnamed))


@pytest.mark.parametrize("pools", [(100,), (100, 50)], ids=str)
def test_a_crowd_of_short_prompts_with_long_outputs_is_not_computed_twice(
    pools: tuple[int, ...],
) -> None:
    engine, executor = simulated_engine(pools, page_size=16)
    computed: list[int] = []
    executor.before_step = lambda plans: computed.extend(
        len(plan.token_ids) for plan in plans.values()
    )
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    for seed in range(100):
        engine.add_request(some_tokens(16, seed), params)
    while engine.has_requests:
        engine.step()
    assert sum(computed) < 1.5 * 100 * (16 + 200 - 1)


# Findings: each test states what should hold and fails today. The reason says which finding.

IDLE = "finding S6: ranks are chosen by free pages alone, also those whose budget is spent"


def test_no_rank_is_idle_while_requests_wait_that_fit_it() -> None:
    """The larger pool takes 2048 tokens a step; the smaller one has room and budget for more."""
    engine, executor = simulated_engine((4000, 2000), page_size=16)
    busy: list[set[int]] = []
    executor.before_step = lambda plans: busy.append(set(plans))
    for seed in range(8):
        engine.add_request(some_tokens(1500, seed), SamplingParams(max_tokens=1))
    while len(engine.scheduler.waiting) > 1:
        engine.step()
    assert all(ranks == {0, 1} for ranks in busy)
