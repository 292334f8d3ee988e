"""Seconds are sums that can be done by hand, and the parts of the model agree with each other."""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plain_cost import PlainCost

from longspan.cost.kv_shape import KVShape
from longspan.cost.model import MEETING_SECONDS, MEETINGS, CostModel
from longspan.cost.rates import CPU_THREAD, CUDA, LinkRates, Rates
from longspan.models import ModelSpec
from longspan.plan import Run, Segment, Shard, Strategy
from longspan.topology import Topology

# On ROUND a token takes 0.1 s, a pair 0.64 s, a key read 0.32 s, a key sent 1.6 s, a query and its
# state 8 s; a call 1 s; all of them in both layers. A step 1 s, weights 2 s.
PLAIN = (
    PlainCost(KVShape(32, 32, 8, 128, itemsize=2), 7_000_000_000, CUDA),
    PlainCost(KVShape(8, 8, 2, 64, itemsize=4), 25_000_000, CPU_THREAD),
    PlainCost(
        KVShape(num_layers=2, num_heads=4, num_kv_heads=1, head_dim=2, itemsize=4),
        num_active_parameters=50,
        rates=Rates(
            step_seconds=1,
            linear_flops=1000,
            attention_flops=100,
            memory_bytes=100,
            links={"host": LinkRates(seconds=0.5, bytes=20, overlap=0)},
        ),
    ),
)
LLAMA_8B, SMALL_ON_CPU, ROUND = (CostModel(*plain) for plain in PLAIN)

FREE = Rates(
    step_seconds=0,
    linear_flops=1,
    attention_flops=1,
    memory_bytes=1e30,
    links={"host": LinkRates(seconds=0, bytes=1e30)},
)
"""Only what is computed takes time."""

models = st.sampled_from((LLAMA_8B, SMALL_ON_CPU, ROUND))
degrees = st.integers(1, 16)
numbers = st.integers(0, 10**6)


def segment(strategy: Strategy, *shards: Shard) -> Segment:
    return Segment("r", strategy, shards)


def local(cached: int, new: int = 1, rank: int = 0) -> Segment:
    runs = (Run(cached, new),)
    return segment("local", Shard(rank, runs, cached, runs))


def decode(keys: Sequence[int]) -> Segment:
    """One token on the first rank, which makes the last of that rank's keys."""
    new = (Run(sum(keys) - 1, 1),)
    others = (Shard(rank, (), keys[rank], ()) for rank in range(1, len(keys)))
    return segment("pass_q", Shard(0, new, keys[0] - 1, new), *others)


def zigzag(strategy: Strategy, size: int, new: int, cached: int) -> Segment:
    """Rank r has the blocks r and -1 - r of 2 * `size` blocks with `new` tokens each."""
    shards = []
    for rank in range(size):
        blocks = rank, 2 * size - 1 - rank
        runs = tuple(Run(size * cached + block * new, new) for block in blocks)
        shards.append(Shard(rank, runs, cached, runs))
    return segment(strategy, *shards)


def test_a_chunk_by_hand() -> None:
    assert ROUND.base_seconds == 3
    assert ROUND.prefill_seconds(3, 5, 1) == pytest.approx(0.3 + (3 * 5 + 6) * 0.64)
    computed = 0.2 + (4 * 4 + 10) / 2 * 0.64
    assert ROUND.prefill_seconds(4, 4, 2) == pytest.approx(computed + 1 + 4 * 1.6)
    computed = 0.05 + 100 / 2 * 0.64
    assert ROUND.prefill_seconds(1, 99, 2) == pytest.approx(computed + 2 + 0.5 * 8)
    assert ROUND.prefill_seconds(0, 99, 2) == 0


def test_a_decode_token_by_hand() -> None:
    assert ROUND.decode_seconds([10]) == pytest.approx(0.1 + 6.4)
    assert ROUND.decode_seconds([10, 4]) == pytest.approx(0.1 + 6.4 + 2 + 8)
    assert ROUND.decode_seconds([4, 10, 7]) == pytest.approx(0.1 + 6.4 + 2 + 2 * 8)


