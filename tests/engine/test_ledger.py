"""Every page has one owner or none, and pages come in the longest extents there are."""

import time
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.engine.ledger import Ledger
from longspan.plan import Extent

PAGE_SIZE = 4

pools = st.lists(st.integers(0, 24), min_size=1, max_size=4)
operations = st.lists(
    st.tuples(st.booleans(), st.integers(0, 1000), st.integers(0, 1000)), max_size=60
)


def pages(extents: list[Extent]) -> list[int]:
    return [page for extent in extents for page in range(extent.start, extent.end)]


def longest_run(free: set[int]) -> int:
    """The length of the longest run of consecutive free pages."""
    longest = length = 0
    for page in range(max(free, default=0) + 1):
        length = length + 1 if page in free else 0
        longest = max(longest, length)
    return longest


def run_from(free: set[int], page: int) -> int:
    """How many consecutive pages are free from `page` on."""
    end = page
    while end in free:
        end += 1
    return end - page


class Owners:
    """What a ledger should know, page by page; every step compares the two."""

    def __init__(self, num_pages: list[int]) -> None:
        self.ledger = Ledger(num_pages, PAGE_SIZE)
        self.free = [set(range(pages)) for pages in num_pages]
        self.held: list[tuple[int, list[Extent]]] = []

    def apply(self, is_allocation: bool, which: int, size: int) -> None:
        if is_allocation:
            rank = which % len(self.free)
            if self.free[rank]:
                self.allocate(rank, 1 + size % len(self.free[rank]), after=None)
        elif self.held and size % 2:
            rank, extents = self.held[which % len(self.held)]
            if self.free[rank]:
                self.allocate(rank, 1 + size % len(self.free[rank]), after=extents[-1].end - 1)
        elif self.held:
            self.release(which % len(self.held))

    def allocate(self, rank: int, number: int, after: int | None) -> None:
        free = self.free[rank]
        taken = self.ledger.allocate(rank, number, after)
        got = pages(taken)
        assert len(got) == number, "as many pages as were asked for"
        assert set(got) <= free, "no page has two owners"
        assert len(set(got)) == number, "no page is given out twice"
        assert all(first.end != second.start for first, second in pairwise(taken)), "joined extents"
        if after is not None and after + 1 in free:
            following = min(number, run_from(free, after + 1))
            assert taken[0] == Extent(after + 1, following), "the extent goes on where it can"
        elif longest_run(free) >= number:
            assert len(taken) == 1, "one extent where one is long enough"
        free -= set(got)
        self.held.append((rank, taken))

    def release(self, index: int) -> None:
        rank, extents = self.held.pop(index)
        self.ledger.release(rank, extents)
        self.free[rank] |= set(pages(extents))

    def check_counts(self) -> None:
        for rank, free in enumerate(self.free):
            assert self.ledger.free[rank] == len(free)
            assert self.ledger.num_used(rank) == self.ledger.num_pages[rank] - len(free)

    def check_extents(self) -> None:
        """The longest run of free pages is one extent, however it came to be free."""
        for rank, free in enumerate(self.free):
            if free:
                taken = self.ledger.allocate(rank, longest_run(free))
                assert len(taken) == 1
                self.ledger.release(rank, taken)


@given(pools, operations)
def test_pages_have_one_owner_and_none_is_lost(
    num_pages: list[int], sequence: list[tuple[bool, int, int]]
) -> None:
    owners = Owners(num_pages)
    for operation in sequence:
        owners.apply(*operation)
        owners.check_counts()
        owners.check_extents()
    while owners.held:
        owners.release(0)
    for rank, size in enumerate(num_pages):
        assert owners.ledger.free[rank] == size
        if size:
            assert owners.ledger.allocate(rank, size) == [Extent(0, size)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.randoms())
