"""Forecasts say what the simulated engine does, and name what takes the time."""

from dataclasses import replace
from functools import partial

import pytest

from longspan.config import EngineConfig
from longspan.cost.devices import device_named
from longspan.cost.explain import explain
from longspan.cost.forecast import Forecast, Forecaster, seconds_of
from longspan.cost.limits import LIMITS, without
from longspan.cost.model import ONE_HOST, CostModel
from longspan.cost.rates import CUDA, LinkRates, Rates
from longspan.cost.simulate import simulate
from longspan.cost.trace import Arrival, Trace
from longspan.models import ModelSpec
from longspan.topology import Topology

SPEC = ModelSpec(
    name="8b",
    architecture="LlamaForCausalLM",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128_256,
    max_model_len=1 << 24,
    eos_token_ids=(),
    dtype="bfloat16",
    kv_cache_dtype="bfloat16",
    num_active_parameters=6_979_588_096,
)
PAGES = 50_000
H200 = device_named("h200").rates("bfloat16")
FAR = device_named("l40s").rates("bfloat16")


def forecaster(
    ranks: int, rates: Rates = H200, topology: Topology = ONE_HOST, **options: object
) -> Forecaster:
    config = EngineConfig(
        model="8b", context_parallel_size=ranks, enable_prefix_caching=False, **options
    )
    return Forecaster(partial(CostModel.of, SPEC, topology=topology), rates, config, PAGES)


def simulated(
    tokens: int, ranks: int, batch: int, rates: Rates, topology: Topology = ONE_HOST
) -> list[tuple[float, float, int]]:
    """TTFT, TPOT and degree of each of a batch that comes at once, served step by step."""
    trace = Trace(Arrival(time=0.0, prompt=tokens, output_tokens=9) for _ in range(batch))
    config = forecaster(ranks).config
    result = simulate(trace, config, SPEC, [PAGES] * ranks, rates, topology)
    found = []
    for one in result.requests:
        assert one.ttft is not None
        assert one.tpot is not None
        found.append((one.ttft, one.tpot, one.degree))
    return found


@pytest.mark.parametrize("rates", [H200, FAR], ids=["fast links", "slow links"])
@pytest.mark.parametrize(
    ("tokens", "ranks", "batch"),
    [(700, 4, 1), (5000, 1, 1), (131_072, 3, 1), (600_000, 16, 1), (131_072, 8, 4)],
)
def test_a_forecast_is_what_the_engine_would_do(
    rates: Rates, tokens: int, ranks: int, batch: int
) -> None:
    served = simulated(tokens, ranks, batch, rates)
    found = forecaster(ranks, rates).forecast(tokens, batch)
    assert found.ttft == pytest.approx(max(ttft for ttft, _, _ in served), rel=0.03)
    assert found.tpot == pytest.approx(max(tpot for _, tpot, _ in served), rel=0.03)
    assert found.degree == max(degree for _, _, degree in served)


@pytest.mark.parametrize(("tokens", "ranks", "batch"), [(131_072, 8, 1), (900_000, 11, 1)])
def test_a_forecast_over_hosts(tokens: int, ranks: int, batch: int) -> None:
    hosts = Topology.of_hosts([4, 4, 3])
    served = simulated(tokens, ranks, batch, H200, hosts)
    found = forecaster(ranks, H200, hosts).forecast(tokens, batch)
    assert found.ttft == pytest.approx(max(ttft for ttft, _, _ in served), rel=0.03)
    assert found.tpot == pytest.approx(max(tpot for _, tpot, _ in served), rel=0.03)
    assert found.degree == ranks


@pytest.mark.parametrize(("tokens", "ranks", "batch"), [(60_000, 2, 12), (90_000, 6, 4)])
def test_prompts_that_share_ranks(tokens: int, ranks: int, batch: int) -> None:
    """The last first token is that of a rank with several prompts, of unlike degrees."""
    served = simulated(tokens, ranks, batch, H200)
    found = forecaster(ranks).forecast(tokens, batch)
    assert found.ttft == pytest.approx(max(ttft for ttft, _, _ in served), rel=0.05)


def test_a_prompt_of_one_chunk_by_hand() -> None:
    """h200 with half of 989e12 flops/s and 0.8 of 4.8e12 bytes/s; 1,000 tokens on one rank."""
    found = forecaster(1).forecast(1000, 1)
    launches, weights = 5e-3, 2 * 6_979_588_096 / 3.84e12
    linear = 2 * 6_979_588_096 * 1000 / 494.5e12
    attention = 32 * 4 * 32 * 128 * (1000 * 1001 / 2) / 494.5e12
    assert found.ttft == pytest.approx(launches + weights + linear + attention, rel=1e-6)
    keys = 1000 * 131_072 / 3.84e12
    token = 2 * 6_979_588_096 / 494.5e12
    assert found.tpot == pytest.approx(launches + weights + token + keys, rel=1e-6)


