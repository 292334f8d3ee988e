"""What a step has to give is shared among prompts: those that need least first, a page at least."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.config import EngineConfig
from longspan.engine.detokenizer import Detokenizer
from longspan.engine.draft import MAX_SHARES, Draft, lone_factor
from longspan.engine.request import Request
from longspan.engine.step import Chunk, prefill_chunk
from longspan.plan import Run
from longspan.sampling_params import SamplingParams

PAGE = 4


class Cost:
    """A step takes a second, and each token on a rank another one."""

    base_seconds = 1.0

    def prefill_seconds(self, new: int, cached: int, degree: int) -> float:
        return new / degree

    def tokens_within(self, seconds: float, cached: int, degree: int) -> int:
        return int(seconds * degree)


def a_request(tokens: int, ranks: list[int], priority: int = 0) -> Request:
    request = Request(
        request_id="r",
        prompt_token_ids=[0] * tokens,
        params=SamplingParams(),
        seed=0,
        end_ids=frozenset(),
        max_tokens=9,
        detokenizer=Detokenizer(None),
        order=(priority, 0),
    )
    request.ranks = ranks
    return request


def config(max_tokens: int, max_seconds: float | None) -> EngineConfig:
    return EngineConfig(
        model="model",
        max_num_batched_tokens=max_tokens,
        max_step_time=max_seconds,
        page_size=PAGE,
    )


def draft_of(max_tokens: int, max_seconds: float | None, *requests: Request) -> Draft:
    draft = Draft(range(3), 3, config(max_tokens, max_seconds), Cost())
    for request in requests:
        draft.add_prefilling(request)
    return draft


def take(draft: Draft, request: Request) -> dict[int, int]:
    """Take all that a request may, as far as it needs it; what that is on each of its ranks."""
    budgets, start, runs = draft.fair_budgets(request), 0, {}
    for rank, budget in budgets.items():
        request.holding(rank)
        if length := min(budget, request.num_tokens - start):
            runs[rank] = [Run(start, length)]
            start += length
    if runs:
        draft.take_prefill(prefill_chunk(request, runs, lambda request, shards: "pass_kv"))
    draft.remove_prefilling(request, request.ranks)
    return budgets


prompts = st.lists(
    st.builds(
        a_request,
        st.integers(1, 60),
        st.sampled_from(([0], [1], [2], [0, 1], [2, 0], [1, 2, 0])),
    ),
    min_size=1,
    max_size=7,
)


@given(prompts, st.integers(1, 60), st.sampled_from((None, 5.0, 30.0)))
def test_a_part_is_a_page_at_least_and_all_together_no_more_than_there_is(
    requests: list[Request], max_tokens: int, max_seconds: float | None
) -> None:
    draft = draft_of(max_tokens, max_seconds, *requests)
    for request in requests:
        left = list(draft.tokens)
        budgets = take(draft, request)
        assert budgets.keys() == set(request.ranks)
        for rank, budget in budgets.items():
            assert min(PAGE, left[rank]) <= budget <= left[rank]
    assert all(left >= 0 for left in draft.tokens)
    assert not any(draft.num_prefilling.values())


@given(prompts, st.sampled_from((3.0, 10.0, 50.0)))
def test_no_rank_computes_for_longer_than_it_may_but_for_a_page_each(
    requests: list[Request], max_seconds: float
) -> None:
    draft = draft_of(10_000, max_seconds, *requests)
    for request in requests:
        take(draft, request)
    for rank, seconds in enumerate(draft.prefill_seconds):
        degrees = [len(request.ranks) for request in requests if rank in request.ranks]
        number = len(degrees)
        most = max_seconds * (lone_factor(degrees[0]) if number == 1 else 1)
        assert seconds <= max(most - 1, 1) + number * PAGE


def test_what_the_first_do_not_need_the_last_may_take() -> None:
    short, middle, long = a_request(5, [0]), a_request(20, [0]), a_request(500, [0])
    draft = draft_of(100, None, short, middle, long)
    assert [take(draft, request)[0] for request in (short, middle, long)] == [5, 20, 75]


def test_those_that_need_more_share_alike() -> None:
    requests = [a_request(500, [0]) for _ in range(4)]
    draft = draft_of(100, None, *requests)
    assert [take(draft, request) for request in requests] == [{0: 25}] * 4


def test_time_is_shared_as_tokens_are() -> None:
    short, *long = a_request(5, [0]), a_request(500, [0]), a_request(500, [0])
    draft = draft_of(10_000, 31, short, *long)
    assert take(draft, short)[0] >= 5
    assert [take(draft, request)[0] for request in long] == [12, 13]


def test_on_several_ranks_the_one_with_least_time_counts() -> None:
    draft = draft_of(10_000, 21, *(a_request(500, [0]) for _ in range(3)))
    wide = a_request(500, [0, 1])
    draft.add_prefilling(wide)
    assert draft.fair_budgets(wide) == {0: 5, 1: 5}, "20 seconds for four on rank 0"


def test_each_rank_gives_what_tokens_it_has_left() -> None:
    local, wide = a_request(500, [0]), a_request(500, [0, 1])
    draft = draft_of(100, None, local, wide)
    assert draft.fair_budgets(wide) == {0: 50, 1: 100}


def test_prefill_may_take_as_long_as_a_step_takes_anyhow() -> None:
    draft = draft_of(100, 10)
    assert draft.prefill_time(0) == 9
    draft.decode_seconds[0] = 5
    assert draft.prefill_time(0) == 4
    draft.decode_seconds[0] = 50
    assert draft.prefill_time(0) == 1
    assert draft_of(100, None).prefill_time(0) == inf


def test_a_prompt_that_is_alone_and_keeps_nobody_waiting_may_take_longer() -> None:
    first, second = a_request(500, [0, 1]), a_request(500, [1])
    draft = draft_of(10_000, 10, first)
    assert draft.prefill_time(0) == lone_factor(2) * 10 - 1
    draft.add_prefilling(second)
    assert draft.prefill_time(1) == 9, "not alone"
    draft.decode_seconds[0] = 2
    assert draft.prefill_time(0) == 7, "somebody waits for a token"


def test_there_is_room_while_some_idle_rank_has_a_token_left() -> None:
    draft = Draft([0, 2], 3, config(9, None), Cost())
    assert draft.has_room
    draft.tokens[0] = 0
    assert draft.has_room
    draft.tokens[2] = 0
    assert not draft.has_room, "what rank 1 has is of no use, as it is at work"


@pytest.mark.parametrize(
    ("others", "tokens", "room"),
    [
        (MAX_SHARES - 1, 500, True),  # its part is much
        (MAX_SHARES, 500, False),
        (MAX_SHARES, 20, True),  # its part is all that it needs
        (MAX_SHARES, 21, False),
        (9, 10, True),
    ],
)
def test_a_new_prompt_has_room_for_much_of_it_or_all(others: int, tokens: int, room: bool) -> None:
    for max_tokens, max_seconds in [(100, None), (10_000, 101)]:
        draft = draft_of(max_tokens, max_seconds, *(a_request(500, [0]) for _ in range(others)))
        assert draft.has_room_for(tokens, 0, [0], priority=0) == room
        assert draft.has_room_for(2 * tokens, 0, [0, 1], priority=0) == room
        assert draft.has_room_for(tokens, 0, [1], priority=0)


def test_a_new_prompt_has_no_room_that_leaves_others_less_than_a_page() -> None:
    two = [a_request(500, [0]) for _ in range(2)]
    assert draft_of(3 * PAGE, None, *two).has_room_for(500, 0, [0], priority=0)
    assert not draft_of(3 * PAGE - 1, None, *two).has_room_for(500, 0, [0], priority=0)
    assert draft_of(1, None).has_room_for(500, 0, [0], priority=0), "alone it has all there is"


def test_prompts_share_with_their_own_priority_and_make_room_for_more_urgent_ones() -> None:
    crowd = [a_request(500, [0]) for _ in range(MAX_SHARES)]
    late, *_ = crowd
    draft = draft_of(100, None, *crowd)
    assert draft.has_room_for(500, 0, [0], priority=-1)
    assert not draft.has_room_for(500, 0, [0], priority=1)
    urgent = a_request(500, [0], priority=-1)
    draft.add_prefilling(urgent)
    assert draft.fair_budgets(urgent) == {0: 100}
    assert draft.fair_budgets(late) == {0: 25}


def test_a_chunk_takes_its_tokens_and_its_time_from_all_its_ranks() -> None:
    request = a_request(20, [0, 2])
    draft = draft_of(100, None, request)
    for rank in (0, 2):
        request.holding(rank)
    runs = {0: [Run(0, 12)], 2: [Run(12, 4)]}
    chunk: Chunk = prefill_chunk(request, runs, lambda request, shards: "pass_kv")
    draft.take_prefill(chunk)
    assert draft.tokens == [88, 100, 96]
    assert draft.prefill_seconds == [8, 0, 8]