def test_ranks_decode_jointly_if_reading_less_is_worth_meeting() -> None:
    shape, two = PLAIN[2].shape, Topology.of_hosts([2])
    rates = replace(PLAIN[2].rates, memory_bytes=1e9)

    def joins(parameters: int, topology: Topology = two, *, can: bool = True) -> bool:
        return CostModel(shape, parameters, rates, topology, joins=can).joins

    just_enough = 2 * MEETINGS * MEETING_SECONDS * shape.num_layers * 1e9 / shape.itemsize
    assert joins(int(1.1 * just_enough))
    assert not joins(int(0.9 * just_enough))
    assert joins(int(0.9 * just_enough), Topology.of_hosts([4]))
    assert not joins(10**9, Topology.of_hosts([1]))
    assert not joins(10**9, can=False)


def test_a_joint_decode_token_waits_for_no_messages() -> None:
    shape, parameters, rates, *_ = PLAIN[2]
    joint = CostModel(shape, parameters, rates, Topology.of_hosts([2]), joins=True)
    assert joint.decode_seconds([10, 4]) == joint.decode_seconds([10]) == pytest.approx(0.1 + 6.4)


def test_a_step_by_hand() -> None:
    """The home sends queries of 32 bytes, the others states of 48, 20 bytes a second, twice.

    A rank without queries reads no weights.
    """
    home, holder = 3 + 0.1 + 6 * 0.64 + 2 + 3.2, 1 + 3 * 0.64 + 2 + 4.8
    shared = decode([6, 3])
    assert ROUND.step_seconds([shared]) == pytest.approx({0: home, 1: holder})
    busy = holder + 2 + 0.1 + 30 * 0.64
    assert ROUND.step_seconds([shared, local(29, rank=1)]) == pytest.approx({0: home, 1: busy})
    assert ROUND.step_seconds([]) == {}


def test_strategies_compute_on_different_ranks() -> None:
    """3 queries after 2 keys on rank 0; rank 1 has 10 keys that they see too."""
    runs = (Run(12, 3),)
    shards = Shard(0, runs, 2, runs), Shard(1, (), 10, ())
    asking, own, other = 3 + 0.3, (3 * 2 + 6) * 0.64, 3 * 10 * 0.64
    keys_here = {0: asking + own + other + 1, 1: 1 + 1 + 10 * 1.6}
    half = 5 * 1.6  # one way only, by memory that both ways share
    gathered = {0: asking + own + other + 1 + half, 1: 1 + 1 + half}
    queries_there = {0: asking + own + 2 + 3 * 3.2, 1: 1 + other + 2 + 3 * 4.8}
    assert ROUND.step_seconds([segment("pass_kv", *shards)]) == pytest.approx(keys_here)
    assert ROUND.step_seconds([segment("gather_kv", *shards)]) == pytest.approx(gathered)
    assert ROUND.step_seconds([segment("pass_q", *shards)]) == pytest.approx(queries_there)


def test_segments_that_travel_together_wait_together() -> None:
    one = ROUND.step_seconds([decode([6, 3])])[0] - 3
    assert ROUND.step_seconds([decode([6, 3])] * 5)[0] == pytest.approx(3 + 5 * one - 4 * 2)
    ring = zigzag("pass_kv", 2, 1, 4)
    alone = ROUND.step_seconds([ring])[0] - 3
    assert ROUND.step_seconds([ring, ring])[0] == pytest.approx(3 + 2 * alone - 1)
    wider = zigzag("pass_kv", 3, 1, 4)
    both = alone + ROUND.step_seconds([wider])[0]
    assert ROUND.step_seconds([ring, wider])[0] == pytest.approx(both), "each has a ring"


