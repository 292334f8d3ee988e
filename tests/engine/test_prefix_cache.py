"""Full pages outlive their request and are found by those that begin alike, wherever they are."""

from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings
from simulated import Plans, simulated_engine

from longspan import SamplingParams
from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.engine.ledger import Ledger
from longspan.engine.prefix_cache import Place, PrefixCache, chain
from longspan.plan import Extent

PAGE = 4


def prompt(length: int, kind: int = 0) -> list[int]:
    return [1 + (kind * 17 + i * i) % 60 for i in range(length)]


def finish(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def tokens(group: Group) -> list[list[int]]:
    return [completion.token_ids for completion in group.output().outputs]


def alone(token_ids: list[int], params: SamplingParams) -> list[list[int]]:
    """The outputs of one request on one large rank without a cache."""
    engine, _ = simulated_engine([1000])
    group = engine.add_request(token_ids, params)
    finish(engine)
    return tokens(group)


def counting(num_pages: list[int], **options: object) -> tuple[Engine, list[int]]:
    """An engine with a cache, and how many tokens each of its steps computes."""
    engine, executor = simulated_engine(num_pages, enable_prefix_caching=True, **options)
    computed: list[int] = []

    def count(plans: Plans) -> None:
        computed.append(sum(len(plan.token_ids) for plan in plans.values()))

    executor.before_step = count
    return engine, computed


def test_a_prompt_that_was_seen_is_computed_from_its_last_page_on() -> None:
    engine, computed = counting([50])
    params = SamplingParams(seed=1, max_tokens=3, ignore_eos=True)
    for length, cached in ((40, 0), (40, 36), (41, 40), (39, 36), (100, 40), (7, 4)):
        computed.clear()
        group = engine.add_request(prompt(length), params)
        finish(engine)
        assert group.output().num_cached_tokens == cached
        assert sum(computed) == length - cached + 2
        assert tokens(group) == alone(prompt(length), params)


def test_outputs_are_found_too_as_in_a_conversation() -> None:
    engine, _ = counting([50])
    params = SamplingParams(max_tokens=9, seed=3, ignore_eos=True)
    first = engine.add_request(prompt(10), params)
    finish(engine)
    whole = prompt(10) + tokens(first)[0]
    second = engine.add_request([*whole, 5, 6, 7], params)
    finish(engine)
    assert second.output().num_cached_tokens == 16  # of 18 tokens with keys, 4 full pages
    assert tokens(second) == alone([*whole, 5, 6, 7], params)


def test_another_beginning_makes_another_page() -> None:
    engine, _ = counting([50])
    params = SamplingParams(max_tokens=1)
    engine.add_request(prompt(12), params)
    finish(engine)
    other = prompt(12)
    other[0] += 1
    group = engine.add_request(other, params)
    finish(engine)
    assert group.output().num_cached_tokens == 0
    assert chain(b"", [1, 2]) != chain(b"", [2, 1]) != chain(chain(b"", [2]), [1])


def test_without_caching_nothing_is_kept() -> None:
    engine, _ = simulated_engine([50])
    for _ in range(2):
        group = engine.add_request(prompt(40), SamplingParams(max_tokens=1))
        finish(engine)
        assert group.output().num_cached_tokens == 0


def test_hits_on_several_ranks_are_used_where_they_are() -> None:
    engine, computed = counting([8, 8, 8], min_tokens_per_rank=8)
    params = SamplingParams(seed=1, max_tokens=4, ignore_eos=True)
    for cached in (0, 56):
        computed.clear()
        group = engine.add_request(prompt(60), params)
        finish(engine)
        output = group.output()
        assert output.num_cached_tokens == cached
        assert output.metrics is not None
        assert min(output.metrics.kv_tokens) >= 16
        assert sum(computed) == 60 - cached + 3
        assert tokens(group) == alone(prompt(60), params)


def test_the_sequences_of_one_prompt_compute_it_once() -> None:
    engine, computed = counting([60])
    params = SamplingParams(n=3, max_tokens=5, seed=1, ignore_eos=True)
    group = engine.add_request(prompt(42), params)
    finish(engine)
    assert sum(computed) == 42 + 2 * 2 + 3 * 4  # the prompt, what no page holds, what was drawn
    assert tokens(group) == alone(prompt(42), params)


def test_a_leader_that_is_aborted_holds_nobody_back() -> None:
    engine, _ = counting([60], max_num_batched_tokens=8)
    group = engine.add_request(prompt(42), SamplingParams(n=2, max_tokens=5, ignore_eos=True))
    engine.step()
    engine.scheduler.abort(group.requests[0])
    finish(engine)
    assert len(tokens(group)[1]) == 5


def test_what_was_idle_for_longest_goes_first_and_a_tail_before_its_head() -> None:
    ledger = Ledger([6], PAGE)
    for name, pages in (("a", 3), ("b", 3)):
        [extent] = ledger.allocate(0, pages)
        for page in range(extent.start, extent.end):
            ledger.cache.add(f"{name}{page}".encode(), Place(0, page))
        ledger.release(0, [extent])
    assert ledger.free[0] == 6
    ledger.allocate(0, 2)
    known = [place for page in range(6) if (place := Place(0, page)) in ledger.cache]
    assert known == [(0, 0), (0, 3), (0, 4), (0, 5)]


def test_a_shared_page_has_as_many_owners_as_took_it() -> None:
    ledger = Ledger([2], PAGE)
    [extent] = ledger.allocate(0, 1)
    ledger.cache.add(b"x", Place(0, extent.start))
    ledger.share(Place(0, extent.start))
    ledger.release(0, [extent])
    assert ledger.num_used(0) == 1
    ledger.release(0, [extent])
    assert ledger.num_used(0) == 0
    assert ledger.is_idle(Place(0, extent.start))
    assert ledger.allocate(0, 2) == [Extent(0, 2)]
    assert Place(0, extent.start) not in ledger.cache


def test_find_stops_at_the_first_gap() -> None:
    cache = PrefixCache()
    cache.add(b"1", Place(0, 5))
    cache.add(b"3", Place(1, 6))
    assert cache.find([b"1", b"2", b"3"]) == [{0: 5}]
    cache.add(b"1", Place(1, 9))
    cache.add(b"1", Place(0, 7))
    assert cache.find([b"1"]) == [{0: 5, 1: 9}], "one place for each rank, the first"
    assert cache.forget(Place(0, 5)) == b"1"
    assert cache.find([b"1"]) == [{1: 9}]
    cache.forget(Place(1, 9))
    assert cache.find([b"1"]) == []


requests = st.lists(
    st.tuples(
        st.integers(1, 60),  # length of the prompt
        st.integers(0, 2),  # which of three texts it begins
        st.integers(1, 12),  # tokens to generate
        st.integers(1, 2),  # n
        st.integers(0, 6),  # steps before the next arrives
        st.booleans(),  # whether it is aborted then
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150)
@given(
    requests,
    st.lists(st.integers(10, 24), min_size=1, max_size=4),
    st.sampled_from([3, 8, 30, 200]),
    st.sampled_from([8, 1000, None]),
    st.integers(0, 9),
)
def test_no_trace_changes_a_token_or_loses_a_page(
    trace: list[tuple[int, int, int, int, int, bool]],
    num_pages: list[int],
    budget: int,
    tokens_per_rank: int | None,
    seed: int,
) -> None:
    random = Random(seed)
    engine, _ = simulated_engine(
        [max(num_pages[0], 20), *num_pages[1:]],
        enable_prefix_caching=True,
        max_num_batched_tokens=budget,
        min_tokens_per_rank=tokens_per_rank,
        order=lambda ranks: random.sample(ranks, random.randint(1, len(ranks))),
    )
    served = []
    for length, kind, new, n, steps, aborted in trace:
        params = SamplingParams(max_tokens=new, n=n, seed=length, ignore_eos=True)
        group = engine.add_request(prompt(length, kind), params)
        for _ in range(steps):
            if engine.has_requests:
                engine.step()
        if aborted and not group.finished:
            engine.abort(group.request_id)
        else:
            served.append((group, prompt(length, kind), params))
    finish(engine)
    for group, token_ids, params in served:
        assert tokens(group) == alone(token_ids, params)
    assert [usage.used for usage in engine.kv_usage] == [0] * len(num_pages)