def test_pages_given_back_in_any_order_become_one_extent(sizes: list[int], random: Random) -> None:
    ledger = Ledger([sum(sizes)], PAGE_SIZE)
    held = [ledger.allocate(0, size) for size in sizes]
    random.shuffle(held)
    for extents in held:
        ledger.release(0, extents)
    assert ledger.allocate(0, sum(sizes)) == [Extent(0, sum(sizes))]


@given(pools, operations, st.data())
def test_a_page_given_back_twice_is_caught(
    num_pages: list[int], sequence: list[tuple[bool, int, int]], data: st.DataObject
) -> None:
    owners = Owners(num_pages)
    for operation in sequence:
        owners.apply(*operation)
    free = [(rank, page) for rank, pages in enumerate(owners.free) for page in sorted(pages)]
    if free:
        rank, page = data.draw(st.sampled_from(free))
        length = data.draw(st.integers(1, num_pages[rank] - page))
        with pytest.raises(AssertionError):
            owners.ledger.release(rank, [Extent(page, length)])


def test_more_pages_than_are_free_are_never_given_out() -> None:
    ledger = Ledger([3, 5], PAGE_SIZE)
    with pytest.raises(AssertionError):
        ledger.allocate(0, 4)
    ledger.allocate(0, 3)
    with pytest.raises(AssertionError):
        ledger.allocate(0, 1)
    with pytest.raises(AssertionError):
        ledger.allocate(1, 0)


def test_an_extent_goes_on_past_a_smaller_hole_and_then_where_it_is_longest() -> None:
    ledger = Ledger([20], PAGE_SIZE)
    ledger.allocate(0, 20)
    ledger.release(0, [Extent(3, 2), Extent(8, 3), Extent(12, 6)])
    assert ledger.allocate(0, 10, after=2) == [Extent(3, 2), Extent(12, 6), Extent(8, 2)]
    assert ledger.free[0] == 1


def test_ranks_have_pools_of_their_own() -> None:
    ledger = Ledger([2, 0, 7], PAGE_SIZE)
    assert ledger.num_ranks == 3
    assert ledger.num_tokens == 9 * PAGE_SIZE
    ledger.allocate(2, 7)
    assert [ledger.free[rank] for rank in range(3)] == [2, 0, 0]
    assert [ledger.num_used(rank) for rank in range(3)] == [0, 0, 7]


def test_tokens_take_whole_pages() -> None:
    ledger = Ledger([1], PAGE_SIZE)
    assert [ledger.pages_of(tokens) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_requests_that_decode_side_by_side_keep_long_extents() -> None:
    """64 of them grow from 1 page to 64 in a pool that has twice the pages: 1 or 2 extents each."""
    ledger = Ledger([64 * 64 * 2], PAGE_SIZE)
    last_pages = [ledger.allocate(0, 1)[-1].start for _ in range(64)]
    num_extents = 64
    for _ in range(63):
        for index, last_page in enumerate(last_pages):
            (extent,) = ledger.allocate(0, 1, after=last_page)
            num_extents += extent.start != last_page + 1
            last_pages[index] = extent.start
    assert num_extents <= 2 * 64 + 64


def test_pages_of_a_scattered_pool_are_found_in_one_pass() -> None:
    """2,000 of 32,000 free pages of which no two are neighbours, in less than 100 passes' time."""
    ledger = Ledger([64_000], PAGE_SIZE)
    ledger.allocate(0, 64_000)
    ledger.release(0, [Extent(page, 1) for page in range(0, 64_000, 2)])
    began = time.process_time()
    for _ in range(100):
        max(ledger.num_pages[0] for _ in range(32_000))
    allowed = time.process_time() - began
    began = time.process_time()
    ledger.allocate(0, 2000)
    assert time.process_time() - began < allowed


def test_a_page_that_the_pool_does_not_have_is_not_taken_back() -> None:
    ledger = Ledger([4], PAGE_SIZE)
    ledger.allocate(0, 2)
    with pytest.raises(AssertionError):
        ledger.release(0, [Extent(4, 1)])
