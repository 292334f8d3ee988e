"""Every token goes to one rank, in order, with the rest of its page, where there is room for it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.engine.cut import cut
from longspan.engine.detokenizer import Detokenizer
from longspan.engine.request import Request
from longspan.plan import Run
from longspan.sampling_params import SamplingParams

often = settings(max_examples=150)


def a_request(tokens: int, ranks: Sequence[int] = (0,)) -> Request:
    request = Request(
        "r",
        [0] * tokens,
        SamplingParams(),
        seed=0,
        end_ids=frozenset(),
        max_tokens=1,
        detokenizer=Detokenizer(None),
    )
    request.ranks = list(ranks)
    return request


def positions(runs: Sequence[Run]) -> list[int]:
    return [position for run in runs for position in range(run.start, run.end)]


@dataclass(frozen=True)
class Cut:
    """One call of `cut`: what it was told and what it answered."""

    start: int
    pending: int
    page_size: int
    ranks: list[int]
    home: int | None
    free: list[int]
    budgets: list[int]
    runs: dict[int, list[Run]]

    @property
    def tokens(self) -> dict[int, int]:
        """How many tokens each rank computes."""
        return {rank: len(positions(runs)) for rank, runs in self.runs.items()}

    @property
    def begun(self) -> Counter[int]:
        """How many pages begin on each rank."""
        firsts = ((rank, p) for rank, runs in self.runs.items() for p in positions(runs))
        return Counter(rank for rank, p in firsts if p % self.page_size == 0)

    @property
    def rest(self) -> int:
        """How many tokens go on the page that had been begun, if the budget lets them."""
        return min(-self.start % self.page_size, self.pending)

    @property
    def wanted(self) -> int:
        """How many pages the pending tokens begin."""
        return -(-(self.pending - self.rest) // self.page_size)

    @property
    def is_last(self) -> bool:
        """Whether nothing is left pending."""
        return sum(self.tokens.values()) == self.pending

    def capacity(self, rank: int) -> int:
        """How many whole pages a rank can take beside the rest of the one that was begun."""
        budget = self.budgets[rank] - (self.rest if rank == self.home else 0)
        return min(self.free[rank], max(budget, 0) // self.page_size)


@dataclass
class Fleet:
    """A request that goes on cut by cut, and the pages that are left."""

    request: Request
    free: list[int]
    page_size: int
    cuts: list[Cut] = field(default_factory=list)

    def cut(self, budgets: Sequence[int]) -> Cut:
        request = self.request
        runs = cut(request, self.free, dict(enumerate(budgets)), self.page_size)
        made = Cut(
            request.num_computed,
            request.num_pending,
            self.page_size,
            request.ranks,
            request.home,
            list(self.free),
            list(budgets),
            runs,
        )
        self.cuts.append(made)
        for rank, tokens in made.tokens.items():
            request.holding(rank).tokens += tokens
            self.free[rank] -= made.begun[rank]
        if runs:
            request.home = max(runs, key=lambda rank: runs[rank][-1].end)
            request.num_computed = max(taken[-1].end for taken in runs.values())
        return made


@st.composite
def courses(draw: st.DrawFn) -> Fleet:
    """A request cut under one set of budgets after another, then decoding if it gets so far."""
    page_size = draw(st.integers(1, 8))
    free = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    ranks = draw(st.permutations(range(len(free))))[: draw(st.integers(1, len(free)))]
    budget = st.integers(0, 4 * page_size + 1) | st.integers(0, 3) | st.just(1000)
    budgets = st.lists(budget, min_size=len(free), max_size=len(free))
    tokens = draw(st.integers(1, sum(free) * page_size + 5))
    fleet = Fleet(a_request(tokens, ranks), free, page_size)
    for step_budgets in draw(st.lists(budgets, min_size=1, max_size=12)):
        if fleet.request.num_pending == 0:
            fleet.request.output_token_ids.append(0)
            fleet.request.num_tokens += 1
        fleet.cut(step_budgets)
    return fleet


def cuts_with_room(fleet: Fleet) -> Iterator[Cut]:
    """Prefill cuts in which each of the request's ranks can take an even share and a page more."""
    for each in fleet.cuts:
        rest_fits = each.home is None or each.budgets[each.home] >= each.rest
        even = each.wanted // len(each.ranks) + 1
        roomy = all(each.capacity(rank) >= even for rank in each.ranks)
        if each.pending > 1 and rest_fits and roomy:
            yield each


@given(courses())
@often
def test_each_cut_takes_the_next_positions_each_once(fleet: Fleet) -> None:
    for each in fleet.cuts:
        taken = sorted(p for runs in each.runs.values() for p in positions(runs))
        assert taken == list(range(each.start, each.start + len(taken)))
        assert len(taken) <= each.pending


@given(courses())
@often
def test_the_runs_of_a_rank_ascend_and_lie_apart(fleet: Fleet) -> None:
    for each in fleet.cuts:
        for runs in each.runs.values():
            assert runs, "a rank with nothing to do is left out"
            assert all(run.length > 0 for run in runs)
            assert all(first.end < second.start for first, second in pairwise(runs))


