"""Pages that are away come to a request's home where that pays, and the books follow."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.engine.detokenizer import Detokenizer
from longspan.engine.gather import Gatherer
from longspan.engine.ledger import Ledger
from longspan.engine.prefix_cache import Place
from longspan.engine.request import Request
from longspan.plan import Extent
from longspan.sampling_params import SamplingParams

PAGE = 4
FREE = [20, 20, 20]


class Cost:
    """A decode token takes so many seconds for each holder, and a page so many to move."""

    def __init__(self, move: float = 0.01, holder: float = 1.0) -> None:
        self._move = move
        self._holder = holder

    def decode_seconds(self, keys: Sequence[int]) -> float:
        return self._holder * len(keys)

    def move_seconds(self, tokens: int) -> float:
        return self._move * tokens / PAGE


def a_request(ledger: Ledger, ranks: Sequence[int], max_tokens: int = 10) -> Request:
    """One whose next token is the first of a page on its home; `ranks` says where each page is."""
    request = Request(
        request_id="r",
        prompt_token_ids=[0] * ((len(ranks) - 1) * PAGE + 1),
        params=SamplingParams(),
        seed=0,
        end_ids=frozenset(),
        max_tokens=max_tokens,
        detokenizer=Detokenizer(None),
    )
    request.ranks, request.home = list(dict.fromkeys(ranks)), ranks[-1]
    request.num_computed = request.num_tokens - 1
    for index, rank in enumerate(ranks):
        holding = request.holding(rank)
        extents = ledger.allocate(rank, 1, holding.last_page)
        holding.add_pages(extents)
        holding.tokens += PAGE if index < len(ranks) - 1 else 1
        request.places[index] = Place(rank, extents[0].start)
    return request


def gather(gatherer: Gatherer, request: Request) -> list[int]:
    """Gather to the end; how many pages go with each step."""
    sizes = []
    while request.to_gather and (gathering := gatherer.next_pages(request)):
        sizes.append(len(gathering.indices))
        gatherer.settle(gathering)
    return sizes


@given(st.lists(st.integers(0, 2), min_size=2, max_size=18), st.sampled_from((1.0, 40.0, 90.0)))
def test_all_pages_are_at_home_in_the_end_and_their_old_ones_are_free(
    ranks: list[int], move: float
) -> None:
    ledger = Ledger(FREE, PAGE)
    gatherer, request = Gatherer(Cost(move, holder=100.0), ledger), a_request(ledger, ranks, 1000)
    home, tokens = ranks[-1], request.num_tokens
    last = request.places[len(ranks) - 1]
    gatherer.begin(request, room=len(ranks))
    gather(gatherer, request)
    assert list(request.holdings) == [home]
    assert request.holdings[home].tokens == tokens
    assert request.holdings[home].last_page == last.page, "the next token goes behind the last"
    held = [page for e in request.holdings[home].extents for page in range(e.start, e.end)]
    assert sorted(request.places.items()) == list(enumerate(request.places.values()))
    assert sorted(request.places.values()) == [Place(home, page) for page in sorted(held)]
    assert [ledger.num_used(rank) for rank in range(3)] == [
        len(ranks) if rank == home else 0 for rank in range(3)
    ]


def test_nothing_is_gathered_that_is_at_home() -> None:
    ledger = Ledger(FREE, PAGE)
    request = a_request(ledger, [1, 1, 1])
    Gatherer(Cost(), ledger).begin(request, room=9)
    assert request.to_gather == []


@pytest.mark.parametrize(
    ("move", "max_tokens", "begins"),
    [(2.4, 10, True), (2.6, 10, False), (2.4, 9, False), (3.9, 99, True), (4.1, 99, False)],
)
def test_it_begins_if_what_local_attention_saves_is_more_than_the_journey(
    move: float, max_tokens: int, begins: bool
) -> None:
    """Four pages are away, and a second is saved with each token: 16, or what is still allowed."""
    ledger = Ledger(FREE, PAGE)
    request = a_request(ledger, [0, 0, 0, 0, 1], max_tokens)
    Gatherer(Cost(move), ledger).begin(request, room=4)
    assert sorted(request.to_gather) == ([0, 1, 2, 3] if begins else [])


def test_it_does_not_begin_without_room_for_all() -> None:
    ledger = Ledger(FREE, PAGE)
    request = a_request(ledger, [0, 0, 2, 2, 1])
    gatherer = Gatherer(Cost(), ledger)
    gatherer.begin(request, room=3)
    assert request.to_gather == []
    gatherer.begin(request, room=4)
    assert sorted(request.to_gather) == [0, 1, 2, 3]


@pytest.mark.parametrize(("move", "sizes"), [(0.25, [4, 2]), (0.5, [2, 2, 2]), (9.0, [1] * 6)])
def test_so_many_pages_go_with_a_step_as_travel_in_half_its_time(
    move: float, sizes: list[int]
) -> None:
    """A step takes two seconds; at least one page goes."""
    ledger = Ledger(FREE, PAGE)
    request = a_request(ledger, [0] * 6 + [1], max_tokens=1000)
    request.to_gather = list(range(6))
    assert gather(Gatherer(Cost(move), ledger), request) == sizes


def test_a_gathering_that_finds_no_page_at_home_ends_there() -> None:
    ledger = Ledger([9, 4], PAGE)
    gatherer, request = Gatherer(Cost(), ledger), a_request(ledger, [0] * 5 + [1])
    gatherer.begin(request, room=5)
    assert gather(gatherer, request) == [3]
    assert request.to_gather == []
    assert [request.places[index].rank for index in range(6)] == [0, 0, 1, 1, 1, 1]
    assert {rank: held.tokens for rank, held in request.holdings.items()} == {0: 8, 1: 13}


def test_pages_are_read_where_they_were_until_they_have_arrived() -> None:
    ledger = Ledger(FREE, PAGE)
    gatherer, request = Gatherer(Cost(), ledger), a_request(ledger, [0, 0, 1])
    places, holdings = dict(request.places), dict(request.holdings)
    gatherer.begin(request, room=2)
    gathering = gatherer.next_pages(request)
    assert gathering is not None
    assert (request.places, request.holdings) == (places, holdings)
    assert [ledger.num_used(rank) for rank in (0, 1)] == [2, 3], "both are owned meanwhile"
    assert all(place.rank == 1 and place != places[2] for place in gathering.places)


def test_a_cached_page_is_found_at_its_new_place() -> None:
    ledger = Ledger(FREE, PAGE)
    gatherer, request = Gatherer(Cost(), ledger), a_request(ledger, [0, 1, 1])
    old = request.places[0]
    ledger.cache.add(b"first", old)
    ledger.cache.add(b"second", request.places[1])
    gatherer.begin(request, room=1)
    gather(gatherer, request)
    new = request.places[0]
    assert ledger.cache.find([b"first", b"second"]) == [
        {1: new.page},
        {1: request.places[1].page},
    ]
    assert old not in ledger.cache
    assert ledger.free[0] == FREE[0]
    ledger.release(1, [Extent(new.page, 1)])
    assert ledger.is_idle(new), "it is kept for others after its request"


def test_a_page_that_another_request_shares_stays_for_it_where_it_is() -> None:
    ledger = Ledger(FREE, PAGE)
    gatherer, request = Gatherer(Cost(), ledger), a_request(ledger, [0, 1])
    old = request.places[0]
    ledger.cache.add(b"first", old)
    ledger.share(old)
    gatherer.begin(request, room=1)
    gather(gatherer, request)
    assert request.places[0].rank == 1
    assert ledger.num_owners(old) == 1
    assert ledger.cache.find([b"first"]) == [{0: old.page}]


def test_a_page_that_is_known_at_home_already_is_not_known_twice() -> None:
    ledger = Ledger(FREE, PAGE)
    gatherer, request = Gatherer(Cost(), ledger), a_request(ledger, [0, 1])
    [twin] = ledger.allocate(1, 1)
    ledger.cache.add(b"first", Place(1, twin.start))
    ledger.cache.add(b"first", request.places[0])
    gatherer.begin(request, room=1)
    gather(gatherer, request)
    assert ledger.cache.find([b"first"]) == [{1: twin.start}]
    assert request.places[0] not in ledger.cache