@st.composite
def segments(draw: Callable[[st.SearchStrategy], object]) -> list[Segment]:
    """Segments as the engine makes them: consecutive new tokens, cut anyhow over some ranks."""
    made = []
    for name in range(draw(st.integers(1, 4))):
        ranks = sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=5)))
        position = draw(st.integers(0, 1000))
        runs: dict[int, list[Run]] = {rank: [] for rank in ranks}
        for _ in range(draw(st.integers(1, 6))):
            length = draw(st.integers(1, 40))
            runs[draw(st.sampled_from(ranks))].append(Run(position, length))
            position += length
        strategies: list[Strategy] = ["pass_kv", "gather_kv", "pass_q", "tree"]
        strategy = draw(st.sampled_from(strategies)) if len(ranks) > 1 else "local"
        shards = tuple(
            Shard(rank, tuple(runs[rank]), draw(st.integers(0, 300)), tuple(runs[rank]))
            for rank in ranks
        )
        made.append(Segment(str(name), strategy, shards))
    return made


@given(st.sampled_from(PLAIN), segments())
def test_a_step_takes_what_the_plain_formulas_say(plain: PlainCost, made: list[Segment]) -> None:
    expected = plain.step_seconds(made)
    assert CostModel(*plain).step_seconds(made) == pytest.approx(expected, rel=1e-9, abs=0)


def test_keys_are_read_once_for_many_queries() -> None:
    """Reading takes longer here, until there are more than 20 queries."""
    rates = replace(ROUND.rates, attention_flops=4000)
    model = CostModel(ROUND.shape, 50, rates)
    assert model.decode_seconds([100]) == pytest.approx(0.1 + 32)
    assert model.step_seconds([local(99)])[0] == pytest.approx(3 + 0.1 + 32)
    assert model.prefill_seconds(10, 90, 1) == pytest.approx(1 + 32)
    assert model.step_seconds([local(90, 10)])[0] == pytest.approx(3 + 1 + 32)
    assert model.prefill_seconds(4, 96, 4) == pytest.approx(0.1 + 32 + 2 + 3 * 8)
    assert model.prefill_seconds(40, 60, 1) == pytest.approx(4 + (40 * 60 + 820) * 0.016)


@given(models, st.integers(1, 5000), numbers)
def test_a_local_chunk_is_the_same_either_way(model: CostModel, new: int, cached: int) -> None:
    expected = model.base_seconds + model.prefill_seconds(new, cached, 1)
    assert model.step_seconds([local(cached, new)])[0] == pytest.approx(expected)
    one = model.base_seconds + model.decode_seconds([cached + 1])
    assert model.step_seconds([local(cached)])[0] == pytest.approx(one)


@given(models, st.integers(2, 8), st.integers(1, 500), st.integers(0, 50_000))
def test_an_even_chunk_is_the_same_either_way(
    model: CostModel, size: int, new: int, cached: int
) -> None:
    segments = [zigzag(strategy, size, new, cached) for strategy in model.strategies]
    expected = model.base_seconds + model.prefill_seconds(2 * size * new, size * cached, size)
    steps = [model.step_seconds([segment]) for segment in segments]
    for rank in range(size):
        fastest = min(step[rank] for step in steps)
        assert fastest == pytest.approx(expected, rel=0.02 + 0.3 / new)


@given(models, st.integers(2, 8), st.integers(1, 9), st.data())
def test_every_pair_is_counted_once_whoever_computes_it(
    model: CostModel, size: int, cached: int, data: st.DataObject
) -> None:
    owners = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    shards = []
    for rank in range(size):
        runs = tuple(Run(size * cached + i, 1) for i, own in enumerate(owners) if own == rank)
        shards.append(Shard(rank, runs, cached, runs))
    free = CostModel(model.shape, 0, FREE)
    one = free.prefill_seconds(1, 0, 1)
    new = len(owners)
    pairs = new * size * cached + new * (new + 1) // 2
    strategies: tuple[Strategy, ...] = ("pass_kv", "gather_kv", "pass_q", "tree")
    for strategy in strategies:
        seconds = free.step_seconds([segment(strategy, *shards)])
        assert sum(seconds.values()) == pytest.approx(pairs * one)


