"""Shares are fair, and a zigzag gives every page to one rank and causal work to all alike."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.engine.shard import fair_shares, zigzag
from longspan.plan import Run

quick = settings(deadline=None, max_examples=500)

capacities = st.lists(st.one_of(st.just(0), st.integers(0, 8), st.integers(0, 5000)), max_size=9)
shares = st.lists(st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 300)), max_size=9)


@st.composite
def totals_that_fit(draw: st.DrawFn) -> tuple[int, list[int]]:
    room = draw(capacities)
    return draw(st.integers(0, sum(room))), room


def pages(runs: list[Run]) -> list[int]:
    return [page for run in runs for page in range(run.start, run.end)]


def causal_work(runs: list[Run]) -> int:
    """Pages of keys that these pages of queries see, each page itself included."""
    return sum(page + 1 for page in pages(runs))


@given(totals_that_fit())
@quick
def test_shares_sum_to_the_total_within_the_capacities(case: tuple[int, list[int]]) -> None:
    total, room = case
    given_out = fair_shares(total, room)
    assert sum(given_out) == total
    assert len(given_out) == len(room)
    assert all(0 <= share <= capacity for share, capacity in zip(given_out, room, strict=True))


@given(totals_that_fit())
@quick
def test_no_rank_with_room_has_two_pages_less_than_another(case: tuple[int, list[int]]) -> None:
    total, room = case
    given_out = fair_shares(total, room)
    for share, capacity in zip(given_out, room, strict=True):
        assert share == capacity or max(given_out) <= share + 1


@given(totals_that_fit())
@quick
def test_among_ranks_with_room_the_earlier_get_the_odd_pages(
    case: tuple[int, list[int]],
) -> None:
    total, room = case
    with_room = [
        share
        for share, capacity in zip(fair_shares(total, room), room, strict=True)
        if share < capacity
    ]
    assert with_room == sorted(with_room, reverse=True)


@given(st.integers(0, 500), st.integers(1, 9))
@quick
def test_with_room_everywhere_shares_are_even(total: int, ranks: int) -> None:
    even, odd = divmod(total, ranks)
    assert fair_shares(total, [total] * ranks) == [even + 1] * odd + [even] * (ranks - odd)


def test_examples_of_shares() -> None:
    assert fair_shares(0, []) == []
    assert fair_shares(0, [4, 0]) == [0, 0]
    assert fair_shares(2, [9, 9, 9]) == [1, 1, 0]
    assert fair_shares(10, [10, 1, 10]) == [5, 1, 4]
    assert fair_shares(7, [0, 100, 3]) == [0, 4, 3]
    assert fair_shares(11, [0, 8, 3]) == [0, 8, 3]


@given(shares)
@quick
def test_a_zigzag_gives_every_page_to_one_rank(shares: list[int]) -> None:
    runs = zigzag(shares)
    assert [len(pages(of_rank)) for of_rank in runs] == shares
    assert sorted(page for of_rank in runs for page in pages(of_rank)) == list(range(sum(shares)))


@given(shares)
@quick
def test_a_rank_of_a_zigzag_has_at_most_two_runs_apart_and_ascending(shares: list[int]) -> None:
    for runs in zigzag(shares):
        assert len(runs) <= 2
        assert all(run.length > 0 for run in runs)
        assert all(first.end < second.start for first, second in pairwise(runs))


@given(st.lists(st.integers(16, 400), min_size=1, max_size=16))
@quick
def test_causal_work_of_a_zigzag_is_in_proportion_to_the_shares(shares: list[int]) -> None:
    """A page of queries costs half of all pages on average.

    A share is off by its one odd page, and by the odd pages of the ranks before and after it.
    """
    total = sum(shares)
    for share, runs in zip(shares, zigzag(shares), strict=True):
        fair = share * (total + 1) / 2
        assert abs(causal_work(runs) - fair) <= fair * (1 / share + len(shares) / total)


@given(st.integers(1, 16), st.integers(128, 1000))
@quick
def test_even_shares_of_128_pages_and_more_are_balanced_within_two_percent(
    ranks: int, share: int
) -> None:
    work = [causal_work(runs) for runs in zigzag([share] * ranks)]
    assert max(work) <= 1.02 * min(work)


@given(st.integers(1, 16), st.integers(1, 100))
@quick
def test_even_shares_of_an_even_number_are_balanced_exactly(ranks: int, half: int) -> None:
    assert len({causal_work(runs) for runs in zigzag([2 * half] * ranks)}) == 1


@given(st.integers(2, 16), st.integers(1, 15))
@quick
def test_fewer_pages_than_ranks_go_to_the_first_ranks_one_each(ranks: int, total: int) -> None:
    total = min(total, ranks - 1)
    runs = zigzag(fair_shares(total, [1] * ranks))
    assert runs == [[Run(page, 1)] for page in range(total)] + [[]] * (ranks - total)


def test_examples_of_zigzags() -> None:
    assert zigzag([]) == []
    assert zigzag([0, 0]) == [[], []]
    assert zigzag([5]) == [[Run(0, 5)]]
    assert zigzag([2, 2]) == [[Run(0, 1), Run(3, 1)], [Run(1, 2)]]
    assert zigzag([4, 0, 4]) == [[Run(0, 2), Run(6, 2)], [], [Run(2, 4)]]
    assert zigzag([3, 1]) == [[Run(0, 2), Run(3, 1)], [Run(2, 1)]]
