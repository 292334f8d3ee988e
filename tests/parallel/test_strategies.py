"""Whatever travels, every rank gets for its queries what one device would compute."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from fleet import (
    SHARED,
    Request,
    Runs,
    Shape,
    assert_close,
    assert_expected,
    attend,
    layer_of,
    run_fleet,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention.state import AttentionState
from longspan.engine.shard import fair_shares, zigzag
from longspan.parallel.strategies import STRATEGIES, finish
from longspan.parallel.transport import Transport
from longspan.plan import Run, Strategy

each_strategy = pytest.mark.parametrize("strategy", SHARED)

FULL_PREFILL_SHAPES = [
    Shape(32, 8, 64),
    Shape(16, 8, 128),
    Shape(14, 2, 64),
    Shape(6, 6, 80),
    Shape(8, 1, 64),
]


def prefill(
    new: int, computing: Sequence[int], cached: Sequence[int] = (), start: int = 0
) -> Request:
    """New tokens in a zigzag over `computing`; `cached[i]` tokens lie on rank `start + i`."""
    holding = range(start, start + len(cached))
    shares = fair_shares(new, [new] * len(computing))
    cut = dict(zip(computing, (tuple(runs) for runs in zigzag(shares)), strict=True))
    ranks = tuple(sorted({*computing, *holding}))
    runs = tuple(cut.get(rank, ()) for rank in ranks)
    held = tuple(cached[rank - start] if rank in holding else 0 for rank in ranks)
    return Request(ranks, held, runs, runs)


def assert_fleet_agrees(
    size: int, requests: Sequence[Request], strategy: Strategy, shape: Shape
) -> None:
    by_rank = run_fleet(size, partial(attend, requests, strategy, shape=shape))
    for request, states in zip(requests, zip(*by_rank, strict=True), strict=True):
        assert_expected(request, states, shape)


@each_strategy
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", FULL_PREFILL_SHAPES, ids=lambda s: f"{s.heads}_{s.kv_heads}")
def test_full_prefill(strategy: Strategy, size: int, shape: Shape) -> None:
    assert_fleet_agrees(size, [prefill(203, range(size))], strategy, shape)


@each_strategy
@pytest.mark.parametrize("new", [1, 7, 128, 1000])
@pytest.mark.parametrize("cached", [0, 1, 127, 4096])
@pytest.mark.parametrize("spread", ["evenly", "unevenly", "on ranks that compute nothing"])
def test_partial_prefill(strategy: Strategy, new: int, cached: int, spread: str) -> None:
    if spread == "evenly":
        request = prefill(new, range(4), fair_shares(cached, [cached] * 4))
    elif spread == "unevenly":
        request = prefill(new, range(4), [cached // 7, 0, cached - cached // 7 - cached // 2])
        request = prefill(new, range(4), [*request.cached[:3], cached - request.num_cached])
    else:
        request = prefill(new, [0, 1], [cached // 3, cached - cached // 3], start=2)
    assert request.num_cached == cached
    assert_fleet_agrees(4, [request], strategy, Shape())


@each_strategy
@pytest.mark.parametrize("new", [1, 2, 3, 4])
@pytest.mark.parametrize("cached", [[], [9], [0, 30, 0, 1, 2]])
def test_fewer_tokens_than_ranks(strategy: Strategy, new: int, cached: list[int]) -> None:
    assert_fleet_agrees(5, [prefill(new, range(5), cached)], strategy, Shape())


BATCH = [
    prefill(100, [0, 1, 2, 3], [50, 0, 20, 7]),
    prefill(1, [2], [300, 1, 40], start=1),
    prefill(33, [1, 3]),
    prefill(1, [3], [64]),
    prefill(2, [0, 1, 3], [5, 5], start=2),
    prefill(1, [0], [17]),
]
"""Several requests in one step, on different ranks: prefills, a decode token over three ranks, one
whose keys lie on another rank, and one that needs nobody else."""


@each_strategy
def test_a_batch_of_requests_on_different_ranks(strategy: Strategy) -> None:
    assert_fleet_agrees(5, BATCH, strategy, Shape())


@pytest.mark.parametrize("strategy", ["gather_kv", "pass_q"])
def test_a_rank_need_not_know_of_requests_in_which_it_has_no_part(strategy: Strategy) -> None:
    def work(transport: Transport) -> dict[int, AttentionState]:
        own = [i for i, request in enumerate(BATCH) if transport.rank in request.ranks]
        states = attend([BATCH[i] for i in own], strategy, transport, Shape())
        return dict(zip(own, states, strict=True))

    by_rank = run_fleet(4, work)
    for index, request in enumerate(BATCH):
        empty = AttentionState.empty(0, 4, 64, torch.device("cpu"))
        assert_expected(request, [states.get(index, empty) for states in by_rank], Shape())


def test_several_exchanges_under_way_at_once() -> None:
    """Each starts before any ends, in the same order on every rank, as in a step."""

    def work(transport: Transport) -> list[AttentionState]:
        jobs = [
            STRATEGIES[strategy](layer_of(BATCH[:3], strategy, transport, Shape()))
            for strategy in (*SHARED, *SHARED)
        ]
        for job in jobs:
            next(job)
        return [state for job in jobs for state in finish(job)]

    by_rank = run_fleet(4, work)
    for index, states in enumerate(zip(*by_rank, strict=True)):
        assert_expected(BATCH[index % 3], states, Shape())


@each_strategy
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_strategy_yields_once_when_its_first_messages_are_under_way(
    strategy: Strategy, size: int
) -> None:
    def work(transport: Transport) -> int:
        job = STRATEGIES[strategy](
            layer_of([prefill(12, range(size))], strategy, transport, Shape())
        )
        return sum(1 for _ in job)

    assert run_fleet(size, work) == [1] * size


@each_strategy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_travels_without_a_further_rounding(
    strategy: Strategy, dtype: torch.dtype
) -> None:
    assert_fleet_agrees(4, BATCH, strategy, Shape(dtype=dtype))


@each_strategy
def test_the_order_of_ranks_in_a_request_does_not_matter(strategy: Strategy) -> None:
    ordered = prefill(40, [0, 1, 2], [3, 4, 5])
    turned = Request(
        ordered.ranks[::-1], ordered.cached[::-1], ordered.queries[::-1], ordered.keys[::-1]
    )
    assert_fleet_agrees(3, [turned], strategy, Shape())


@st.composite
def cuts(draw: st.DrawFn, new: int, parts: int) -> tuple[Runs, ...]:
    """Tokens 0 .. new - 1 in pieces of any size, each given to any of the parts."""
    runs: list[list[Run]] = [[] for _ in range(parts)]
    start = 0
    while start < new:
        piece = Run(start, draw(st.integers(1, new - start)))
        runs[draw(st.integers(0, parts - 1))].append(piece)
        start = piece.end
    return tuple(map(tuple, runs))


@st.composite
def requests(draw: st.DrawFn, size: int) -> Request:
    ranks = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1))
    lengths = st.one_of(st.just(0), st.integers(0, 12))
    cached = draw(st.lists(lengths, min_size=len(ranks), max_size=len(ranks)))
    new = draw(st.integers(1, 20))
    queries = draw(cuts(new, len(ranks)))
    keys = draw(st.one_of(st.just(queries), cuts(new, len(ranks))))
    return Request(tuple(ranks), tuple(cached), queries, keys)


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[Request]]:
    size = draw(st.integers(1, 5))
    return size, draw(st.lists(requests(size), min_size=1, max_size=4))


@given(
    batch=batches(),
    strategy=st.sampled_from(SHARED),
    heads=st.sampled_from([(4, 2), (7, 1), (3, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=150)
def test_any_batch(
    batch: tuple[int, list[Request]],
    strategy: Strategy,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    assert_fleet_agrees(*batch, strategy, Shape(*heads, 16, dtype))


@each_strategy
def test_a_rank_that_fails_stops_the_fleet_with_its_own_error(strategy: Strategy) -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 1:
            raise ArithmeticError("rank 1 is broken")
        attend([prefill(30, range(3))], strategy, transport, Shape())

    with pytest.raises(ArithmeticError, match="rank 1 is broken"):
        run_fleet(3, work)


@pytest.mark.parametrize("shape", FULL_PREFILL_SHAPES, ids=lambda s: f"{s.heads}_{s.kv_heads}")
def test_strategies_agree_with_each_other(shape: Shape) -> None:
    request = prefill(65, range(4), [40, 0, 3])
    pass_kv, gather_kv, pass_q = (
        run_fleet(4, partial(attend, [request], strategy, shape=shape)) for strategy in SHARED
    )
    for rank in range(4):
        assert_close(pass_kv[rank][0], gather_kv[rank][0])
        assert_close(pass_q[rank][0], gather_kv[rank][0])