@given(models, st.floats(0, 1e4), numbers, degrees)
def test_tokens_within_are_as_many_as_fit(
    model: CostModel, seconds: float, cached: int, degree: int
) -> None:
    tokens = model.tokens_within(seconds, cached, degree)
    assert tokens >= 0
    assert model.prefill_seconds(tokens, cached, degree) <= seconds
    assert model.prefill_seconds(tokens + 1, cached, degree) > seconds


@given(models, st.integers(1, 10**6), numbers, degrees)
def test_tokens_within_are_the_inverse(
    model: CostModel, new: int, cached: int, degree: int
) -> None:
    seconds = model.prefill_seconds(new, cached, degree)
    assert model.tokens_within(seconds, cached, degree) == new


@given(models, numbers, numbers, numbers, numbers, degrees)
def test_more_takes_longer(
    model: CostModel, new: int, more: int, cached: int, farther: int, degree: int
) -> None:
    assume(new and more and farther)
    seconds = model.prefill_seconds(new, cached, degree)
    assert model.prefill_seconds(new + more, cached, degree) > seconds
    assert model.prefill_seconds(new, cached + farther, degree) > seconds
    assert model.decode_seconds([cached + farther]) > model.decode_seconds([cached])
    holders = [cached] * degree
    assert model.decode_seconds([*holders, cached]) > model.decode_seconds(holders)
    assert model.move_seconds(new + more) > model.move_seconds(new)


@given(models, st.integers(1, 10**6), numbers)
def test_one_rank_exchanges_nothing(model: CostModel, new: int, cached: int) -> None:
    slow = replace(model.rates, links={"host": LinkRates(seconds=1e9, bytes=1e-9)})
    cut_off = CostModel(model.shape, 1000, slow)
    linked = CostModel(model.shape, 1000, model.rates)
    assert cut_off.prefill_seconds(new, cached, 1) == linked.prefill_seconds(new, cached, 1)
    assert cut_off.decode_seconds([new]) == linked.decode_seconds([new])


def test_a_long_context_decodes_faster_on_two_ranks_and_a_short_one_on_one() -> None:
    """For an 8B model on NVLink the turn is where two exchanges of 20 us pay in every layer."""
    lengths = range(2, 10**6, 2)
    turn = bisect(
        lengths,
        x=0.0,
        key=lambda n: LLAMA_8B.decode_seconds([n]) - LLAMA_8B.decode_seconds([n // 2] * 2),
    )
    assert 40_000 < lengths[turn] < 70_000


def test_more_ranks_prefill_a_long_prompt_faster_and_a_short_one_slower() -> None:
    for model in (LLAMA_8B, SMALL_ON_CPU):
        long, short = (
            [model.prefill_seconds(new, 0, degree) for degree in (1, 2, 4, 8)]
            for new in (100_000, 1)
        )
        assert long == sorted(long, reverse=True)
        assert long[0] / long[-1] > 6
        assert short[0] == min(short)


def test_moved_bytes() -> None:
    assert ROUND.move_seconds(3) == 0.5 + 3 * 2 * 16 / 20
    assert ROUND.move_seconds(0) == 0
    link = CUDA.hop("host")
    seconds = LLAMA_8B.move_seconds(1000) - link.seconds
    assert seconds * link.bytes == pytest.approx(1000 * 131_072)


def test_threads_compute_and_read_faster_but_send_as_before() -> None:
    four = CPU_THREAD.of_threads(4)
    assert four.linear_flops == 4 * CPU_THREAD.linear_flops
    assert four.attention_flops == 4 * CPU_THREAD.attention_flops
    assert four.memory_bytes == 4 * CPU_THREAD.memory_bytes
    assert four.links == CPU_THREAD.links


def test_a_model_of_a_spec() -> None:
    spec = ModelSpec(
        "m", "A", 2, 4, 1, 2, 99, 99, (), "float32", "float32", num_active_parameters=50
    )
    model = CostModel.of(spec, ROUND.rates)
    assert model.shape == ROUND.shape
    assert model.base_seconds == 3