@given(courses())
@often
def test_budgets_and_free_pages_are_never_exceeded(fleet: Fleet) -> None:
    for each in fleet.cuts:
        for rank, tokens in each.tokens.items():
            assert tokens <= each.budgets[rank]
            assert each.begun[rank] <= each.free[rank]


@given(courses())
@often
def test_all_tokens_of_a_page_are_on_one_rank(fleet: Fleet) -> None:
    rank_of_page: dict[int, int] = {}
    for each in fleet.cuts:
        for rank, runs in each.runs.items():
            for position in positions(runs):
                page = position // fleet.page_size
                assert rank_of_page.setdefault(page, rank) == rank


@given(courses())
@often
def test_only_the_last_page_of_the_request_is_not_full(fleet: Fleet) -> None:
    """So a rank's tokens lie in its pages without holes, whatever was cut before."""
    request = fleet.request
    for rank, holding in request.holdings.items():
        partial = request.num_computed % fleet.page_size if rank == request.home else 0
        assert holding.tokens % fleet.page_size == partial


@given(courses())
@often
def test_there_is_progress_while_a_rank_that_may_take_tokens_has_a_budget(fleet: Fleet) -> None:
    """Those are the rank of a page that was begun, else the request's ranks with a page."""
    for each in fleet.cuts:
        may = [rank for rank in each.ranks if each.free[rank]]
        if each.start % fleet.page_size:
            assert each.home is not None
            may = [each.home]
        can_go_on = any(each.budgets[rank] for rank in may)
        assert bool(each.runs) == can_go_on


@given(courses())
@often
def test_pages_are_balanced_within_one_where_nothing_binds(fleet: Fleet) -> None:
    for each in cuts_with_room(fleet):
        begun = [each.begun[rank] for rank in each.ranks]
        assert sum(begun) == each.wanted, "everything is cut"
        assert max(begun) - min(begun) <= 1
        assert set(each.runs) <= {*each.ranks, each.home}, "and on the request's own ranks"


@given(courses())
@often
def test_the_odd_pages_go_to_the_ranks_with_fewest_keys(fleet: Fleet) -> None:
    """So that chunks of any size leave the ranks balanced within one page, but for the last."""
    held: Counter[int] = Counter()
    rooms = {id(each) for each in cuts_with_room(fleet)}
    for each in fleet.cuts:
        if id(each) in rooms and not each.is_last:
            odd = [rank for rank in each.ranks if each.begun[rank] > each.wanted // len(each.ranks)]
            even = [rank for rank in each.ranks if rank not in odd]
            if odd and even:
                assert max(held[rank] for rank in odd) <= min(held[rank] for rank in even)
        held.update(each.tokens)


@given(courses())
@often
def test_a_cut_takes_all_whole_pages_that_its_own_ranks_can(fleet: Fleet) -> None:
    for each in fleet.cuts:
        rest_fits = each.home is None or each.budgets[each.home] >= each.rest
        capacity = sum(each.capacity(rank) for rank in each.ranks)
        if rest_fits and each.wanted > 1 and capacity:
            assert sum(each.begun.values()) == min(each.wanted, capacity)


def test_a_prompt_goes_zigzag_over_its_ranks() -> None:
    fleet = Fleet(a_request(15, ranks=[0, 2]), free=[9, 9, 9], page_size=2)
    assert fleet.cut([100, 100, 100]).runs == {0: [Run(0, 4), Run(12, 3)], 2: [Run(4, 8)]}


def test_a_page_that_was_begun_is_filled_on_its_rank_before_others_are_begun() -> None:
    fleet = Fleet(a_request(30, ranks=[0, 1]), free=[9, 9], page_size=8)
    assert fleet.cut([5, 5]).runs == {0: [Run(0, 5)]}, "less than a page of budget: one rank"
    assert fleet.cut([2, 100]).runs == {0: [Run(5, 2)]}, "page 0 is full only after position 7"
    assert fleet.cut([0, 100]).runs == {}, "nor can another rank go on meanwhile"
    last = fleet.cut([9, 100]).runs
    assert last == {0: [Run(7, 9)], 1: [Run(16, 14)]}


def test_a_budget_that_is_no_multiple_of_the_page_is_used_up_to_whole_pages() -> None:
    fleet = Fleet(a_request(100, ranks=[0, 1]), free=[99, 99], page_size=4)
    assert fleet.cut([11, 6]).tokens == {0: 8, 1: 4}


def test_the_first_rank_gets_the_last_page_of_a_prompt() -> None:
    """It will decode, so that homes can be spread by the order of a request's ranks."""
    for ranks in [[0, 1, 2], [2, 0, 1], [1, 2, 0]]:
        fleet = Fleet(a_request(130, ranks), free=[99, 99, 99], page_size=4)
        for _ in range(3):
            fleet.cut([16, 16, 16])
        assert fleet.request.num_pending == 0
        assert fleet.request.home == ranks[0]
