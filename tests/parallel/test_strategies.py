"""Whatever travels, every rank gets for its queries what one device would compute."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from threading import Lock

import pytest
import torch
from fleet import (
    SHARED,
    TOPOLOGIES,
    Request,
    Shape,
    assert_close,
    assert_expected,
    attend,
    layer_of,
    rank_sets,
    requests,
    run_fleet,
    topologies,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.attention.state import AttentionState
from longspan.attention.tiled import Tiled
from longspan.engine.shard import fair_shares, zigzag
from longspan.parallel.strategies import STRATEGIES, finish
from longspan.parallel.transport import Transport
from longspan.plan import Strategy
from longspan.topology import Topology

each_strategy = pytest.mark.parametrize("strategy", SHARED)
each_topology = pytest.mark.parametrize("hosts", TOPOLOGIES, ids=str)

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
    fleet: int | Topology, requests: Sequence[Request], strategy: Strategy, shape: Shape
) -> None:
    by_rank = run_fleet(fleet, partial(attend, requests, strategy, shape=shape))
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


@each_strategy
@each_topology
@pytest.mark.parametrize("shape", FULL_PREFILL_SHAPES[1:3], ids=lambda s: f"{s.heads}_{s.kv_heads}")
def test_full_prefill_over_hosts(strategy: Strategy, hosts: Sequence[int], shape: Shape) -> None:
    topology = Topology.of_hosts(hosts)
    request = prefill(203, range(topology.num_ranks))
    assert_fleet_agrees(topology, [request], strategy, shape)


@each_strategy
@each_topology
@pytest.mark.parametrize("new", [1, 2, 40])
def test_partial_prefill_over_hosts(strategy: Strategy, hosts: Sequence[int], new: int) -> None:
    """Cached tokens on all ranks, on every second one, and on the last one alone."""
    topology = Topology.of_hosts(hosts)
    size = topology.num_ranks
    everywhere = prefill(new, range(size), fair_shares(300, [300] * size))
    scattered = prefill(new, range(size), [31 * (rank % 2) for rank in range(size)])
    behind = prefill(new, [0], [77], start=size - 1)
    assert_fleet_agrees(topology, [everywhere, scattered, behind], strategy, Shape())


@each_strategy
@each_topology
def test_decode_over_hosts_for_any_owner(strategy: Strategy, hosts: Sequence[int]) -> None:
    """Each rank decodes one request whose keys are on all ranks, and one with none of its own."""
    topology = Topology.of_hosts(hosts)
    size = topology.num_ranks
    everywhere = [prefill(1, [owner], range(40, 40 + size)) for owner in range(size)]
    elsewhere = [
        prefill(1, [owner], [0 if rank == owner else 9 for rank in range(size)])
        for owner in range(size)
    ]
    assert_fleet_agrees(topology, [*everywhere, *elsewhere], strategy, Shape())


@each_strategy
@pytest.mark.parametrize("hosts", [h for h in TOPOLOGIES if sum(h) > 3], ids=str)
def test_a_batch_of_requests_on_different_hosts(strategy: Strategy, hosts: Sequence[int]) -> None:
    assert_fleet_agrees(Topology.of_hosts(hosts), BATCH, strategy, Shape())


@pytest.mark.parametrize("strategy", ["gather_kv", "pass_q", "tree"])
@pytest.mark.parametrize("hosts", [h for h in TOPOLOGIES if sum(h) > 3], ids=str)
def test_a_rank_need_not_know_of_requests_in_which_it_has_no_part(
    strategy: Strategy, hosts: Sequence[int]
) -> None:
    def work(transport: Transport) -> dict[int, AttentionState]:
        own = [i for i, request in enumerate(BATCH) if transport.rank in request.ranks]
        states = attend([BATCH[i] for i in own], strategy, transport, Shape())
        return dict(zip(own, states, strict=True))

    by_rank = run_fleet(Topology.of_hosts(hosts), work)
    for index, request in enumerate(BATCH):
        empty = AttentionState.empty(0, 4, 64, torch.device("cpu"))
        assert_expected(request, [states.get(index, empty) for states in by_rank], Shape())


@pytest.mark.parametrize("hosts", [(4,), (2, 2), (3, 1)], ids=str)
def test_several_exchanges_under_way_at_once(hosts: Sequence[int]) -> None:
    """Each starts before any ends, in the same order on every rank, as in a step."""

    def work(transport: Transport) -> list[AttentionState]:
        jobs = [
            STRATEGIES[strategy](layer_of(BATCH[:3], strategy, transport, Shape()))
            for strategy in (*SHARED, *SHARED)
        ]
        for job in jobs:
            next(job)
        return [state for job in jobs for state in finish(job)]

    by_rank = run_fleet(Topology.of_hosts(hosts), work)
    for index, states in enumerate(zip(*by_rank, strict=True)):
        assert_expected(BATCH[index % 3], states, Shape())


@each_strategy
@pytest.mark.parametrize("hosts", [(1,), (2,), (3,), *TOPOLOGIES], ids=str)
def test_a_strategy_yields_once_when_its_first_messages_are_under_way(
    strategy: Strategy, hosts: Sequence[int]
) -> None:
    size = sum(hosts)

    def work(transport: Transport) -> int:
        job = STRATEGIES[strategy](
            layer_of([prefill(12, range(size))], strategy, transport, Shape())
        )
        return sum(1 for _ in job)

    assert run_fleet(Topology.of_hosts(hosts), work) == [1] * size


@each_strategy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_travels_without_a_further_rounding(
    strategy: Strategy, dtype: torch.dtype
) -> None:
    assert_fleet_agrees(4, BATCH, strategy, Shape(dtype=dtype))


@each_strategy
def test_the_kernel_for_gpus_serves_every_strategy(strategy: Strategy) -> None:
    cuda = pytest.importorskip("longspan.attention.cuda", reason="needs Triton")
    one_at_a_time = Lock()  # Triton's interpreter, which runs it here, knows of no threads

    def kernel(*tensors: Tensor, scale: float, causal: bool = False) -> AttentionState:
        with one_at_a_time:
            state: AttentionState = cuda.attention(*tensors, scale=scale, causal=causal)
        return state

    shape = Shape(4, 2, 16)
    request = prefill(20, [0, 1, 2], [5, 0, 33])
    work = partial(attend, [request], strategy, shape=shape, kernel=Tiled(kernel))
    by_rank = run_fleet(3, work)
    assert_expected(request, [state for (state,) in by_rank], shape)


@each_strategy
def test_the_order_of_ranks_in_a_request_does_not_matter(strategy: Strategy) -> None:
    ordered = prefill(40, [0, 1, 2], [3, 4, 5])
    turned = Request(
        ordered.ranks[::-1], ordered.cached[::-1], ordered.queries[::-1], ordered.keys[::-1]
    )
    assert_fleet_agrees(3, [turned], strategy, Shape())


@st.composite
def batches(draw: st.DrawFn) -> tuple[Topology, list[Request]]:
    topology = draw(topologies)
    ranks = rank_sets(topology.num_ranks)
    return topology, draw(st.lists(requests(ranks), min_size=1, max_size=4))


@given(
    batch=batches(),
    strategy=st.sampled_from(SHARED),
    heads=st.sampled_from([(4, 2), (7, 1), (3, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=200)
def test_any_batch_on_any_hosts(
    batch: tuple[Topology, list[Request]],
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


@pytest.mark.parametrize("hosts", [(4,), (2, 2), (2, 1, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("shape", FULL_PREFILL_SHAPES, ids=lambda s: f"{s.heads}_{s.kv_heads}")
def test_strategies_agree_with_each_other(shape: Shape, hosts: Sequence[int]) -> None:
    topology = Topology.of_hosts(hosts)
    request = prefill(65, range(topology.num_ranks), [40, 3])
    by_strategy = [
        run_fleet(topology, partial(attend, [request], strategy, shape=shape))
        for strategy in SHARED
    ]
    for one, other in combinations(by_strategy, 2):
        for (state,), (other_state,) in zip(one, other, strict=True):
            assert_close(state, other_state)
