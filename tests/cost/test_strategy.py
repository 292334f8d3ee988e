"""Bytes are those of the known formulas."""

from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longspan.cost.strategy import (
    Calls,
    KVShape,
    Sent,
    exchanged_bytes,
    num_calls,
    sent_bytes,
)
from longspan.models import ModelSpec
from longspan.plan import Run, Shard, Strategy
from longspan.topology import Topology

ONE_HOST = Topology.of_hosts([16])
LLAMA_8B = KVShape(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, itemsize=2)

shapes = st.builds(
    KVShape,
    num_layers=st.integers(1, 80),
    num_heads=st.sampled_from((8, 32, 64, 128)),
    num_kv_heads=st.sampled_from((1, 2, 8)),
    head_dim=st.sampled_from((64, 80, 128)),
    itemsize=st.sampled_from((2, 4)),
)
ranks = st.integers(2, 16)


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
    _, heads, kv_heads, head_dim, itemsize = shape
    shards = even(size, new, cached)
    keys = (size - 1) * (cached + new) * 2 * kv_heads * head_dim * itemsize
    queries = (size - 1) * new * heads * (head_dim * itemsize + head_dim * 4 + 4)
    assert exchanged_bytes("pass_kv", shards, shape) == size * keys
    assert exchanged_bytes("gather_kv", shards, shape) == size * keys
    assert exchanged_bytes("pass_q", shards, shape) == size * queries


def test_llama_8b_on_8_ranks_sends_what_was_published() -> None:
    """Megabytes that a rank sends in one layer, in full prefill of 128K, and of 4K after 124K."""
    full, chunk = even(8, 16 * 1024, 0), even(8, 512, 15 * 1024 + 512)
    assert exchanged_bytes("pass_kv", full, LLAMA_8B) / 8e6 == pytest.approx(470, abs=1)
    assert exchanged_bytes("pass_kv", chunk, LLAMA_8B) / 8e6 == pytest.approx(470, abs=1)
    queries_there = 7 * 512 * 32 * 128 * 2
    states_back = 7 * 512 * 32 * (128 * 4 + 4)
    assert exchanged_bytes("pass_q", chunk, LLAMA_8B) / 8 == queries_there + states_back


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
    assert exchanged_bytes("pass_kv", shards, shape) == sent * shape.key_bytes


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
    assert exchanged_bytes("gather_kv", shards, shape) == keys * shape.key_bytes
    assert exchanged_bytes("pass_q", shards, shape) == queries * shape.query_bytes


@given(uneven(), shapes)
def test_what_each_rank_sends_is_what_all_send_together(
    shards: list[Shard], shape: KVShape
) -> None:
    for strategy in get_args(Strategy):
        sent = sent_bytes(strategy, shards, shape, ONE_HOST)
        assert sum(near for near, _ in sent) == exchanged_bytes(strategy, shards, shape)


def test_a_rank_sends_what_passes_through_it() -> None:
    """Ranks 0, 1, 2 hold 3, 7 and 2 tokens; ranks 0 and 1 have 3 and 2 queries."""
    first, second = (Run(0, 3),), (Run(3, 2),)
    shards = [Shard(0, first, 0, first), Shard(1, second, 5, second), Shard(2, (), 2, ())]
    key, asked, answered = LLAMA_8B.key_bytes, LLAMA_8B.asked_bytes, LLAMA_8B.answered_bytes
    expected = {
        "local": [0, 0, 0],
        "pass_kv": [(3 + 2) * key, 7 * key, (2 + 7) * key],
        "gather_kv": [3 * key, 7 * key, 2 * 2 * key],
        "pass_q": [
            3 * 2 * asked + 2 * answered,
            2 * 2 * asked + 3 * answered,
            (3 + 2) * answered,
        ],
    }
    for strategy in get_args(Strategy):
        sent = sent_bytes(strategy, shards, LLAMA_8B, ONE_HOST)
        assert sent == [Sent(near, 0) for near in expected[strategy]]


def test_exchanges_one_after_the_other() -> None:
    calls = {"local": 0, "pass_kv": 4, "gather_kv": 1, "pass_q": 2}
    for strategy in get_args(Strategy):
        assert num_calls(strategy, range(5), ONE_HOST) == Calls(calls[strategy], 0)
        assert num_calls(strategy, [3], ONE_HOST) == Calls(0, 0)
        apart = num_calls(strategy, range(5), Topology.of_hosts([1] * 5))
        assert apart == Calls(0, calls[strategy])


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
        num_active_parameters=1000,
    )
    shape = KVShape.of(spec)
    assert shape == KVShape(3, 8, 2, 16, 2)
    assert shape.key_bytes == 2 * 2 * 16 * 2
    assert shape.token_bytes == 3 * shape.key_bytes
    assert shape.query_bytes == 8 * (16 * 2 + 16 * 4 + 4)
    assert shape.asked_bytes == 8 * 16 * 2
