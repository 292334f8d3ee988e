"""Bytes are those of the known formulas, and a step takes the strategy that sends the fewest."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longspan.cost.kv_shape import KVShape
from longspan.cost.strategy import (
    Calls,
    Sent,
    carried_bytes,
    exchanged_bytes,
    num_calls,
    sent_bytes,
)
from longspan.models import ModelSpec
from longspan.plan import Run, Shard, Strategy
from longspan.topology import Topology

LLAMA_8B = KVShape(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, itemsize=2)

shapes = st.builds(
    KVShape,
    num_layers=st.integers(1, 80),
    num_heads=st.sampled_from((8, 32, 64, 128)),
    num_kv_heads=st.sampled_from((1, 2, 8)),
    head_dim=st.sampled_from((64, 80, 128)),
    itemsize=st.sampled_from((2, 4)),
    row_bytes=st.none(),
)
ranks = st.integers(2, 16)
ONE_HOST = Topology.of_hosts([16])
topologies = st.lists(st.integers(1, 4), min_size=10, max_size=10).map(Topology.of_hosts)


def bytes_on_one_host(strategy: Strategy, shards: Sequence[Shard], shape: KVShape) -> int:
    sent = exchanged_bytes(strategy, shards, shape, ONE_HOST)
    assert sent.far == 0
    return sent.near


def even(size: int, new: int, cached: int) -> list[Shard]:
    """Each of `size` ranks has `new` of the new tokens and `cached` of the cached ones."""
    return [
        Shard(rank, run, cached, run) for rank in range(size) for run in ((Run(rank * new, new),),)
    ]


def decode(cached: Sequence[int]) -> list[Shard]:
    """One new token on the first rank; each rank holds so many cached ones."""
    new = (Run(sum(cached), 1),)
    return [
        Shard(rank, () if rank else new, tokens, () if rank else new)
        for rank, tokens in enumerate(cached)
    ]


@st.composite
def uneven(draw: st.DrawFn) -> list[Shard]:
    """Any shares of 1 to 6 ranks, at least one with queries."""
    sizes = st.tuples(st.integers(0, 9), st.integers(0, 9))
    pairs = draw(st.dictionaries(st.integers(0, 9), sizes, min_size=1, max_size=6))
    assume(any(new for new, _ in pairs.values()))
    shards, start = [], 0
    for rank, (new, cached) in sorted(pairs.items()):
        runs = (Run(start, new),) if new else ()
        shards.append(Shard(rank, runs, cached, runs))
        start += new
    return shards


@given(ranks, st.integers(1, 10**5), st.integers(0, 10**5), shapes)
def test_even_shards_send_what_the_formulas_say(
    size: int, new: int, cached: int, shape: KVShape
) -> None:
    """A rank sends (N-1)(L/N) 2 n_kv d e, or (N-1)(T/N) n_q (d e + 4 d + 4), of 2411.01783."""
    _, heads, kv_heads, head_dim, itemsize, _ = shape
    shards = even(size, new, cached)
    keys = (size - 1) * (cached + new) * 2 * kv_heads * head_dim * itemsize
    queries = (size - 1) * new * heads * (head_dim * itemsize + head_dim * 4 + 4)
    assert bytes_on_one_host("pass_kv", shards, shape) == size * keys
    assert bytes_on_one_host("gather_kv", shards, shape) == size * keys
    assert bytes_on_one_host("pass_q", shards, shape) == size * queries


def test_llama_8b_on_8_ranks_sends_what_was_published() -> None:
    """Megabytes that a rank sends in one layer, in full prefill of 128K, and of 4K after 124K."""
    full, chunk = even(8, 16 * 1024, 0), even(8, 512, 15 * 1024 + 512)
    assert bytes_on_one_host("pass_kv", full, LLAMA_8B) / 8e6 == pytest.approx(470, abs=1)
    assert bytes_on_one_host("pass_kv", chunk, LLAMA_8B) / 8e6 == pytest.approx(470, abs=1)
    queries_there = 7 * 512 * 32 * 128 * 2
    states_back = 7 * 512 * 32 * (128 * 4 + 4)
    assert bytes_on_one_host("pass_q", chunk, LLAMA_8B) / 8 == queries_there + states_back


@given(uneven(), shapes)
def test_a_ring_takes_keys_hop_by_hop_no_further_than_the_last_rank_that_asks(
    shards: list[Shard], shape: KVShape
) -> None:
    sent = 0
    for place in range(len(shards)):
        following = shards[place + 1 :] + shards[:place]
        while following and not following[-1].num_queries:
            following.pop()
        sent += len(following) * shards[place].num_keys
    assert bytes_on_one_host("pass_kv", shards, shape) == sent * shape.key_bytes


@given(uneven(), shapes)
def test_all_other_strategies_send_between_each_rank_that_asks_and_each_that_holds(
    shards: list[Shard], shape: KVShape
) -> None:
    keys = queries = 0
    for asking in shards:
        for holding in shards:
            if asking.rank != holding.rank and asking.num_queries and holding.num_keys:
                keys += holding.num_keys
                queries += asking.num_queries
    assert bytes_on_one_host("gather_kv", shards, shape) == keys * shape.key_bytes
    assert bytes_on_one_host("pass_q", shards, shape) == queries * shape.query_bytes


@given(uneven(), shapes, topologies)
def test_on_one_host_and_for_each_rank_a_host_all_bytes_are_near_or_far(
    shards: list[Shard], shape: KVShape, topology: Topology
) -> None:
    apart = Topology.of_hosts([1] * 10)
    for strategy in get_args(Strategy):
        near, far = exchanged_bytes(strategy, shards, shape, topology)
        altogether = bytes_on_one_host(strategy, shards, shape)
        assert exchanged_bytes(strategy, shards, shape, apart) == Sent(0, altogether)
        if strategy != "pass_kv":  # whose way over hosts passes other ranks without queries
            assert near + far == altogether


@given(uneven(), shapes, topologies)
def test_tree_sends_what_pass_q_does_but_to_each_other_host_once(
    shards: list[Shard], shape: KVShape, topology: Topology
) -> None:
    hosts = topology.hosts
    holding = {hosts[shard.rank] for shard in shards if shard.num_keys}
    crossings = sum(shard.num_queries * len(holding - {hosts[shard.rank]}) for shard in shards)
    tree = exchanged_bytes("tree", shards, shape, topology)
    assert tree.far == crossings * shape.query_bytes
    assert sum(tree) == bytes_on_one_host("pass_q", shards, shape)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 999), st.integers(0, 999), shapes)
def test_even_shards_send_over_hosts_what_the_formulas_say(
    hosts: int, size: int, new: int, cached: int, shape: KVShape
) -> None:
    """Each rank of N hosts of r ranks: N - 1 and (N - 1) r shares or keys far, the rest near."""
    topology, shards = Topology.of_hosts([size] * hosts), even(hosts * size, new, cached)
    key, query = (cached + new) * shape.key_bytes, new * shape.query_bytes
    others, rest = hosts - 1, hosts * (size - 1)
    all_others = hosts * size - size
    expected: dict[Strategy, Sent] = {
        "pass_kv": Sent(rest * key, others * key),
        "gather_kv": Sent((size - 1) * key, all_others * key),
        "pass_q": Sent((size - 1) * query, all_others * query),
        "tree": Sent(rest * query, others * query),
    }
    for strategy, sent in expected.items():
        assert sent_bytes(strategy, shards, shape, topology) == [sent] * hosts * size


def test_a_rank_sends_what_passes_through_it() -> None:
    """Ranks 0, 1, 2 hold 3, 7 and 2 tokens; ranks 0 and 1 have 3 and 2 queries."""
    first, second = (Run(0, 3),), (Run(3, 2),)
    shards = [Shard(0, first, 0, first), Shard(1, second, 5, second), Shard(2, (), 2, ())]
    key, asked, answered = LLAMA_8B.key_bytes, LLAMA_8B.asked_bytes, LLAMA_8B.answered_bytes
    queries = [
        3 * 2 * asked + 2 * answered,
        2 * 2 * asked + 3 * answered,
        (3 + 2) * answered,
    ]
    expected = {
        "local": [0, 0, 0],
        "pass_kv": [(3 + 2) * key, 7 * key, (2 + 7) * key],
        "gather_kv": [3 * key, 7 * key, 2 * 2 * key],
        "pass_q": queries,
        "tree": queries,
    }
    for strategy in get_args(Strategy):
        sent = sent_bytes(strategy, shards, LLAMA_8B, ONE_HOST)
        assert sent == [Sent(near, 0) for near in expected[strategy]]


def test_two_hosts_send_what_crosses_and_what_does_not() -> None:
    """Hosts 0, 1 | 2, 3, 4; rank 0 has 3 queries, rank 2 has 2; rank 1 has no keys."""
    topology = Topology.of_hosts([2, 3])
    first, second = (Run(0, 3),), (Run(3, 2),)
    shards = [
        Shard(0, first, 0, first),
        Shard(1, (), 0, ()),
        Shard(2, second, 5, second),
        Shard(3, (), 20, ()),
        Shard(4, (), 30, ()),
    ]
    key, asked, answered = LLAMA_8B.key_bytes, LLAMA_8B.asked_bytes, LLAMA_8B.answered_bytes
    expected: dict[Strategy, list[Sent]] = {
        # 20 come in at rank 1 and go on to 0; 3 at rank 2; 30 at 0; 20 and 30 hop to rank 2.
        "pass_kv": [
            Sent(0, 3 * key),
            Sent(20 * key, 0),
            Sent(0, 7 * key),
            Sent(20 * key, 20 * key),
            Sent((20 + 30) * key, 30 * key),
        ],
        "gather_kv": [
            Sent(0, 3 * key),
            Sent(0, 0),
            Sent(0, 7 * key),
            Sent(20 * key, 20 * key),
            Sent(30 * key, 30 * key),
        ],
        "pass_q": [
            Sent(0, 3 * 3 * asked + 2 * answered),
            Sent(0, 0),
            Sent(2 * 2 * asked, 2 * asked + 3 * answered),
            Sent(2 * answered, 3 * answered),
            Sent(2 * answered, 3 * answered),
        ],
        # Rank 0's gateway on the other host is rank 2; rank 0 is rank 2's.
        "tree": [
            Sent(0, 3 * asked + 2 * answered),
            Sent(0, 0),
            Sent((2 + 3) * 2 * asked, 2 * asked + 3 * answered),
            Sent((2 + 3) * answered, 0),
            Sent((2 + 3) * answered, 0),
        ],
    }
    for strategy, sent in expected.items():
        assert sent_bytes(strategy, shards, LLAMA_8B, topology) == sent


def test_links_carry_what_is_sent_and_gathered() -> None:
    """Hosts 0, 1 | 2; rank 0 alone has a query, so that all other keys come to it."""
    topology, new = Topology.of_hosts([2, 1]), (Run(60, 1),)
    shards = [Shard(0, new, 10, new), Shard(1, (), 20, ()), Shard(2, (), 30, ())]
    key = LLAMA_8B.key_bytes
    sent = sent_bytes("gather_kv", shards, LLAMA_8B, topology)
    assert sent == [Sent(0, 0), Sent(20 * key, 0), Sent(0, 30 * key)]
    carried = carried_bytes(sent, "gather_kv", shards, LLAMA_8B, topology)
    assert carried == [Sent(10 * key, 30 * key), Sent(10 * key, 0), Sent(0, 30 * key)]
    for strategy in get_args(Strategy):
        if strategy != "gather_kv":
            sent = sent_bytes(strategy, shards, LLAMA_8B, topology)
            assert carried_bytes(sent, strategy, shards, LLAMA_8B, topology) == sent


def test_exchanges_one_after_the_other() -> None:
    calls = {strategy: num_calls(strategy, range(5), ONE_HOST) for strategy in get_args(Strategy)}
    near = {"local": 0, "pass_kv": 4, "gather_kv": 1, "pass_q": 2, "tree": 2}
    assert calls == {strategy: Calls(number, far=0) for strategy, number in near.items()}
    assert all(num_calls(strategy, [3], ONE_HOST) == (0, 0) for strategy in get_args(Strategy))


def test_exchanges_that_cross_hosts_are_counted_apart() -> None:
    topology = Topology.of_hosts([3, 1, 2])
    everyone, one_host, one_each = range(6), [4, 5], [0, 3, 5]
    assert num_calls("pass_kv", everyone, topology) == Calls(near=3 * 2, far=2)
    assert num_calls("pass_kv", one_host, topology) == Calls(near=1, far=0)
    assert num_calls("gather_kv", everyone, topology) == Calls(near=0, far=1)
    assert num_calls("pass_q", everyone, topology) == Calls(near=0, far=2)
    assert num_calls("pass_q", one_host, topology) == Calls(near=2, far=0)
    assert num_calls("tree", everyone, topology) == Calls(near=2, far=2)
    assert num_calls("tree", one_host, topology) == Calls(near=2, far=0)
    assert num_calls("tree", one_each, topology) == Calls(near=0, far=2)
    # Only a gateway that has others beside it relays.
    home_beside, home_alone = [0], [2]
    two = Topology.of_hosts([2, 1])
    assert num_calls("tree", range(3), two, home_beside) == Calls(near=0, far=2)
    assert num_calls("tree", range(3), two, home_alone) == Calls(near=2, far=2)


def test_a_shape_is_read_from_a_model() -> None:
    spec = ModelSpec(
        name="m",
        architecture="A",
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=99,
        max_model_len=99,
        eos_token_ids=(),
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        num_active_parameters=1000,
    )
    shape = KVShape.of(spec)
    assert shape == KVShape(3, 8, 2, 16, 2)
    assert shape.key_bytes == 2 * 2 * 16 * 2
    assert shape.token_bytes == 3 * shape.key_bytes
    assert shape.query_bytes == 8 * (16 * 2 + 16 * 4 + 4)
    assert shape.asked_bytes == 8 * 16 * 2
    narrow = KVShape.of(replace(spec, kv_cache_dtype="int8"))
    assert narrow.key_bytes == 2 * 2 * (16 + 4)
    assert narrow.query_bytes == shape.query_bytes
