"""Which steps are queued behind one that is under way, and what becomes of them."""

from typing import Any

import pytest
from audit import some_tokens
from simulated import Plans, simulated_engine

from longspan.engine.engine import Engine
from longspan.plan import UNKNOWN
from longspan.sampling_params import SamplingParams

PAGE = 4


class Told:
    """An engine of one rank or more; `plans` are those that ranks were given, step by step."""

    def __init__(self, *num_pages: int, **options: Any) -> None:
        self.engine, executor = simulated_engine(num_pages, page_size=PAGE, **options)
        self.plans: list[Plans] = []
        executor.before_step = self.plans.append

    def add(self, prompt: int = 6, **params: Any) -> str:
        params = {"max_tokens": 20, "ignore_eos": True, "seed": 1, **params}
        tokens = some_tokens(prompt, seed=prompt)
        return self.engine.add_request(tokens, SamplingParams(**params)).request_id

    @property
    def ahead(self) -> list[bool]:
        """Of each step so far whether its tokens were not known yet."""
        return [UNKNOWN in plan.token_ids for plans in self.plans for plan in plans.values()]


def drain(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def test_each_step_but_the_first_is_queued_behind_the_one_before() -> None:
    told = Told(100)
    told.add()
    told.engine.step()
    assert told.ahead == [False, True], "the first is done, the second is known"
    told.engine.step()
    assert told.ahead == [False, True, True]
    drain(told.engine)
    assert told.ahead == [False] + 19 * [True], "and none for a token that will not be"


def test_it_can_be_turned_off() -> None:
    told = Told(100, async_scheduling=False)
    told.add()
    drain(told.engine)
    assert told.ahead == 20 * [False]


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.5}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}],
    ids=str,
)
def test_what_depends_on_the_tokens_drawn_before_waits_for_them(params: dict[str, float]) -> None:
    told = Told(100)
    told.add(**params)
    drain(told.engine)
    assert told.ahead == 20 * [False]


def test_the_end_is_forbidden_for_as_many_tokens_as_without() -> None:
    banned = []
    for on in (False, True):
        told = Told(100, async_scheduling=on)
        told.add(min_tokens=5, ignore_eos=False, max_tokens=9, stop_token_ids=[7])
        drain(told.engine)
        samplings = [plans[0].samplings[0] for plans in told.plans]
        banned.append([one.banned_ids for one in samplings if one.position < 6 + 7])
    assert banned[0] == banned[1]
    assert banned[0][:6] == 5 * [(0, 7)] + [()]


def test_a_prompt_that_can_begin_is_not_put_off() -> None:
    told = Told(100)
    told.add()
    told.engine.step()
    told.add(9)
    told.engine.step()  # what is queued is done before
    assert told.ahead == [False, True]
    told.engine.step()
    assert [len(plan.token_ids) for plan in told.plans[2].values()] == [1 + 9]
    assert told.ahead[2:] == [False, True], "then both decode"
    assert [len(plan.token_ids) for plan in told.plans[3].values()] == [2]


def test_one_that_can_not_begin_does_not_make_others_wait() -> None:
    told = Told(100, max_num_seqs=1)
    told.add()
    told.add(9)
    for _ in range(10):
        told.engine.step()
    assert told.ahead == [False] + 10 * [True]


def test_a_text_that_ends_by_itself_costs_one_token_and_keeps_no_page() -> None:
    outputs = []
    for on in (False, True):
        told = Told(100, async_scheduling=on)
        first = told.engine.add_request(
            some_tokens(6, 6), SamplingParams(max_tokens=20, ignore_eos=True, seed=1)
        )
        drain(told.engine)
        last = first.output().outputs[0].token_ids[7]
        told.plans.clear()
        params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1, stop_token_ids=[last])
        group = told.engine.add_request(some_tokens(6, 6), params)
        drain(told.engine)
        outputs.append(group.output().outputs[0])
        end = len(outputs[-1].token_ids)
        assert outputs[-1].finish_reason == "stop"
        assert len(told.plans) == end + on
        assert told.engine.ledger.free == [100]
    assert outputs[0] == outputs[1]


def test_an_abort_frees_pages_when_all_that_was_begun_is_done() -> None:
    told = Told(100)
    name = told.add()
    told.engine.step()
    told.engine.abort(name)
    assert told.engine.ledger.free < [100]
    told.engine.step()
    assert told.engine.ledger.free == [100]
    assert not told.engine.has_requests
    assert len(told.plans) == 2


def test_a_page_that_is_not_there_is_not_promised() -> None:
    """Two requests need a page with the same token, and the rank has one."""
    told = Told(4)
    for _ in range(2):
        told.add(PAGE - 1, max_tokens=5)
    drain(told.engine)
    assert told.engine.ledger.free == [4]
    told = Told(3)
    for _ in range(2):
        told.add(PAGE - 1, max_tokens=5)
    told.engine.step()
    told.engine.step()
    assert not told.ahead[-1]
    drain(told.engine)
    assert told.engine.ledger.free == [3]


@pytest.mark.parametrize("joins", [False, True])
def test_on_several_ranks_it_is_all_of_them_or_none(joins: bool) -> None:
    told = Told(100, 100, joins=joins)
    for prompt in (6, 9):
        told.add(prompt)
    drain(told.engine)
    for plans in told.plans:
        unknown = {UNKNOWN in plan.token_ids for plan in plans.values()}
        assert len(unknown) == 1
    assert any(told.ahead)
    assert any(plan.joint for plans in told.plans for plan in plans.values()) == joins
