"""Whatever comes and goes, every token's key is where the plans say, and outputs never change.

Requests run over simulated ranks with tiny unequal pools, so that they grow from rank to rank and
take pages from each other. An audit follows every plan (see `audit.py`); the simulated model makes
every token depend on all keys before it (see `simulated.py`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, get_args

import pytest
from audit import FAST_LINKS, SLOW, Arrival, Fleet, Service, alone, parts, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import simulated_engine

from longspan.config import Strategy as AttentionStrategy
from longspan.cost.rates import CPU_THREAD, LinkRates
from longspan.errors import InvalidRequestError
from longspan.outputs import CompletionOutput
from longspan.plan import Extent, Sampling
from longspan.sampling_params import SamplingParams


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
            "min_tokens_per_rank": draw(st.sampled_from((None, 1, 5, 16, 1024))),
            "max_step_time": draw(st.sampled_from((None, 0.2, 0.005))),
            "rates": draw(st.sampled_from((CPU_THREAD, FAST_LINKS, SLOW))),
            "joins": draw(st.booleans()),
            "async_scheduling": draw(st.booleans()),
            "attention_strategy": draw(st.sampled_from(get_args(AttentionStrategy))),
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
        priority=draw(st.sampled_from((0, 0, 0, -1, 5))),
    )


@st.composite
def services(draw: st.DrawFn) -> Service:
    fleet = draw(fleets())
    if fleet.num_tokens == 1:  # has no room for a prompt and a token
        fleet = Fleet((2,), 1, fleet.options)
    return Service(fleet, draw(st.lists(arrivals(fleet), min_size=1, max_size=8)))


@pytest.mark.long
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


@pytest.mark.parametrize("strategy", ["pass_kv", "gather_kv", "pass_q", "tree"])
def test_a_forced_strategy_is_taken_wherever_keys_are_shared(strategy: str) -> None:
    """The audit of each step says so too; here it is certain that some keys are."""
    fleet = Fleet((9, 9), 4, {"attention_strategy": strategy, "min_tokens_per_rank": 16})
    service = Service(fleet, [*several(2, 40, max_tokens=5), *several(1, 5, max_tokens=5)]).run()
    assert service.strategies == {"local", strategy}


def test_strategies_are_chosen_for_each_step_by_themselves() -> None:
    """Messages take time for their bytes alone, so keys travel in the prefill, then queries."""
    links = {"host": LinkRates(0, 2.4e9, overlap=0)}
    by_bytes = replace(CPU_THREAD, attend_seconds=0.0, links=links)
    fleet = Fleet((99, 99), 4, {"min_tokens_per_rank": 16, "rates": by_bytes})
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
    assert request.holdings[0].extents == (Extent(1, 7),)


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


def test_no_rank_is_idle_while_requests_wait_that_fit_it() -> None:
    """The larger pool takes 2048 tokens a step; the smaller one has room and budget for more."""
    engine, executor = simulated_engine((4000, 2000), page_size=16)
    busy: set[int] = set()
    executor.before_step = lambda plans: busy.update(plans)
    for seed in range(8):
        engine.add_request(some_tokens(1500, seed), SamplingParams(max_tokens=1))
    while len(engine.scheduler.waiting) > 1:
        busy.clear()
        engine.step()
        assert busy == {0, 1}
