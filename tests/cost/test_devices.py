"""Devices to plan with: by name, or as a fleet measured its own."""

from dataclasses import replace
from pathlib import Path

import pytest
from published import PARAMETERS, SHAPE, TIMES

from longspan.cost.calibration import Calibration
from longspan.cost.devices import DEVICES, device_named, planned_device
from longspan.cost.model import CostModel
from longspan.cost.rates import CPU_THREAD, LinkRates
from longspan.errors import ConfigError
from longspan.topology import Topology


def saved(folder: Path, device: str = "AVX512 CPU") -> str:
    """A calibration's file, as a fleet of three ranks on two hosts writes it."""
    links = {"device": LinkRates(1e-4, 2e9, 0.1), "network": LinkRates(3e-4, 1e8, 0.9)}
    calibration = Calibration(
        date="2026-01-02T03:04:05+00:00",
        device=device,
        torch="2.13.0",
        model="tiny",
        ranks_per_host=(2, 1),
        rates=replace(CPU_THREAD, links=links),
        samples=(),
    )
    calibration.save(folder / "rates.json")
    return str(folder / "rates.json")


def test_devices_are_found_by_name() -> None:
    assert device_named("H200") is DEVICES["h200"]
    assert planned_device("H200", None, None) is DEVICES["h200"]
    with pytest.raises(ConfigError, match=r"^device='h20' is unknown; did you mean 'h200'\?$"):
        device_named("h20")
    with pytest.raises(ConfigError, match="known devices: a100-40, a100-80, h100, h200, b200"):
        device_named("toaster")


def test_rates_are_a_part_of_what_vendors_say() -> None:
    """NVIDIA's datasheet of an H200: 989 and 67 Tflop/s, 4.8 TB/s, NVLink 900 GB/s both ways."""
    half, single = device_named("h200").rates("float16"), device_named("h200").rates("float32")
    assert half.linear_flops == half.attention_flops == 0.5 * 989e12
    assert single.linear_flops == single.attention_flops == 0.5 * 67e12
    assert half.memory_bytes == single.memory_bytes == 0.8 * 4.8e12
    assert half.hop("host").bytes == 0.65 * 450e9
    assert half.hop("network").bytes == half.exchange("network").bytes == 0.52 * 50e9
    assert device_named("h200").rates("bfloat16") == half


@pytest.mark.parametrize(
    ("ranks", "tokens", "error"),
    [
        (1, 128_000, 0.032),
        (2, 128_000, 0.031),
        (4, 128_000, -0.007),
        (8, 128_000, -0.067),
        (16, 128_000, -0.276),
        (16, 1_000_000, 0.014),
    ],
)
def test_what_is_assumed_against_what_was_published(ranks: int, tokens: int, error: float) -> None:
    """Llama-3 405B on nodes of 8 H100, in one step; none of these times went into the figures."""
    hosts = Topology.of_hosts([1] * ranks)
    cost = CostModel(SHAPE, PARAMETERS, device_named("h100").rates("bfloat16"), hosts)
    seconds = cost.base_seconds + cost.prefill_seconds(tokens, 0, ranks)
    assert seconds / TIMES[ranks, tokens] - 1 == pytest.approx(error, abs=0.002)


def test_memory_can_be_told() -> None:
    device = planned_device("h200", None, 80)
    assert device.memory_bytes == 80e9
    assert replace(device, memory_bytes=141e9) == DEVICES["h200"]


def test_a_calibration_is_a_device(tmp_path: Path) -> None:
    file = saved(tmp_path)
    device = planned_device(None, file, 16.5)
    assert (device.name, device.memory_bytes, device.gpu) == ("AVX512 CPU", 16.5e9, False)
    assert device.rates("bfloat16") == device.rates("float32") == Calibration.load(file).rates
    assert device.calibration == file
    assert device.source.startswith(
        f"Times are predicted from {file}: AVX512 CPU, 2 + 1 ranks, measured on 2026-01-02 with "
        "tiny."
    )


def test_a_calibration_takes_the_memory_of_a_kind_of_device(tmp_path: Path) -> None:
    file = saved(tmp_path, "NVIDIA H200")
    device = planned_device("h200", file, None)
    assert (device.name, device.memory_bytes, device.gpu) == ("h200", 141e9, True)
    assert device.rates("bfloat16") == Calibration.load(file).rates
    assert planned_device("h200", file, 100).memory_bytes == 100e9


@pytest.mark.parametrize(
    ("name", "memory", "complaint"),
    [
        (None, None, "calibration='FILE' does not tell how much memory a device has; give memory"),
        ("h200", 5, "device='h200' contradicts calibration='FILE', which was measured on 'AVX512"),
        ("h20", 5, "device='h20' is unknown"),
        (None, 0, "memory=0 must be above 0 GB"),
        (None, float("nan"), "memory=nan must be above 0 GB"),
        (None, float("inf"), "memory=inf must be above 0 GB"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, name: str | None, memory: float | None, complaint: str
) -> None:
    file = saved(tmp_path)
    with pytest.raises(ConfigError) as caught:
        planned_device(name, file, memory)
    assert str(caught.value).startswith(complaint.replace("FILE", file))


def test_something_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"^device or calibration must be given; devices: a100"):
        planned_device(None, None, 80)
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        planned_device(None, "nowhere.json", 80)
