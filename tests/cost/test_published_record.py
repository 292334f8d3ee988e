"""The cost model against what arXiv 2411.01783 measured: choices, and times to the first token.

Figures that calibrate: table 5 (one layer's hop, attention and all-to-all), and table 6's four
times for 8K and 32K tokens on one and two ranks. Figures that test: all of table 4's winners, and
the times for 128K tokens on 1, 2, 4, 8 and 16 ranks and for 1M on 16. None is in both.
"""

from dataclasses import replace
from functools import cache

import pytest
from published import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    PARAMETERS,
    TABLE_4,
    TABLE_6,
    TIMES,
    Row,
    model,
    rates_of_table_5,
    zigzag,
)

from longspan.config import EngineConfig
from longspan.cost.choice import choose, predictions
from longspan.cost.fit import fit
from longspan.cost.rates import Rates
from longspan.cost.simulate import simulate
from longspan.cost.trace import Arrival, Trace
from longspan.models import ModelSpec
from longspan.plan import Segment, Strategy
from longspan.topology import Topology

MEASURED: tuple[Strategy, ...] = ("pass_kv", "pass_q")


def chosen(row: Row) -> Strategy:
    shards = zigzag(4, row.new, row.cached)
    return choose(predictions(shards, model(rates_of_table_5(), 4), MEASURED))


def loss(row: Row) -> float:
    """By how much the chosen strategy was slower than the faster one."""
    return getattr(row, chosen(row)) / min(row.pass_kv, row.pass_q) - 1


def test_the_constants_are_those_of_one_layer() -> None:
    rates = rates_of_table_5()
    ring, all_to_all = rates.hop("network"), rates.exchange("network")
    assert rates.attention_flops == pytest.approx(498e12, rel=0.01)
    assert (ring.seconds, ring.bytes) == pytest.approx((48e-6, 27.7e9), rel=0.01)
    assert (all_to_all.seconds, all_to_all.bytes) == pytest.approx((224e-6, 49.6e9), rel=0.01)


def test_the_measured_winner_is_chosen_in_12_of_14_rows_and_little_is_lost_in_the_others() -> None:
    losses = [loss(row) for row in TABLE_4]
    assert sum(one == 0 for one in losses) >= 12
    assert max(losses) <= 0.02


def test_the_choice_turns_once_from_queries_to_keys() -> None:
    choices = [chosen(row) for row in TABLE_4]
    assert choices == sorted(choices, reverse=True)
    assert (choices[0], choices[-1]) == ("pass_q", "pass_kv")


@pytest.mark.parametrize("row", TABLE_4[4:10], ids=lambda row: row.new)
def test_the_strategies_differ_by_what_was_measured(row: Row) -> None:
    """From 12,800 new tokens, where pass-KV is hidden, to 76,800; beyond, measurements scatter."""
    predicted = predictions(zigzag(4, row.new, row.cached), model(rates_of_table_5(), 4), MEASURED)
    difference = 1e3 * (predicted["pass_q"].seconds - predicted["pass_kv"].seconds)
    assert difference == pytest.approx(row.pass_q - row.pass_kv, rel=0.15)


@cache
def rates_of_short_prompts() -> Rates:
    """The rest of the constants, from table 6's prompts of 8K and 32K tokens."""
    rates = rates_of_table_5()
    rows, rest, seconds = [], [], []
    for (ranks, tokens), milliseconds in TABLE_6.items():
        segment = Segment("", "pass_kv" if ranks > 1 else "local", tuple(zigzag(ranks, tokens, 0)))
        known = max(model(rates, ranks).step_seconds([segment]).values())
        rows.append([1, 2 * PARAMETERS * tokens / ranks, LAYERS * ranks])
        rest.append(milliseconds / 1e3 - known)
        seconds.append(milliseconds / 1e3)
    step, flop, attend = fit(rows, rest, scales=seconds)
    return replace(rates, step_seconds=step, linear_flops=1 / flop, attend_seconds=attend)


def simulated_time(ranks: int, tokens: int) -> float:
    """The time to the first token, of the engine itself in virtual time, in one step."""
    spec = ModelSpec(
        name="Llama-3 405B",
        architecture="LlamaForCausalLM",
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        vocab_size=128_256,
        max_model_len=2_000_000,
        eos_token_ids=(),
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        num_active_parameters=PARAMETERS,
    )
    config = EngineConfig(
        model="simulated",
        context_parallel_size=ranks,
        max_num_batched_tokens=tokens,
        max_step_time=None,
        min_tokens_per_rank=tokens // ranks,
    )
    trace = Trace([Arrival(time=0.0, prompt=tokens, output_tokens=1)])
    pages = [tokens // config.page_size + 2] * ranks
    topology = Topology.of_hosts([1] * ranks)
    result = simulate(trace, config, spec, pages, rates_of_short_prompts(), topology)
    time, degree = result.requests[0].ttft, result.requests[0].degree
    assert time is not None
    assert degree == ranks
    return time


def test_one_set_of_constants_is_physical() -> None:
    rates = rates_of_short_prompts()
    assert 400e12 < rates.linear_flops < 800e12, "no more than the peak"
    assert rates.step_seconds < 0.1
    assert 1e-4 < rates.attend_seconds < 1e-3


@pytest.mark.parametrize(("ranks", "tokens"), TIMES)
def test_times_to_the_first_token_are_near_the_published_ones(ranks: int, tokens: int) -> None:
    assert simulated_time(ranks, tokens) == pytest.approx(TIMES[ranks, tokens], rel=0.1)
