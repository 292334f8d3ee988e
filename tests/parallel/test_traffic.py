"""What each strategy sends, counted at the seam, is what the formulas say. e is bytes a number."""

import threading
from collections.abc import Sequence

import pytest
import torch
from fleet import (
    SHARED,
    TOPOLOGIES,
    Request,
    Runs,
    Shape,
    attend,
    rank_sets,
    requests,
    run_fleet,
    topologies,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.cost.kv_shape import KVShape
from longspan.cost.strategy import Sent, num_calls, sent_bytes
from longspan.engine.shard import zigzag
from longspan.parallel.transport import Transport
from longspan.plan import Run, Strategy, Traffic
from longspan.topology import Topology

each_strategy = pytest.mark.parametrize("strategy", SHARED)
each_topology = pytest.mark.parametrize("hosts", TOPOLOGIES, ids=str)
each_size = pytest.mark.parametrize("size", [2, 3, 4])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

NOTHING: Runs = ()


def kv_bytes(tokens: int, shape: Shape) -> int:
    return tokens * 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize


def query_bytes(tokens: int, shape: Shape) -> int:
    return tokens * shape.heads * shape.head_dim * shape.dtype.itemsize


def state_bytes(tokens: int, shape: Shape) -> int:
    return tokens * shape.heads * (shape.head_dim * 4 + 4)


def traffic_of(
    fleet: int | Topology, requests: Sequence[Request], strategy: Strategy, shape: Shape
) -> list[Traffic]:
    """What each rank counts under the strategy's name; nothing under any other."""

    def work(transport: Transport) -> dict[str, Traffic]:
        attend(requests, strategy, transport, shape)
        return transport.take_traffic()

    counted = run_fleet(fleet, work)
    assert all(traffic.keys() <= {strategy} for traffic in counted)
    return [traffic.get(strategy, Traffic()) for traffic in counted]


def even(size: int, cached: int, new: int) -> Request:
    """`cached` and `new` tokens on each rank."""
    runs = tuple(tuple(runs) for runs in zigzag([new] * size))
    return Request(tuple(range(size)), (cached,) * size, runs, runs)


@each_size
@each_dtype
def test_pass_kv_sends_each_block_once_to_each_other_rank(size: int, dtype: torch.dtype) -> None:
    """(R - 1) * S / R * 2 * G * D * e in R - 1 calls."""
    shape = Shape(dtype=dtype)
    expected = (size - 1) * kv_bytes(10 + 6, shape)
    counted = traffic_of(size, [even(size, cached=10, new=6)], "pass_kv", shape)
    assert counted == [Traffic(size - 1, size - 1, expected)] * size


@each_size
@each_dtype
def test_gather_kv_sends_the_bytes_of_pass_kv_in_one_call(size: int, dtype: torch.dtype) -> None:
    """(R - 1) * S / R * 2 * G * D * e."""
    shape = Shape(dtype=dtype)
    expected = (size - 1) * kv_bytes(10 + 6, shape)
    counted = traffic_of(size, [even(size, cached=10, new=6)], "gather_kv", shape)
    assert counted == [Traffic(1, size - 1, expected)] * size


@each_size
@each_dtype
@pytest.mark.parametrize("strategy", ["pass_q", "tree"])
def test_pass_q_sends_queries_and_float32_states_in_two_calls(
    strategy: Strategy, size: int, dtype: torch.dtype
) -> None:
    """(R - 1) * T / R * H * (D * e + D * 4 + 4); on one host tree is pass-Q."""
    shape = Shape(dtype=dtype)
    per_token = shape.heads * (shape.head_dim * dtype.itemsize + shape.head_dim * 4 + 4)
    expected = (size - 1) * 6 * per_token
    counted = traffic_of(size, [even(size, cached=10, new=6)], strategy, shape)
    assert counted == [Traffic(2, 2 * (size - 1), expected)] * size


@each_strategy
@each_size
def test_a_batch_travels_in_the_calls_of_one_request(strategy: Strategy, size: int) -> None:
    one, other = even(size, cached=10, new=6), even(size, cached=0, new=2)
    alone = traffic_of(size, [one], strategy, Shape())
    beside = traffic_of(size, [other], strategy, Shape())
    together = traffic_of(size, [one, other], strategy, Shape())
    assert together == [
        Traffic(first.calls, first.messages, first.bytes + second.bytes)
        for first, second in zip(alone, beside, strict=True)
    ]


COMPUTES_OR_HOLDS = Request(
    ranks=(0, 1),
    cached=(0, 50),
    queries=((Run(0, 8),), NOTHING),
    keys=(NOTHING, (Run(0, 8),)),
)
"""Rank 0 computes 8 tokens and holds no keys; rank 1 holds all 58 and computes nothing."""


@pytest.mark.parametrize("strategy", ["pass_kv", "gather_kv"])
def test_keys_go_from_the_rank_that_holds_to_the_rank_that_computes(strategy: Strategy) -> None:
    computes, holds = traffic_of(2, [COMPUTES_OR_HOLDS], strategy, Shape())
    assert computes == Traffic(calls=1, messages=0, bytes=0)
    assert holds == Traffic(calls=1, messages=1, bytes=kv_bytes(58, Shape()))


@pytest.mark.parametrize("strategy", ["pass_q", "tree"])
def test_queries_go_to_the_rank_that_holds_and_states_come_back(strategy: Strategy) -> None:
    computes, holds = traffic_of(2, [COMPUTES_OR_HOLDS], strategy, Shape())
    assert computes == Traffic(calls=2, messages=1, bytes=query_bytes(8, Shape()))
    assert holds == Traffic(calls=2, messages=1, bytes=state_bytes(8, Shape()))


def decode(rank: int, cached: Sequence[int]) -> Request:
    """One new token on one rank, and `cached[r]` tokens on rank r."""
    runs = tuple((Run(0, 1),) if r == rank else NOTHING for r in range(len(cached)))
    return Request(tuple(range(len(cached))), tuple(cached), runs, runs)


def test_keys_go_no_further_round_the_ring_than_the_last_rank_with_queries() -> None:
    """All for rank 1: its own stay, those of 0 make one hop, of 3 two and of 2 three."""
    shape = Shape()
    counted = traffic_of(4, [decode(1, [10, 20, 30, 40])], "pass_kv", shape)
    assert [traffic.bytes for traffic in counted] == [
        kv_bytes(10 + 40 + 30, shape),
        0,
        kv_bytes(30, shape),
        kv_bytes(40 + 30, shape),
    ]
    assert [traffic.messages for traffic in counted] == [3, 0, 1, 2]


def test_a_block_is_cut_where_a_request_leaves_the_ring() -> None:
    """The requests' keys travel together, each no further than its own last rank."""
    shape = Shape()
    requests = [decode(1, [1, 2, 3]), decode(2, [10, 20, 30]), decode(0, [100, 200, 300])]
    counted = traffic_of(3, requests, "pass_kv", shape)
    assert [traffic.bytes for traffic in counted] == [
        kv_bytes((1 + 3) + 10, shape),
        kv_bytes((10 + 20) + 200, shape),
        kv_bytes((200 + 300) + 3, shape),
    ]


@pytest.mark.parametrize("strategy", ["gather_kv", "pass_q", "tree"])
def test_a_rank_sends_only_to_ranks_that_share_a_request(strategy: Strategy) -> None:
    pairs = [
        Request((0, 1), (5, 5), ((Run(0, 4),), NOTHING), ((Run(0, 4),), NOTHING)),
        Request((2, 3), (5, 5), ((Run(0, 4),), NOTHING), ((Run(0, 4),), NOTHING)),
    ]
    together = traffic_of(4, pairs, strategy, Shape())
    assert together[:2] == together[2:] == traffic_of(2, pairs[:1], strategy, Shape())


@each_strategy
@pytest.mark.parametrize("rank", [0, 2])
def test_a_request_on_one_rank_sends_nothing(strategy: Strategy, rank: int) -> None:
    alone = Request((rank,), (20,), ((Run(0, 9),),), ((Run(0, 9),),))
    assert traffic_of(3, [alone], strategy, Shape()) == [Traffic()] * 3


@each_strategy
def test_keys_without_queries_send_nothing(strategy: Strategy) -> None:
    idle = Request((0, 1, 2), (20, 5, 0), (NOTHING,) * 3, (NOTHING,) * 3)
    assert traffic_of(3, [idle], strategy, Shape()) == [Traffic()] * 3


def kv_shape(shape: Shape) -> KVShape:
    return KVShape(1, shape.heads, shape.kv_heads, shape.head_dim, shape.dtype.itemsize)


def sent_by_each(
    topology: Topology, batch: Sequence[Request], strategy: Strategy, shape: Shape
) -> list[Sent]:
    """What the formulas say that each rank of a fleet sends for a batch."""
    near, far = [0] * topology.num_ranks, [0] * topology.num_ranks
    for request in batch:
        shards = sorted(request.segment(strategy).shards, key=lambda shard: shard.rank)
        sent = sent_bytes(strategy, shards, kv_shape(shape), topology)
        for shard, (to_near, to_far) in zip(shards, sent, strict=True):
            near[shard.rank] += to_near
            far[shard.rank] += to_far
    return [Sent(*both) for both in zip(near, far, strict=True)]


def split(counted: Sequence[Traffic]) -> list[Sent]:
    return [Sent(traffic.bytes - traffic.far_bytes, traffic.far_bytes) for traffic in counted]


@each_strategy
@each_topology
@each_dtype
def test_even_shares_send_over_any_hosts_what_the_formulas_say(
    strategy: Strategy, hosts: Sequence[int], dtype: torch.dtype
) -> None:
    topology, shape = Topology.of_hosts(hosts), Shape(dtype=dtype)
    request = even(topology.num_ranks, cached=10, new=6)
    counted = traffic_of(topology, [request], strategy, shape)
    assert split(counted) == sent_by_each(topology, [request], strategy, shape)
    calls = max(traffic.calls for traffic in counted)
    rounds = sum(num_calls(strategy, request.ranks, topology))
    assert calls == rounds if len(set(hosts)) == 1 else calls <= rounds


@pytest.mark.parametrize("hosts", [(1, 1), (2, 2), (3, 3), (2, 2, 2, 2)], ids=str)
def test_tree_sends_few_messages_over_even_hosts(hosts: Sequence[int]) -> None:
    """2 (N - 1) to other hosts' gateways and back, 4 (r - 1) inside the host."""
    topology = Topology.of_hosts(hosts)
    counted = traffic_of(topology, [even(topology.num_ranks, 10, 6)], "tree", Shape())
    messages = 2 * (len(hosts) - 1) + 4 * (hosts[0] - 1)
    assert [traffic.messages for traffic in counted] == [messages] * topology.num_ranks


@st.composite
def batches(draw: st.DrawFn) -> tuple[Topology, list[Request]]:
    """Requests with shares on the same ranks, as those have that go round one ring."""
    topology = draw(topologies)
    ranks = draw(rank_sets(topology.num_ranks))
    return topology, draw(st.lists(requests(st.just(ranks)), min_size=1, max_size=3))


@given(batch=batches(), strategy=st.sampled_from(SHARED))
@settings(deadline=None, max_examples=200)
def test_any_shares_send_over_any_hosts_what_the_formulas_say(
    batch: tuple[Topology, list[Request]], strategy: Strategy
) -> None:
    topology, requests = batch
    shape = Shape(head_dim=2)
    counted = traffic_of(topology, requests, strategy, shape)
    assert split(counted) == sent_by_each(topology, requests, strategy, shape)


@pytest.mark.parametrize("owner", [0, 3])
@pytest.mark.parametrize("hosts", [(1, 1), (2, 2), (4, 4), (2, 2, 2, 2), (3, 3, 3)], ids=str)
def test_tree_decode_sends_to_other_hosts_as_many_times_less_as_they_have_ranks(
    hosts: Sequence[int], owner: int
) -> None:
    """A query goes to, and a state comes from, each other host once; altogether as many bytes."""
    topology, shape = Topology.of_hosts(hosts), Shape()
    request = decode(owner % topology.num_ranks, range(5, 5 + topology.num_ranks))
    flat, tree = (traffic_of(topology, [request], way, shape) for way in ("pass_q", "tree"))
    far = sum(traffic.far_bytes for traffic in tree)
    assert far == (len(hosts) - 1) * (query_bytes(1, shape) + state_bytes(1, shape))
    assert far * hosts[0] == sum(traffic.far_bytes for traffic in flat)
    assert sum(traffic.bytes for traffic in tree) == sum(traffic.bytes for traffic in flat)


def test_the_ranks_of_a_host_share_the_work_of_its_gateway() -> None:
    """Each of 2 hosts' 3 ranks decodes a request; all have keys of all."""
    topology = Topology.of_hosts([3, 3])
    batch = [decode(owner, [4] * 6) for owner in range(6)]
    counted = traffic_of(topology, batch, "tree", Shape())
    assert all(traffic == counted[0] for traffic in counted)


@each_topology
def test_a_ring_sends_each_block_into_each_other_host_once(hosts: Sequence[int]) -> None:
    """What a host sends to the next is all keys but that host's own."""
    topology, shape = Topology.of_hosts(hosts), Shape()
    size = topology.num_ranks
    counted = traffic_of(topology, [even(size, cached=10, new=6)], "pass_kv", shape)
    for host in range(len(hosts)):
        into_next = sum(
            traffic.far_bytes
            for rank, traffic in enumerate(counted)
            if topology.hosts[rank] == host
        )
        others = size - hosts[(host + 1) % len(hosts)]
        assert into_next == others * kv_bytes(10 + 6, shape)


def test_keys_cross_no_further_than_the_last_host_with_queries() -> None:
    """All for rank 2 of hosts 0, 1 | 2, 3 | 4: keys on 0 and 1 cross once, those on 4 twice."""
    topology, shape = Topology.of_hosts([2, 2, 1]), Shape()
    counted = traffic_of(topology, [decode(2, [10, 20, 30, 40, 50])], "pass_kv", shape)
    # Rank 4's keys come in at rank 0. Those of 1, of 3, are one hop from rank 2 on its host.
    assert split(counted) == [
        Sent(0, kv_bytes(10 + 50, shape)),
        Sent(0, kv_bytes(20, shape)),
        Sent(0, 0),
        Sent(kv_bytes(20 + 40, shape), 0),
        Sent(0, kv_bytes(50, shape)),
    ]


def exchange_two_numbers(transport: Transport) -> dict[str, Traffic]:
    peer = 1 - transport.rank
    received = torch.empty(2)
    transport.exchange("pair", [(peer, torch.ones(2))], [(peer, received)])()
    transport.exchange("void", [(peer, torch.ones(0))], [(peer, torch.empty(0))])()
    return transport.take_traffic()


def test_what_was_taken_is_not_counted_again() -> None:
    def work(transport: Transport) -> tuple[dict[str, Traffic], ...]:
        taken = exchange_two_numbers(transport), transport.take_traffic()
        return (*taken, exchange_two_numbers(transport))

    once = {"pair": Traffic(calls=1, messages=1, bytes=8)}
    assert run_fleet(2, work) == [(once, {}, once)] * 2


def test_bytes_to_other_hosts_are_counted_apart() -> None:
    def work(transport: Transport) -> Traffic:
        others = [rank for rank in range(3) if rank != transport.rank]
        sends = [(peer, torch.ones(peer + 1)) for peer in others]
        receives = [(peer, torch.empty(transport.rank + 1)) for peer in others]
        transport.exchange("all", sends, receives)()
        return transport.take_traffic()["all"]

    counted = run_fleet(Topology.of_hosts([2, 1]), work)
    assert [traffic.bytes for traffic in counted] == [20, 16, 12]
    assert [traffic.far_bytes for traffic in counted] == [12, 12, 12]


def test_receives_fill_in_the_order_in_which_they_start_whichever_is_waited_for_first() -> None:
    def work(transport: Transport) -> list[Tensor]:
        peer = 1 - transport.rank
        received = [torch.empty(1) for _ in range(3)]
        waits = [
            transport.exchange("pair", [(peer, torch.tensor([float(number)]))], [(peer, into)])
            for number, into in enumerate(received)
        ]
        for wait in reversed(waits):
            wait()
        return received

    for received in run_fleet(2, work):
        assert torch.cat(received).tolist() == [0.0, 1.0, 2.0]


def test_a_sent_tensor_may_be_written_again_after_the_wait() -> None:
    written_again = threading.Event()

    def work(transport: Transport) -> Tensor:
        if transport.rank == 0:
            sent = torch.ones(4)
            transport.exchange("one way", [(1, sent)], [])()
            sent.zero_()
            written_again.set()
            return sent
        received = torch.empty(4)
        wait = transport.exchange("one way", [], [(0, received)])
        written_again.wait()
        wait()
        return received

    assert run_fleet(2, work)[1].tolist() == [1.0] * 4
