"""Rates are found again in what a fleet with such rates would measure; files keep them."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from longspan.config import EngineConfig
from longspan.cost.calibration import Calibration
from longspan.cost.kv_shape import KVShape
from longspan.cost.model import CostModel
from longspan.cost.rates import CPU_THREAD, CUDA, LinkRates, Rates
from longspan.cost.samples import (
    AttentionSample,
    MessageSample,
    OverlapSample,
    Samples,
    StepSample,
    fit_rates,
)
from longspan.cost.simulate import simulate
from longspan.cost.trace import Arrival, Trace
from longspan.errors import ConfigError
from longspan.models import ModelSpec

SHAPE = KVShape(num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, itemsize=4)
PARAMETERS = 5_000_000
CPU = replace(
    CPU_THREAD,
    links={"host": LinkRates(110e-6, 2.4e9, 0.1), "network": LinkRates(300e-6, 1.1e8, 0.9)},
    all_to_all={"host": LinkRates(250e-6, 2.0e9, 0.1)},
)
GPU = replace(CUDA, linear_flops=5e12, attend_seconds=30e-6)


def samples_of(rates: Rates, noise: float, random: Random) -> Samples:
    """What a rank with these rates would measure."""
    model = CostModel(SHAPE, PARAMETERS, rates)
    flops = 4 * SHAPE.num_heads * SHAPE.head_dim / rates.attention_flops

    def noisy(seconds: float) -> float:
        return seconds * random.uniform(1 - noise, 1 + noise)

    def attention(queries: int, keys: int) -> AttentionSample:
        longer = max(flops * queries * keys, SHAPE.key_bytes * keys / rates.memory_bytes)
        return AttentionSample(queries, keys, noisy(rates.attend_seconds + longer))

    steps = [
        StepSample(tokens, noisy(model.base_seconds + model.prefill_seconds(tokens, 0, 1)))
        for tokens in (1, 32, 256, 2048)
    ]
    shapes = [(1, 16), (1, 1024), (1, 16_384), (1, 10**6), (128, 1024), (512, 4096)]
    sizes = (1000, 64_000, 10**6, 8 * 10**6)
    messages = [
        MessageSample(kind, name, size, noisy(link.seconds + size / link.bytes))
        for kind, links in (("hop", rates.links), ("all_to_all", rates.all_to_all))
        for name, link in links.items()
        for size in sizes
    ]
    overlaps = [
        OverlapSample(name, 0.5, 0.4, noisy(0.9 - 0.4 * link.overlap))
        for name, link in rates.links.items()
    ]
    return Samples(
        tuple(steps), tuple(attention(*one) for one in shapes), tuple(messages), tuple(overlaps)
    )


def check(found: Rates, rates: Rates, tolerance: float) -> None:
    for name in ("step_seconds", "linear_flops", "attention_flops", "memory_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=tolerance), name
    assert found.attend_seconds == pytest.approx(rates.attend_seconds, rel=tolerance)
    for found_links, links in (
        (found.links, rates.links),
        (found.all_to_all, rates.all_to_all),
    ):
        assert found_links.keys() == links.keys()
        for name, link in links.items():
            assert found_links[name].seconds == pytest.approx(link.seconds, rel=tolerance)
            assert found_links[name].bytes == pytest.approx(link.bytes, rel=tolerance)
            assert found_links[name].overlap == pytest.approx(link.overlap, abs=2 * tolerance)


@pytest.mark.parametrize("rates", [CPU, GPU], ids=["CPU", "GPU"])
def test_rates_are_found_in_exact_figures(rates: Rates) -> None:
    check(fit_rates([samples_of(rates, 0, Random(0))], SHAPE, PARAMETERS), rates, 1e-3)


@pytest.mark.parametrize("rates", [CPU, GPU], ids=["CPU", "GPU"])
def test_rates_are_found_in_noisy_figures_of_several_ranks(rates: Rates) -> None:
    random = Random(3)
    ranks = [samples_of(rates, 0.05, random) for _ in range(8)]
    check(fit_rates(ranks, SHAPE, PARAMETERS), rates, 0.1)


def test_a_part_that_takes_no_time_is_no_error() -> None:
    """A tiny model's linear layers are not to be told from its fixed cost."""
    flat = Samples(
        steps=(StepSample(1, 0.02), StepSample(256, 0.02)),
        attention=(AttentionSample(1, 16, 1e-4), AttentionSample(128, 64, 1e-4)),
    )
    found = fit_rates([flat], SHAPE, 1000)
    assert found.linear_flops > 1e15
    assert found.attention_flops > 1e15
    assert 0 < found.step_seconds < 0.02
    assert found.links == {}


@pytest.mark.parametrize(
    ("both", "overlap"), [(0.5, 1.0), (0.9, 0.0), (0.7, 0.5), (1.2, 0.0), (0.3, 1.0)]
)
def test_overlap_is_what_was_saved_of_the_shorter_one(both: float, overlap: float) -> None:
    assert OverlapSample("host", 0.5, 0.4, both).overlap == pytest.approx(overlap)


def calibration() -> Calibration:
    return Calibration(
        date="2026-01-01T00:00:00+00:00",
        device="a CPU",
        torch="2.13.0",
        model="folder",
        ranks_per_host=(2, 1),
        rates=CPU,
        samples=(samples_of(CPU, 0.1, Random(5)),),
    )


def test_a_file_keeps_all(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration().save(path)
    assert Calibration.load(path) == calibration()
    assert Calibration.load(path).rates.hop("device") == CPU.links["host"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "can't be read: No such file or directory; make it with `longspan calibrate`"),
        (b"", "is not a file of `longspan calibrate`: Input data was truncated"),
        (b"\xff\xfe", "is not a file of `longspan calibrate`"),
        (b"[1, 2]", "is not a file of `longspan calibrate`: Expected `object`, got `array`"),
        (b'{"name": "x"}', "is not a file of `longspan calibrate`: Object missing required"),
        (b'{"version": 1}', "is not a file of `longspan calibrate`: Object missing required"),
        (b'{"version": 99, "rates": 3}', "is of version 99, not 1; make it anew"),
    ],
)
def test_a_foreign_file_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Calibration.load(path)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(f"calibration={str(path)!r}")
    assert "\n" not in str(caught.value)


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written: No such file or directory"):
        calibration().save(tmp_path / "missing" / "calibration.json")


def test_a_simulation_takes_the_config_s_calibration(tmp_path: Path) -> None:
    path = str(tmp_path / "calibration.json")
    calibration().save(path)
    spec = ModelSpec("m", "A", 16, 32, 8, 64, 999, 9999, (), "float32", "float32", PARAMETERS)
    trace = Trace([Arrival(time=0.0, prompt=500, output_tokens=3)])
    config = EngineConfig(model="m", calibration=path)
    measured = simulate(trace, config, spec, [100])
    assert measured == simulate(trace, replace(config, calibration=None), spec, [100], CPU)
    assert measured.seconds > simulate(trace, EngineConfig(model="m"), spec, [100]).seconds
