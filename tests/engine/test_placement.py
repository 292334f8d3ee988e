"""A request gets few ranks: those that know its beginning, have its pages, and are free soon."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.engine.admission import Admission
from longspan.engine.detokenizer import Detokenizer
from longspan.engine.ledger import Ledger
from longspan.engine.placement import EFFICIENCY, Fleet, Placement, Placer
from longspan.engine.prefix_cache import Hit, Place
from longspan.engine.request import Request
from longspan.sampling_params import SamplingParams

PAGE = 4
AMPLE = 1000


class Cost:
    """A token takes a second; so many ranks are so many times as fast."""

    def __init__(self, speed: Callable[[int], float] = float) -> None:
        self._speed = speed

    def prefill_seconds(self, new: int, cached: int, degree: int) -> float:
        return new / self._speed(degree)


def place(
    tokens: int,
    *,
    free: Sequence[int] = (AMPLE,) * 8,
    delays: Sequence[float] | None = None,
    hits: Sequence[Hit] = (),
    speed: Callable[[int], float] = float,
    one_step: float = 10.0,
    max_degree: int = 99,
    min_tokens_per_rank: int | None = None,
) -> Placement | None:
    placer = Placer(Cost(speed), PAGE, one_step, min_tokens_per_rank)
    return placer.place(tokens, hits, Fleet(free, delays or [0.0] * len(free)), max_degree)


def ranks(tokens: int, **options: object) -> list[int]:
    placement = place(tokens, **options)
    assert placement is not None
    return placement.ranks


def known_on(rank: int, pages: int) -> list[Hit]:
    return [{rank: 100 + index} for index in range(pages)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    free = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    number = st.integers(0, len(free) - 1)
    tokens = draw(st.integers(1, 60))
    hit = st.dictionaries(number, st.integers(0, 99), min_size=1)
    return {
        "tokens": tokens,
        "free": free,
        "delays": [draw(st.sampled_from((0.0, 1.0, 5.0, 100.0))) for _ in free],
        "hits": draw(st.lists(hit, max_size=(tokens - 1) // PAGE)),
        "speed": draw(st.sampled_from((float, lambda degree: 1.0, lambda degree: degree**0.5))),
        "one_step": draw(st.sampled_from((0.0, 10.0))),
        "max_degree": draw(st.integers(1, 6)),
        "min_tokens_per_rank": draw(st.sampled_from((None, 1, 9, 30))),
    }


@given(cases())
def test_ranks_differ_and_have_the_pages_together_or_nobody_has(case: dict[str, object]) -> None:
    placement = place(**case)
    free, hits, tokens = case["free"], case["hits"], case["tokens"]
    pages = -(-tokens // PAGE)
    assert (placement is None) == (sum(free) < pages - len(hits))
    if placement is not None:
        assert len(set(placement.ranks)) == placement.degree >= 1
        assert sum(free[rank] for rank in placement.ranks) >= pages - len(placement.places)


@given(cases())
def test_the_first_pages_are_where_the_cache_says_on_ranks_of_the_request(
    case: dict[str, object],
) -> None:
    placement = place(**case)
    if placement is not None:
        for (rank, page), hit in zip(placement.places, case["hits"], strict=False):
            assert hit[rank] == page
            assert rank in placement.ranks


@given(cases())
def test_the_time_is_that_of_the_last_rank_and_the_tokens_that_nobody_knows(
    case: dict[str, object],
) -> None:
    placement = place(**case)
    if placement is not None:
        new = case["tokens"] - len(placement.places) * PAGE
        delay = max(case["delays"][rank] for rank in placement.ranks)
        assert placement.seconds == delay + new / case["speed"](placement.degree)


@pytest.mark.parametrize(
    ("speed", "degree"),
    [
        ({1: 1, 2: 2, 4: 4, 8: 8}, 8),
        ({1: 1, 2: 2 * EFFICIENCY, 4: 2, 8: 8}, 2),
        ({1: 1, 2: 1.99 * EFFICIENCY, 4: 4, 8: 8}, 1),
        ({1: 1, 2: 2, 4: 4, 8: 7.99 * EFFICIENCY}, 4),
    ],
    ids=str,
)
def test_the_degree_doubles_while_the_first_token_gains_enough(
    speed: dict[int, float], degree: int
) -> None:
    assert len(ranks(100, speed=speed.__getitem__)) == degree


def test_the_degree_doubles_until_the_prompt_is_computed_in_one_step() -> None:
    assert [len(ranks(tokens)) for tokens in (10, 11, 20, 21, 40, 41)] == [1, 2, 2, 4, 4, 8]
    assert len(ranks(20, delays=[1.0] * 8)) == 2, "however long it has to wait before"
    assert ranks(40, hits=known_on(5, 8)) == [5], "it is what is new that counts"


def test_it_goes_to_the_rank_that_is_free_first_and_of_those_to_the_emptiest() -> None:
    assert ranks(9, delays=[3, 2, 1], free=[9, 9, 9]) == [2]
    assert ranks(9, delays=[1, 1, 1], free=[9, 11, 10]) == [1]
    assert ranks(9, delays=[3, 2, 1], free=[9, 9, 2]) == [1], "two pages are less than nine tokens"


def test_busy_ranks_are_left_out_of_a_spread_prompt_if_it_is_faster_without() -> None:
    busy = [0, 50, 0, 50]
    assert ranks(100, free=[AMPLE] * 4, delays=busy) == [0, 2]
    assert sorted(ranks(1000, free=[AMPLE] * 4, delays=busy)) == [0, 1, 2, 3]
    assert sorted(ranks(1000, free=[AMPLE] * 3)) == [0, 1, 2], "all, if they are no power of two"


def test_pages_that_one_rank_lacks_are_a_reason_for_more() -> None:
    slower = {1: 1, 2: 0.5, 3: 0.4, 4: 0.3}.__getitem__
    assert len(ranks(8, free=[2, 1, 1, 1], speed=slower)) == 1
    assert len(ranks(9, free=[2, 1, 1, 1], speed=slower)) == 2
    assert len(ranks(20, free=[2, 1, 1, 1], speed=slower)) == 4
    assert place(21, free=[2, 1, 1, 1]) is None


def test_more_than_its_fair_degree_only_for_pages() -> None:
    assert len(ranks(100, max_degree=4)) == 4
    assert len(ranks(100, max_degree=3)) == 2
    assert ranks(100, max_degree=1) == [0]
    assert len(ranks(100, free=[5] * 8, max_degree=1)) == 5, "no more than it needs"


def test_a_prompt_goes_where_its_beginning_is_known() -> None:
    assert ranks(100, hits=known_on(2, 23)) == [2]
    first_two = ranks(100, hits=[*known_on(6, 1), *known_on(3, 1)], max_degree=2)
    assert sorted(first_two) == [3, 6], "and starts with all holders when it is spread"
    assert ranks(9, hits=known_on(2, 2), free=[3, 3, 1]) == [2], "which needs room for what is new"


def test_a_beginning_that_several_ranks_know_together_is_not_computed_again() -> None:
    """However many others wait: that many ask about one text at once is when it counts."""
    hits = [*known_on(1, 12), *known_on(3, 12)]
    assert set(ranks(100, hits=hits, max_degree=1)) == {1, 3}
    assert ranks(100, hits=known_on(1, 24), max_degree=1) == [1]


def test_but_not_if_that_rank_is_so_busy_that_another_computes_it_sooner() -> None:
    hits = known_on(2, 20)  # of 25 pages
    assert ranks(100, hits=hits, delays=[0, 0, 79, 0], free=[AMPLE] * 4, max_degree=1) == [2]
    assert ranks(100, hits=hits, delays=[0, 0, 81, 0], free=[AMPLE] * 4, max_degree=1) == [0]


def test_pages_known_on_several_ranks_are_taken_from_few() -> None:
    """From the rank of the page before, else from one with others, else from the one with most."""
    local = place(14, hits=[{0: 1, 1: 2}, {1: 3}, {1: 4, 2: 5}])
    assert local is not None
    assert local.places == [(1, 2), (1, 3), (1, 4)]
    spread = place(90, hits=[{0: 1, 1: 2}, {1: 3}, {2: 4}, {1: 5, 2: 6}, {0: 7, 1: 8}])
    assert spread is not None
    assert spread.places == [(1, 2), (1, 3), (2, 4), (2, 6), (1, 8)]


def test_a_rank_whose_pages_have_a_gap_gives_those_before_it() -> None:
    placement = place(14, hits=[{0: 1}, {1: 3}, {0: 4}])
    assert placement is not None
    assert placement.places == [Place(0, 1)]


@pytest.mark.parametrize(
    ("tokens", "hits", "degree"),
    [(19, 0, 1), (20, 0, 2), (39, 0, 3), (40, 2, 3), (400, 0, 8)],
)
def test_a_given_length_for_each_rank_says_how_many(tokens: int, hits: int, degree: int) -> None:
    """Whatever would be faster; ranks are at most all, and cached tokens don't count."""
    chosen = ranks(tokens, min_tokens_per_rank=10, max_degree=1, hits=known_on(4, hits))
    assert len(chosen) == degree
    assert 4 in chosen or not hits


