"""Free pages that running requests will take are not given to others."""

from hypothesis import given
from hypothesis import strategies as st

from longspan.engine.claims import Claims
from longspan.engine.detokenizer import Detokenizer
from longspan.engine.ledger import Ledger
from longspan.engine.prefix_cache import Place
from longspan.engine.request import Request
from longspan.sampling_params import SamplingParams

PAGE = 4


def a_request(
    prompt: int, ranks: list[int], *, output: int = 0, max_tokens: int = 1000, pages: int = 0
) -> Request:
    """One that has drawn so many tokens and has so many pages, on its first rank; it decodes
    if those are all but the last token's."""
    request = Request(
        request_id="r",
        prompt_token_ids=[0] * prompt,
        params=SamplingParams(),
        seed=0,
        end_ids=frozenset(),
        max_tokens=max_tokens,
        detokenizer=Detokenizer(None),
    )
    request.ranks = ranks
    request.output_token_ids = [0] * output
    request.num_tokens = prompt + output
    request.num_computed = min(pages * PAGE, request.num_tokens - 1)
    request.places = {index: Place(ranks[0], index) for index in range(pages)}
    request.home = ranks[0] if pages else None
    return request


def unclaimed(free: list[int], *requests: Request) -> list[int]:
    claims = Claims(Ledger(free, PAGE))
    for request in requests:
        claims.renew(request)
    return claims.unclaimed()


def test_a_prompt_claims_its_pages_and_those_of_some_output_on_all_its_ranks() -> None:
    assert unclaimed([50, 50, 50], a_request(40, [0, 2])) == [43, 50, 43]  # 10 and 4 pages
    assert unclaimed([50, 50, 50], a_request(40, [2, 0], max_tokens=4)) == [45, 50, 44]
    assert unclaimed([50, 50, 50], a_request(40, [0, 2], max_tokens=4, pages=5)) == [47, 50, 47]


def test_a_decoding_request_claims_as_much_as_it_has_drawn_on_its_home() -> None:
    grown = a_request(1, [1, 0], output=80, pages=20)
    assert unclaimed([50, 50], grown) == [50, 29]  # 81 tokens and 80 more are 41 pages, 20 there
    ending = a_request(1, [1, 0], output=80, pages=20, max_tokens=82)
    assert unclaimed([50, 50], ending) == [50, 49]


def test_what_one_rank_lacks_all_others_give() -> None:
    assert unclaimed([4, 10, 10], a_request(80, [0], max_tokens=0)) == [0, 2, 2]
    assert unclaimed([4, 1, 10], a_request(40, [0], max_tokens=0)) == [0, 0, 5]
    assert unclaimed([4, 1, 10], a_request(400, [0])) == [0, 0, 0]


claims_of_some = st.lists(
    st.tuples(st.integers(1, 60), st.permutations(range(3)), st.integers(1, 3), st.integers(0, 9)),
    max_size=5,
)


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3), claims_of_some)
def test_claims_add_up_and_go_without_a_trace(
    free: list[int], asked: list[tuple[int, list[int], int, int]]
) -> None:
    requests = [
        a_request(prompt, ranks[:degree], max_tokens=more) for prompt, ranks, degree, more in asked
    ]
    claims = Claims(Ledger(free, PAGE))
    for request in [*requests, *requests]:
        claims.renew(request)
    left = claims.unclaimed()
    wanted = sum(-(-(prompt + more) // PAGE) for prompt, _, _, more in asked)
    assert sum(left) == max(sum(free) - wanted, 0), "renewed or not, each counts once"
    assert all(0 <= one <= all_ for one, all_ in zip(left, free, strict=True))
    for request in [*requests, *requests]:
        claims.drop(request)
    assert claims.unclaimed() == free


def test_what_has_been_taken_is_claimed_no_longer() -> None:
    ledger = Ledger([20], PAGE)
    claims, request = Claims(ledger), a_request(40, [0], max_tokens=0)
    claims.renew(request)
    assert claims.unclaimed() == [10]
    ledger.allocate(0, 6)
    request.places = {index: Place(0, index) for index in range(6)}
    assert claims.unclaimed() == [4], "until it is told"
    claims.renew(request)
    assert claims.unclaimed() == [10]
