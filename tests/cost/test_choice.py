"""A step takes the strategy of least predicted time, and keeps the last one if that is as good."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.cost.choice import (
    GATHER_BYTES,
    HYSTERESIS,
    Choice,
    choose,
    decide,
    is_feasible,
    predictions,
)
from longspan.cost.kv_shape import KVShape
from longspan.cost.model import CostModel, Prediction
from longspan.cost.rates import CPU_THREAD, CUDA, ETHERNET, LinkRates, Rates
from longspan.cost.strategy import Calls, Sent
from longspan.plan import Run, Shard, Strategy
from longspan.topology import Topology

SHAPE = KVShape(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, itemsize=2)
ONE_HOST, FOUR_HOSTS = Topology.of_hosts([4]), Topology.of_hosts([1] * 4)
MODELS = [
    CostModel(SHAPE, 7_000_000_000, rates, topology)
    for rates in (CUDA, CPU_THREAD)
    for topology in (ONE_HOST, FOUR_HOSTS)
]


def even(new: int, cached: int, size: int = 4) -> list[Shard]:
    """Zigzag: rank r has the blocks r and -1 - r of `2 * size` blocks of new tokens."""
    block = new // (2 * size)
    runs = [
        tuple(Run(cached + place * block, block) for place in (rank, 2 * size - 1 - rank))
        for rank in range(size)
    ]
    return [Shard(rank, run, cached // size, run) for rank, run in enumerate(runs)]


def decode(*cached: int) -> list[Shard]:
    new = (Run(sum(cached), 1),)
    return [
        Shard(rank, () if rank else new, keys, () if rank else new)
        for rank, keys in enumerate(cached)
    ]


@st.composite
def shares(draw: Callable[[st.SearchStrategy], object]) -> list[Shard]:
    """Any cut of some new tokens over 2 to 4 ranks with any cached ones."""
    size, position = draw(st.integers(2, 4)), draw(st.integers(0, 10**6))
    runs: list[list[Run]] = [[] for _ in range(size)]
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.sampled_from((1, 7, 300, 20_000)))
        runs[draw(st.integers(0, size - 1))].append(Run(position, length))
        position += length
    held = draw(st.lists(st.integers(1, 10**5), min_size=size, max_size=size))
    return [Shard(rank, tuple(run), held[rank], tuple(run)) for rank, run in enumerate(runs)]


@given(st.sampled_from(MODELS), shares())
def test_the_choice_is_the_fastest_of_those_that_are_feasible(
    model: CostModel, shards: list[Shard]
) -> None:
    chosen = decide(shards, model, None, True).strategy
    feasible = [name for name in model.strategies if is_feasible(name, shards, model)]
    seconds = {name: model.predict(name, shards).seconds for name in feasible}
    assert seconds[chosen] == min(seconds.values())


@given(st.sampled_from(MODELS), shares(), st.sampled_from(("pass_kv", "gather_kv", "pass_q")))
def test_the_last_strategy_is_kept_unless_another_is_better_by_so_much(
    model: CostModel, shards: list[Shard], last: Strategy
) -> None:
    predicted = predictions(shards, model)
    chosen = choose(predicted, last)
    best = min(one.seconds for one in predicted.values())
    if chosen != last and last in predicted:
        assert best < (1 - HYSTERESIS) * predicted[last].seconds
    else:
        assert predicted[chosen].seconds <= best / (1 - HYSTERESIS) * (1 + 1e-9)


def test_of_equals_fewer_exchanges_and_then_fewer_bytes() -> None:
    ring = Prediction(1.0, Calls(3, 0), Sent(10, 0))
    gather = Prediction(1.0, Calls(1, 0), Sent(10, 0))
    queries = Prediction(1.0, Calls(1, 0), Sent(9, 0))
    assert choose({"pass_kv": ring, "gather_kv": gather}) == "gather_kv"
    assert choose({"pass_kv": ring, "gather_kv": gather, "pass_q": queries}) == "pass_q"
    slower = replace_seconds(queries, 1.01)
    assert choose({"pass_kv": ring, "pass_q": slower}) == "pass_kv"
    assert choose({"pass_kv": ring, "pass_q": slower}, "pass_q") == "pass_q", "as good"
    assert choose({"pass_kv": ring, "pass_q": replace_seconds(queries, 1.06)}, "pass_q") == (
        "pass_kv"
    )


def replace_seconds(one: Prediction, seconds: float) -> Prediction:
    return one._replace(seconds=seconds)


@pytest.mark.parametrize("model", MODELS)
def test_long_prompts_pass_keys_and_long_contexts_decode_by_queries(model: CostModel) -> None:
    assert decide(even(800_000, 0), model, None, True).strategy == "pass_kv"
    assert decide(decode(*[250_000] * 4), model, None, True).strategy == "pass_q"


def test_a_short_context_decodes_by_keys_where_an_exchange_costs_more_than_they_do() -> None:
    model = CostModel(SHAPE, 7_000_000_000, CPU_THREAD, ONE_HOST)
    assert decide(decode(16, 8), model, None, True).strategy in ("gather_kv", "pass_kv")
    assert decide(decode(1600, 800), model, None, True).strategy == "pass_q"


def test_all_keys_at_once_need_room() -> None:
    model = MODELS[0]
    fits = 4 * GATHER_BYTES // (3 * SHAPE.key_bytes) // 8 * 8
    assert is_feasible("gather_kv", even(fits, 0), model)
    assert not is_feasible("gather_kv", even(fits + 80, 0), model)
    assert "gather_kv" not in predictions(even(fits + 80, 0), model)


def test_decode_chooses_anew_with_each_page_and_each_holder() -> None:
    model = MODELS[0]
    last = Choice("gather_kv", 1, 2)
    long = decode(10**6, 10**6)
    assert decide(long, model, last, begins_page=False) is last
    assert decide(long, model, last, begins_page=True) == Choice("pass_q", 1, 2)
    assert decide(decode(10**6, 10**6, 9), model, last, False) == Choice("pass_q", 1, 3)
    prefill = Choice("pass_kv", 800, 2)
    assert decide(long, model, prefill, begins_page=False) == Choice("pass_q", 1, 2)


def test_between_hosts_queries_travel_for_longer_chunks_than_inside_one() -> None:
    near, far = (CostModel(SHAPE, 7_000_000_000, CUDA, t) for t in (ONE_HOST, FOUR_HOSTS))
    turns = [
        next(
            new
            for new in range(8, 10**6, 8)
            if decide(even(new, 128_000), model, None, True).strategy != "pass_q"
        )
        for model in (near, far)
    ]
    assert turns[0] < turns[1]


def test_a_link_that_is_not_known_is_as_the_next_wider_one() -> None:
    host, network = LinkRates(1e-5, 1e11), LinkRates(1e-4, 1e10)
    rates = Rates(
        step_seconds=1, linear_flops=1, attention_flops=1, memory_bytes=1, links={"host": host}
    )
    assert rates.hop("device") == rates.hop("host") == host
    assert rates.hop("network") == ETHERNET
    both = replace(rates, links={"network": network}, all_to_all={"network": host})
    assert both.hop("device") == both.hop("host") == network
    assert both.exchange("network") == host
    assert both.exchange("device") == network


def test_links_inside_a_host_are_those_of_its_own_ranks() -> None:
    """Rank 0 is alone on its host; ranks 1 and 2 share a device of another."""
    links = {
        "device": LinkRates(1e-6, 1e9, 0),
        "host": LinkRates(1e-3, 1e9, 0),
        "network": ETHERNET,
    }
    rates = replace(CPU_THREAD, links=links)
    shards = [
        Shard(rank + 1, shard.queries, shard.cached, shard.keys)
        for rank, shard in enumerate(decode(100, 100))
    ]
    seconds = {
        shared: CostModel(SHAPE, 7_000_000_000, rates, Topology.of_hosts([1, 2], shared))
        .predict("pass_q", shards)
        .seconds
        for shared in (False, True)
    }
    assert seconds[False] - seconds[True] == pytest.approx(32 * 2 * (1e-3 - 1e-6))