def test_a_given_length_for_each_rank_leaves_it_open_which() -> None:
    hits, delays = known_on(2, 1), [9.0, 0.0, 50.0, 9.0]
    assert ranks(19, min_tokens_per_rank=10, hits=hits, delays=delays, free=[AMPLE] * 4) == [1]


def test_a_given_length_for_each_rank_gives_more_where_pages_lack() -> None:
    assert len(ranks(40, min_tokens_per_rank=20, free=[4, 4, 4, 4])) == 3
    assert len(ranks(19, min_tokens_per_rank=20, free=[4, 4, 4, 4])) == 2


# One request after the other


def a_request(prompt: int, max_tokens: int = 0) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=[0] * prompt,
        params=SamplingParams(),
        seed=0,
        end_ids=frozenset(),
        max_tokens=max_tokens,
        detokenizer=Detokenizer(None),
    )


def admission(ledger: Ledger, one_step: float = 10.0, waiting_tokens: int = 0) -> Admission:
    placer = Placer(Cost(), PAGE, one_step, None)
    delays = [0.0] * ledger.num_ranks
    return Admission(placer, ledger, ledger.free, delays, waiting_tokens)


def test_the_next_request_finds_the_ranks_as_they_will_be() -> None:
    round_ = admission(Ledger([9, 9, 9], PAGE))
    placed = [round_.place(a_request(8), []) for _ in range(4)]
    assert [each and each.ranks for each in placed] == [[0], [1], [2], [0]], "delays"
    round_ = admission(Ledger([9, 2], PAGE))
    placed = [round_.place(a_request(8, max_tokens=9), []) for _ in range(3)]
    assert [each and each.ranks for each in placed] == [[0], [1], None], "pages, of which it is"
    assert round_.place(a_request(4), []) is not None, "expected to need more than its prompt"


