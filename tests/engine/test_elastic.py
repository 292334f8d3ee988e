"""Who runs where, with whom and when: short requests alone, long ones shared, nobody for ever last.

Each test runs an engine over simulated ranks and looks at the steps that it starts. Ranks are done
at once unless a test holds them up.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count, pairwise

import pytest
from audit import some_tokens
from simulated import Plans, simulated_engine

from longspan.cost.rates import CPU_THREAD, LinkRates
from longspan.engine.completion import Group
from longspan.engine.request import Request
from longspan.engine.scheduler import LOOKAHEAD
from longspan.plan import Segment
from longspan.sampling_params import SamplingParams

PAGE = 4

SLOW_EXCHANGES = replace(
    CPU_THREAD, links={"host": LinkRates(seconds=1e-2, bytes=2.4e9, overlap=0)}
)
"""What moves once instead of being asked for with each token has paid soon."""

HEAVY_ATTENTION = replace(CPU_THREAD, attention_flops=1e9)
"""A token over 1000 keys takes four milliseconds."""

CACHING = {
    "enable_prefix_caching": True,
    "rates": replace(CPU_THREAD, linear_flops=1e6),
    "max_step_time": None,
    "min_tokens_per_rank": 10_000,
}
"""Each token takes two milliseconds, so that it matters what has been computed before."""


class Watched:
    """An engine whose steps are written down; ranks in `held` are not done until they are let go.

    A step is told as the ranks that are in it and the segments of its requests. The next one is
    not planned before it is done, so that a test knows which one is under way.
    """

    def __init__(self, num_pages: Sequence[int], **options: object) -> None:
        self.held: set[int] = set()
        self.engine, executor = simulated_engine(
            num_pages,
            page_size=PAGE,
            order=lambda ranks: [rank for rank in ranks if rank not in self.held],
            **{"async_scheduling": False, **options},
        )
        self.steps: list[tuple[set[int], dict[str, Segment]]] = []
        executor.before_step = self._note
        self._seeds = count()

    def _note(self, plans: Plans) -> None:
        segments = (part.segment for plan in plans.values() for part in plan.parts)
        self.steps.append((set(plans), {segment.request_id: segment for segment in segments}))

    def add(self, prompt: int | Sequence[int], new: int = 1, *, n: int = 1, at: int = 0) -> Group:
        """A request for so many tokens; a prompt that is given as a length is like no other one."""
        if isinstance(prompt, int):
            prompt = some_tokens(prompt, next(self._seeds))
        params = SamplingParams(n=n, max_tokens=new, ignore_eos=True, seed=1)
        return self.engine.add_request(prompt, params, priority=at)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.step()

    def finish(self) -> None:
        while self.engine.has_requests:
            self.step()

    def until(self, group: Group, tokens: int, within: int = 1000) -> int:
        """Go on until a request has drawn so many tokens; returns how many steps that took."""
        for steps in range(within):
            if num_drawn(group) >= tokens:
                return steps
            self.step()
        raise AssertionError(f"{num_drawn(group)} tokens in {within} steps")

    def segments_of(self, group: Group) -> list[Segment]:
        names = {request.request_id for request in group.requests}
        return [s for _, segments in self.steps for name, s in segments.items() if name in names]


def num_drawn(group: Group) -> int:
    return len(only(group).output_token_ids)


def only(group: Group) -> Request:
    (request,) = group.requests
    return request


def ranks_of(segments: Iterable[Segment]) -> set[tuple[int, ...]]:
    return {tuple(shard.rank for shard in segment.shards) for segment in segments}


def num_new(segment: Segment) -> int:
    return sum(shard.num_queries for shard in segment.shards)


# Short and long ones in one step, and apart


def test_short_requests_stay_local_in_a_step_with_one_that_is_shared() -> None:
    fleet = Watched([50, 50, 50], min_tokens_per_rank=32)
    long = fleet.add(300, 20)
    shorts = [fleet.add(12, 20) for _ in range(6)]
    fleet.finish()
    assert ranks_of(fleet.segments_of(long)) == {(0, 1, 2)}
    for short in shorts:
        (ranks,) = ranks_of(fleet.segments_of(short))
        assert len(ranks) == 1
        assert {segment.strategy for segment in fleet.segments_of(short)} == {"local"}
    together = [segments for _, segments in fleet.steps if f"{long.request_id}/0" in segments]
    assert max(len(segments) for segments in together) == 7


def test_ranks_go_separate_ways_when_what_they_shared_has_ended() -> None:
    fleet = Watched([50, 50, 50], min_tokens_per_rank=32)
    long, *_ = fleet.add(300, 5), *(fleet.add(12, 20) for _ in range(3))
    fleet.until(long, 5)
    before = len(fleet.steps)
    fleet.finish()
    assert [ranks for ranks, _ in fleet.steps[:before]].count({0, 1, 2}) >= 5
    assert {len(ranks) for ranks, _ in fleet.steps[before:]} == {1}


def test_a_rank_steps_on_while_a_team_of_others_is_at_work() -> None:
    fleet = Watched([50, 50, 50], min_tokens_per_rank=50)
    shared, local = fleet.add(100, 20), fleet.add(20, 20)
    fleet.until(shared, 1)
    assert ranks_of(fleet.segments_of(shared)) == {(0, 1)}
    assert ranks_of(fleet.segments_of(local)) == {(2,)}
    fleet.held = {1}
    fleet.step()
    drawn = num_drawn(shared), num_drawn(local)
    fleet.step(9)
    assert (num_drawn(shared), num_drawn(local)) == (drawn[0], drawn[1] + 9)
    fleet.held = set()
    fleet.finish()
    assert num_drawn(shared) == 20


def test_all_ranks_of_a_team_are_busy_until_the_last_of_them_is_done() -> None:
    fleet = Watched([50, 50], min_tokens_per_rank=50)
    shared, local = fleet.add(100, 20), fleet.add(20, 20)
    fleet.until(shared, 1)
    fleet.held = {0}
    fleet.step(5)
    started = len(fleet.steps)
    fleet.step(5)
    assert len(fleet.steps) == started
    fleet.held = set()
    fleet.step(2)
    assert num_drawn(shared) == num_drawn(local) == 3


def test_an_abort_between_two_steps_sets_ranks_free_at_once() -> None:
    fleet = Watched([50, 50], min_tokens_per_rank=50)
    shared, left, right = fleet.add(100, 50), fleet.add(20, 50), fleet.add(20, 50)
    fleet.until(shared, 1)
    fleet.engine.abort(shared.request_id)
    fleet.held = {0}
    before = num_drawn(left) + num_drawn(right)
    fleet.step(10)
    assert num_drawn(left) + num_drawn(right) == before + 10, "the rank that is not held goes on"


# Growth


def test_a_request_that_outgrows_its_rank_goes_on_on_the_emptiest() -> None:
    fleet = Watched([2, 4, 9])
    group = fleet.add(6, 54)
    homes = []
    while fleet.engine.has_requests:
        fleet.step()
        homes.append(only(group).home)
    assert list(dict.fromkeys(homes)) == [2, 1, 0, None]
    assert len(homes) == 54, "and waits for nothing"


def test_a_request_that_spreads_waits_for_its_new_rank_but_not_for_ever() -> None:
    """Rank 1 is at work when rank 0 is full; both are one team from then on."""
    fleet = Watched([6, 40])
    other = fleet.add(20, 100)
    grows = fleet.add(16, 30)
    fleet.step()
    assert [only(group).home for group in (other, grows)] == [1, 0]
    fleet.held = {1}
    fleet.step(50)
    assert num_drawn(grows) == 24 - 16 + 1, "all that rank 0 has room for"
    fleet.held = set()
    assert fleet.until(grows, 10, within=3) <= 2
    before = num_drawn(other)
    assert fleet.until(grows, 30, within=25) <= 21
    assert num_drawn(other) >= before + 19, "they step together"


def test_a_request_that_spreads_is_not_put_off_by_new_ones_on_the_other_rank() -> None:
    fleet = Watched([6, 40])
    fleet.add(20, 20)
    grows = fleet.add(16, 30)
    while not grows.finished:
        fleet.held = {len(fleet.steps) % 2}
        if len(fleet.engine.scheduler.waiting) < 2:
            fleet.add(8, 3)
        fleet.step()
        fleet.held = set()
        assert len(fleet.steps) < 300


# Prompts side by side


def test_several_long_prompts_go_on_together() -> None:
    fleet = Watched([400, 400], max_num_batched_tokens=64, min_tokens_per_rank=100)
    groups = [fleet.add(640) for _ in range(4)]
    longest = 0
    waits = dict.fromkeys(range(4), 0)
    while fleet.engine.has_requests:
        before = [only(group).num_computed for group in groups]
        fleet.step()
        for number, group in enumerate(groups):
            goes_on = group.finished or only(group).num_computed > before[number]
            waits[number] = 0 if goes_on else waits[number] + 1
            longest = max(longest, waits[number])
    assert longest == 0, "each has a part of each step"
    assert len(fleet.steps) <= 1.2 * 4 * 640 / (2 * 64)


def test_a_short_prompt_beside_long_ones_has_its_first_token_in_one_step() -> None:
    fleet = Watched([400, 400], max_num_batched_tokens=64, min_tokens_per_rank=100)
    long = [fleet.add(640) for _ in range(2)]
    fleet.step(3)
    shorts = [fleet.add(10) for _ in range(3)]
    fleet.step()
    assert all(short.finished for short in shorts)
    assert not any(group.finished for group in long)


@pytest.mark.parametrize("length", [16, 20, 32, 70])
@pytest.mark.parametrize("max_tokens", [8, 32, 48, 64])
def test_a_long_prompt_is_not_starved_by_short_ones_that_keep_coming(
    max_tokens: int, length: int
) -> None:
    """It has begun, and a step has room for a few pages only."""
    fleet = Watched([400], max_num_batched_tokens=max_tokens)
    long = fleet.add(200)
    fleet.step()
    while not long.finished:
        while len(fleet.engine.scheduler.waiting) < 4:
            fleet.add(length)
        fleet.step()
        assert len(fleet.steps) < 300


@pytest.mark.parametrize("ranks", [1, 3])
def test_chunks_shrink_as_the_cache_grows_and_steps_take_no_longer(ranks: int) -> None:
    limit = 0.05
    fleet = Watched(
        [1000] * ranks,
        rates=HEAVY_ATTENTION,
        max_step_time=limit,
        max_num_batched_tokens=4096,
        min_tokens_per_rank=1000,
    )
    long, beside = fleet.add(3000), fleet.add(4, 900)
    cost = fleet.engine.scheduler.cost
    seconds = []
    while not long.finished:
        before = only(long).num_computed
        fleet.step()
        if not long.finished:
            _, segments = fleet.steps[-1]
            page = cost.prefill_seconds(PAGE * ranks, before, ranks)
            seconds.append(max(cost.step_seconds(segments.values()).values()))
            assert seconds[-1] <= limit + page
    assert min(seconds) > limit / 2, "nor much shorter"
    sizes = [num_new(segment) for segment in fleet.segments_of(long)]
    assert all(after <= before + PAGE * ranks for before, after in pairwise(sizes[:-1]))
    assert sizes[-2] < sizes[0] / 2
    assert num_drawn(beside) >= len(sizes) - 1, "it has a token with each of them"


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_the_homes_of_long_requests_are_on_different_ranks(at_once: bool) -> None:
    fleet = Watched([400] * 4, max_num_batched_tokens=64, min_tokens_per_rank=16)
    groups = []
    for length in (300, 200, 330, 257, 99, 270, 310, 98):
        groups.append(fleet.add(length, 400))
        if not at_once:
            fleet.until(groups[-1], 1)
    for group in groups:
        fleet.until(group, 1)
    assert Counter(only(group).home for group in groups) == {0: 2, 1: 2, 2: 2, 3: 2}


# Who is next


@pytest.mark.parametrize("pages", [60, 24], ids=["with pages to spare", "with hardly any"])
def test_a_long_request_is_admitted_while_short_ones_keep_coming(pages: int) -> None:
    """It is to lie on all ranks, which are never idle together by themselves."""
    fleet = Watched([pages] * 3, min_tokens_per_rank=60, max_num_seqs=8)
    for _ in range(12):
        fleet.add(20, 9)
    fleet.step(5)
    long, number = fleet.add(200, 2), 0
    for number in count():
        while len(fleet.engine.scheduler.waiting) < 6:
            fleet.add(20, 9)
        if long.finished:
            break
        fleet.held = {number % 3, (number + 1) % 3}
        fleet.step()
        fleet.held = set()
        assert number < 120
    assert (0, 1, 2) in ranks_of(fleet.segments_of(long))


@pytest.mark.parametrize("bound", [LOOKAHEAD - 1, LOOKAHEAD])
def test_so_many_that_wait_for_a_busy_rank_are_passed_and_no_more(bound: int) -> None:
    """They begin like what rank 0 has in its cache, and wait for it; rank 1 is idle."""
    fleet = Watched([200, 200], **CACHING)
    known = some_tokens(200, 99)
    first = fleet.add(known)
    fleet.finish()
    assert ranks_of(fleet.segments_of(first)) == {(0,)}
    fleet.add((*known, 1, 1), 50)
    fleet.held = {0}
    fleet.step()
    waiting = [fleet.add((*known, 2, number)) for number in range(bound)]
    other = fleet.add(9)
    fleet.step(3)
    assert not any(fleet.segments_of(group) for group in waiting)
    assert other.finished == (bound < LOOKAHEAD)
    fleet.held = set()
    fleet.finish()
    assert ranks_of(s for group in waiting for s in fleet.segments_of(group)) == {(0,)}


def test_the_youngest_of_the_lowest_priority_gives_way() -> None:
    fleet = Watched([24])
    groups = [fleet.add(4, 60, at=5) for _ in range(2)]  # of 16 pages each
    fleet.step()
    groups += [fleet.add(4, 60, at=0) for _ in range(2)]
    preempted = []
    while fleet.engine.has_requests:
        fleet.step()
        numbers = [only(group).metrics.num_preemptions for group in groups]
        preempted += [i for i, number in enumerate(numbers) if number and i not in preempted]
    assert preempted == [1, 0, 3]


def test_a_victim_at_work_gives_way_as_soon_as_its_step_is_done() -> None:
    """All pages are taken when the oldest needs one; its rank goes on with what it can."""
    fleet = Watched([14, 10])
    oldest = fleet.add(4, 60)
    fleet.step()
    victim = fleet.add(14, 60, at=5)
    fleet.step()
    other = fleet.add(4, 60)
    fleet.step(22)
    assert {only(oldest).home, only(other).home} == {1 - only(victim).home}
    fleet.held = {only(victim).home}
    while any(fleet.engine.ledger.free) or only(oldest).num_computed % PAGE:
        fleet.step()
    before = num_drawn(oldest)
    fleet.step()
    assert only(victim).in_flight
    fleet.held = {only(oldest).home}
    fleet.step()
    assert only(other).in_flight
    assert only(victim).metrics.num_preemptions == 1
    fleet.held = set()
    fleet.step(2)
    assert num_drawn(oldest) > before
    assert only(oldest).metrics.num_preemptions == only(other).metrics.num_preemptions == 0


def test_requests_of_a_lower_number_go_first_and_of_the_same_older_ones() -> None:
    fleet = Watched([50], max_num_seqs=1)
    groups = [fleet.add(4, 2, at=at) for at in (3, 0, -1, 0)]
    fleet.finish()
    names = [name for _, segments in fleet.steps for name in segments]
    assert list(dict.fromkeys(names)) == [f"{groups[i].request_id}/0" for i in (2, 1, 3, 0)]


def test_an_urgent_prompt_does_not_wait_for_long_ones_that_are_not() -> None:
    fleet = Watched([2000], max_num_batched_tokens=256)
    long = [fleet.add(1500, at=5) for _ in range(5)]
    fleet.step(3)
    urgent = fleet.add(200)
    fleet.step()
    assert urgent.finished
    assert not any(group.finished for group in long)


def test_a_step_is_filled_whoever_is_more_urgent() -> None:
    for priorities in [(0, 0), (0, 1), (1, 0)]:
        fleet = Watched([400], max_num_batched_tokens=40)
        for length, at in zip((300, 4), priorities, strict=True):
            fleet.add(length, at=at)
        fleet.step()
        _, segments = fleet.steps[0]
        assert sum(num_new(segment) for segment in segments.values()) == 40


def test_prompts_that_are_for_a_crowded_rank_hold_nobody_back_from_others() -> None:
    """They fit no other one."""
    fleet = Watched([2000, 40, 40], max_num_batched_tokens=64, min_tokens_per_rank=5000)
    for _ in range(LOOKAHEAD):
        fleet.add(900)
    shorts = [fleet.add(8) for _ in range(4)]
    fleet.step()
    assert all(short.finished for short in shorts)


# Where keys are, and go


def test_a_gathered_request_decodes_alone_and_is_found_where_it_is_now() -> None:
    fleet = Watched(
        [40, 40, 40], min_tokens_per_rank=20, enable_prefix_caching=True, rates=SLOW_EXCHANGES
    )
    prompt = some_tokens(62, 1)
    group = fleet.add(prompt, 30)
    fleet.until(group, 1)
    assert set(only(group).holdings) == {0, 1, 2}
    fleet.until(group, 29)
    home = only(group).home
    assert set(only(group).holdings) == {home}
    assert only(group).ranks == [home]
    segments = fleet.segments_of(group)
    assert segments[-1].strategy == "local"
    assert {shard.cached for shard in segments[-1].shards} == {62 + 27}
    fleet.finish()
    again = fleet.add(prompt, 2)
    fleet.finish()
    assert again.output().num_cached_tokens == 60
    assert ranks_of(fleet.segments_of(again)) == {(home,)}
    assert again.output().outputs[0].token_ids == group.output().outputs[0].token_ids[:2]


def test_sequences_that_share_pages_are_gathered_each_for_itself() -> None:
    fleet = Watched(
        [90, 90, 90], min_tokens_per_rank=20, enable_prefix_caching=True, rates=SLOW_EXCHANGES
    )
    group = fleet.add(some_tokens(62, 1), 40, n=3)
    alone, _ = simulated_engine([1000], page_size=PAGE)
    wanted = alone.add_request(some_tokens(62, 1), group.requests[0].params)
    fleet.step(3)
    owners = {
        fleet.engine.ledger.num_owners(place)
        for request in group.requests
        for place in request.places.values()
    }
    assert max(owners) == 3
    fleet.step(30)
    assert [len(request.holdings) for request in group.requests] == [1, 1, 1]
    fleet.finish()
    while alone.has_requests:
        alone.step()
    assert group.output().outputs == wanted.output().outputs


def test_a_prompt_goes_to_an_idle_rank_rather_than_to_one_at_work_with_more_room() -> None:
    fleet = Watched([200, 90])
    decoding = fleet.add(10, 50)
    fleet.until(decoding, 2)
    assert only(decoding).home == 0
    fleet.held = {0}
    fleet.step()
    new = fleet.add(10)
    fleet.step()
    assert new.finished


def test_a_prompt_goes_to_the_rank_that_knows_its_beginning() -> None:
    fleet = Watched([200, 90], **CACHING)
    known = some_tokens(100, 99)
    fleet.add(known)
    fleet.finish()
    for _ in range(9):
        fleet.add(5, 50)
    groups = [fleet.add((*known, number), 9) for number in range(3)]
    fleet.finish()
    assert ranks_of(s for group in groups for s in fleet.segments_of(group)) == {(0,)}
    assert [group.output().num_cached_tokens for group in groups] == [100, 100, 100]
    assert (1,) in {tuple(ranks) for ranks, _ in fleet.steps}, "though others go to the emptier one"


@pytest.mark.parametrize(
    ("busy_with", "max_tokens", "chosen"), [(10, 2048, 0), (100, 2048, 1), (100, 16, 1)]
)
def test_but_to_another_rank_where_that_is_sooner_and_then_both_know_it(
    busy_with: int, max_tokens: int, chosen: int
) -> None:
    """So a popular beginning has a copy on each rank that had time for it."""
    fleet = Watched([200, 200], max_num_batched_tokens=max_tokens, **CACHING)
    known = some_tokens(40, 99)
    fleet.add(known)
    fleet.finish()
    fleet.add((*known, *some_tokens(busy_with, 7)))
    fleet.held = {0}
    fleet.step()
    group = fleet.add((*known, 1))
    fleet.step()
    fleet.held = set()
    fleet.finish()
    assert ranks_of(fleet.segments_of(group)) == {(chosen,)}
    hashes = only(group).page_hashes(10, PAGE)
    assert [set(hit) for hit in fleet.engine.ledger.cache.find(hashes)] == [{0, chosen}] * 10
    both = [fleet.add((*known, number)) for number in (2, 3)]
    fleet.finish()
    assert ranks_of(s for group in both for s in fleet.segments_of(group)) == {(0,), (chosen,)}
    assert [num_new(s) for group in both for s in fleet.segments_of(group)] == [1, 1]