def test_chunks_are_all_of_the_prompt() -> None:
    one = forecaster(4)
    for tokens in (1, 15, 16, 17, 100_000, 3_000_001):
        for degree in (1, 3, 4):
            chunks = list(one.chunks(tokens, degree))
            assert sum(chunk.times * chunk.new for chunk in chunks) == tokens
            assert len(chunks) < 400
    assert seconds_of(one.chunks(3_000_001, 4), one.cost) > seconds_of(
        one.chunks(3_000_000, 4), one.cost
    )


@pytest.mark.parametrize(
    ("changes", "of", "limit"),
    [
        ({"linear_flops": 1e9}, "ttft", "compute"),
        ({"attention_flops": 1e9}, "ttft", "compute"),
        ({"memory_bytes": 1e9}, "tpot", "memory"),
        ({"step_seconds": 100.0}, "tpot", "launches"),
    ],
)
def test_what_is_slow_is_named(changes: dict[str, float], of: str, limit: str) -> None:
    found: Forecast = forecaster(2, replace(CUDA, **changes)).forecast(40_000, 1)
    assert getattr(found, f"{of}_limit") == limit


def test_slow_links_are_named() -> None:
    """Two ranks that must talk, as the keys need the pages of both."""
    found = forecaster(2, replace(CUDA, links={"host": LinkRates(1.0, 1e9)})).forecast(
        2 * PAGES * 16, 1
    )
    assert found.degree == 2
    assert found.ttft_limit == found.tpot_limit == "link"


def test_without_everything_nothing_takes_time() -> None:
    parts = [part for parts in LIMITS.values() for part in parts]
    free = CostModel.of(SPEC, without(H200, *parts))
    one = forecaster(4)
    [segment] = one.decode_segments(100_000, [[0, 1, 2, 3]])
    assert max(free.step_seconds([segment]).values()) == 0.0


# The numbers behind a choice


def test_parts_of_a_choice_are_its_whole() -> None:
    one = forecaster(8)
    choices = explain(one, 300_000, 8)
    assert {choice.degree for choice in choices} == {1, 2, 4, 8}
    for choice in choices:
        parts = choice.launches + choice.weights + choice.linear + choice.attention
        assert parts + choice.exchange - choice.hidden == pytest.approx(choice.total)
        # No more is hidden than there is to hide, and to hide it behind.
        assert choice.hidden <= min(choice.exchange, choice.attention) * (1 + 1e-9)
    for phase in ("prefill", "decode"):
        on_all = [c for c in choices if c.phase == phase and c.degree == 8]
        # More keys than gather-KV has room for, and one host.
        assert {choice.strategy for choice in on_all} == {"pass_kv", "pass_q"}
        [taken] = [choice for choice in choices if choice.phase == phase and choice.chosen]
        assert taken.degree == 8
        assert taken.total == min(choice.total for choice in on_all)


def test_parts_of_a_choice_across_hosts() -> None:
    """With tree, which there is only between hosts."""
    choices = explain(forecaster(8, FAR, Topology.of_hosts([4, 4])), 300_000, 8)
    assert {choice.strategy for choice in choices if choice.degree == 4} == {"pass_kv", "pass_q"}
    for phase in ("prefill", "decode"):
        on_all = {c.strategy: c for c in choices if c.phase == phase and c.degree == 8}
        assert on_all.keys() == {"pass_kv", "pass_q", "tree"}
        for choice in on_all.values():
            parts = choice.launches + choice.weights + choice.linear + choice.attention
            assert parts + choice.exchange - choice.hidden == pytest.approx(choice.total)
            assert choice.hidden <= choice.exchange * (1 + 1e-9)
        assert sum(choice.chosen for choice in on_all.values()) == 1
        tree, pass_q = on_all["tree"], on_all["pass_q"]
        assert 0 < tree.far_bytes < pass_q.far_bytes
    # A query goes to four ranks there, or to one.
    assert pass_q.far_bytes == 4 * tree.far_bytes == 4 * 32 * 32 * 128 * 2


def test_a_decode_step_on_two_ranks_by_hand() -> None:
    [choice] = [
        choice
        for choice in explain(forecaster(2), 100_001, 2)
        if choice.phase == "decode" and choice.degree == 2 and choice.strategy == "pass_q"
    ]
    # 32 layers, 32 heads of 128: a query of 2 bytes a number goes, and comes back in float32 with
    # its lse; the home sends the query, and its 50,001 keys are read.
    assert (choice.near_bytes, choice.far_bytes) == (32 * 32 * 128 * 2, 0)
    assert choice.attention == pytest.approx(50_001 * 131_072 / 3.84e12)
    assert choice.cached_tokens == 100_000
    assert choice.new_tokens == 1


def test_degrees_that_lack_pages_are_no_choice() -> None:
    choices = explain(forecaster(8), 3 * PAGES * 16, 8)
    assert {choice.degree for choice in choices} == {3, 6, 8}