def test_prompts_that_wait_together_share_the_ranks_by_their_lengths() -> None:
    round_ = admission(Ledger([99] * 8, PAGE), one_step=0, waiting_tokens=400)
    placed = [round_.place(a_request(length), []) for length in (200, 100, 100)]
    assert [each and each.degree for each in placed] == [4, 2, 2]
    assert sorted(rank for each in placed if each for rank in each.ranks) == list(range(8))
    alone = admission(Ledger([99] * 8, PAGE), one_step=0, waiting_tokens=200)
    placement = alone.place(a_request(200), [])
    assert placement is not None
    assert placement.degree == 8


@pytest.mark.parametrize("idle", [True, False])
def test_cached_pages_are_room_for_others_unless_somebody_owns_them(idle: bool) -> None:
    """Five of ten pages are known; taken while idle, they are no longer free."""
    ledger = Ledger([10], PAGE)
    [extent] = ledger.allocate(0, 5)
    for page in range(5):
        ledger.cache.add(b"%d" % page, Place(0, page))
    if idle:
        ledger.release(0, [extent])
    hits = [{0: page} for page in range(5)]
    assert admission(ledger).place(a_request(40), hits) is not None
    assert admission(ledger).place(a_request(41), hits) is None
    round_ = admission(ledger)
    assert round_.place(a_request(28), hits) is not None
    assert round_.place(a_request(12), []) is not None
    assert round_.place(a_request(1), []) is None


def test_idle_pages_that_are_known_take_room_of_their_rank() -> None:
    """Fifteen of thirty pages are known on a rank with room for twenty, they among them."""
    hits = [{0: page} for page in range(15)]
    placer = Placer(Cost(), PAGE, 1000.0, None)
    for is_idle, chosen in ((True, [1]), (False, [0])):
        fleet = Fleet([20, 100], [0.0, 0.0], lambda place, is_idle=is_idle: is_idle)
        placement = placer.place(30 * PAGE, hits, fleet, max_degree=2)
        assert placement is not None
        assert placement.ranks == chosen
