"""`longspan plan` as a person uses it: a config.json goes in; a table, JSON and a plot come out."""

import json
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from longspan.cli import app
from longspan.cost.calibration import Calibration
from longspan.cost.capacity_plan import CapacityPlan
from longspan.cost.devices import DEVICES
from longspan.cost.rates import CPU_THREAD, LinkRates
from longspan.topology import Link

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 1_048_576,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "llama")


def write(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | fields))
    return folder


def plan(*arguments: object, columns: int = 80) -> Result:
    environment = {"COLUMNS": str(columns), "TERM": "dumb"}
    return CliRunner(env=environment).invoke(app, ["plan", *map(str, arguments)])


def answer(*arguments: object) -> CapacityPlan:
    done = plan(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return msgspec.json.decode(done.stdout, type=CapacityPlan)


def refusal(*arguments: object) -> str:
    done = plan(*arguments)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return line


def test_the_table(model: Path) -> None:
    done = plan(model, "--device", "h200", "--nodes", 2, "--batch", 4, "--ttft", 1000)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(done.stdout.split())
    assert "8.03 billion parameters in bfloat16; 2 x 8 h200, 4 requests at once" in text
    assert "16.1 GB of weights, 110.8 GB of KV, of 141 GB" in text
    assert "131,072 bytes a token: 845,632 tokens a rank, 13,530,112 in all" in text
    assert "1,048,576 tokens in each of 4 requests" in text
    assert "Fewest h200 for 4 x 1M (549.8 GB of KV): 5 by memory, 5 for TTFT <= 1000 s" in text
    assert "own limit of 1,048,576 tokens is less than the 3,382,528 that fit" in text
    assert "No h200 was measured, and Longspan's own attention on GPUs" in text
    rows = [line.split() for line in lines if re.match(r" +\d+[KM] ", line)]
    assert [row[0] for row in rows] == [
        *("1K", "2K", "4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M")
    ]
    assert "fixed" not in text, "nothing is explained"


def test_what_does_not_fit_is_shown(model: Path) -> None:
    done = plan(model, "--device", "l40s", "--count", 2, "--batch", 3, "--explain")
    assert done.exit_code == 0, done.output
    # 43.2 GB less 16.06 GB are 12,941 pages; three of 65,536 need 15.2 devices.
    assert re.search(r" 1M +16 +too long", done.stdout)
    assert "Nothing to explain: 1M does not fit." in done.stdout


def test_choices_are_explained(model: Path) -> None:
    done = plan(model, "--device", "h200", "--count", 4, "--context", "128K", "--explain")
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "Its last full prefill step" in done.stdout
    assert "Its last decode step" in done.stdout
    assert re.search(
        r"TTFT of one request of 128K by its ranks, .*: 1: .*, 2: .*, 4\*:", done.stdout
    )
    taken = [line.split() for line in done.stdout.splitlines() if "*" in line.split(" is ")[0]]
    marked = [words for words in taken if words[0].isdigit()]
    assert len(marked) == 2, "one for prefill and one for decode"


def test_json_is_one_document_and_nothing_else(model: Path) -> None:
    found = answer(model, "--device", "H100", "--context", "100k", "--tpot", 0.05)
    assert found.context == 100_000
    assert found.device.name == "h100"
    assert found.fewest.for_targets == 1
    assert found.model == str(model)


def test_a_config_file_is_enough(model: Path) -> None:
    by_folder = answer(model, "--device", "h200", "--context", 5000)
    file = model / "config.json"
    by_file = answer(file, "--device", "h200", "--context", 5000)
    assert msgspec.structs.replace(by_file, model=by_folder.model) == by_folder


def test_a_number_type_can_be_given(model: Path) -> None:
    found = answer(model, "--device", "h200", "--context", 5000, "--dtype", "float32")
    assert found.weights_bytes == 4 * 8_030_261_248


def test_up_to_its_window_a_model_is_planned(tmp_path: Path) -> None:
    fields = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = write(tmp_path / "windowed", **fields, sliding_window=4096)
    assert answer(folder, "--device", "h200", "--context", "4K").max_model_len == 4096
    assert "see only 4096 tokens" in refusal(folder, "--device", "h200", "--context", "5K")
    assert "set context<=4096" in refusal(folder, "--device", "h200")


# A calibration


def calibrated(folder: Path, device: str, links: dict[Link, LinkRates]) -> Path:
    """A file of `longspan calibrate`, of ranks 100 times as fast as a CPU's thread."""
    rates = replace(CPU_THREAD.of_threads(100), links=links)
    calibration = Calibration(
        date="2026-01-02T03:04:05+00:00",
        device=device,
        torch="2.13.0",
        model="tiny",
        ranks_per_host=(2, 2),
        rates=rates,
        samples=(),
    )
    calibration.save(folder / "rates.json")
    return folder / "rates.json"


def test_a_calibration_is_planned_with(model: Path, tmp_path: Path) -> None:
    near, far = LinkRates(1e-4, 2e9), LinkRates(3e-4, 1e8)
    file = calibrated(tmp_path, "NVIDIA H200", {"host": near, "network": far})
    arguments = ("--calibration", file, "--context", "512K", "--nodes", 2, "--count", 2)
    found = answer(model, *arguments, "--memory", 50)
    assert found.device.name == "NVIDIA H200"
    assert found.device.rates == Calibration.load(file).rates
    # 90 % of 50 GB less 16.06 are 13,799 pages; 32,768 need three devices: so two hosts.
    assert found.rows[-1].devices == 3
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"Times are predicted from {file}: NVIDIA H200, 2 + 2 ranks")
    # 524,288 tokens of 2 x 6.98e9 operations at 9e12 a second are 407 s of four ranks.
    ttft = found.rows[-1].ttft
    assert ttft is not None
    assert ttft > 2 * 6_979_588_096 * 524_288 / 9e12 / 4
    # With the memory of a kind of device one rank has room.
    assert answer(model, *arguments, "--device", "h200").rows[-1].devices == 1


def test_links_that_a_calibration_lacks_are_named(model: Path, tmp_path: Path) -> None:
    """CPU ranks of one host share a device, as far as links go."""
    file = calibrated(tmp_path, "AVX512 CPU", {"device": LinkRates(1e-9, 1e15)})
    arguments = (model, "--calibration", file, "--memory", 40, "--context", "64K", "--count", 2)
    unknown = "It knows no link between hosts; one of TCP over 25 GbE is assumed."
    near, far = answer(*arguments), answer(*arguments, "--nodes", 2)
    assert unknown not in near.notes
    assert unknown in far.notes
    [near_ring, _] = [choice for choice in near.choices if choice.degree == 2][:2]
    assert near_ring.exchange == pytest.approx(32 * 1e-9 + near_ring.near_bytes / 1e15)
    alone = calibrated(tmp_path, "AVX512 CPU", {})
    assert alone == file
    assert "It knows no link inside a host; one of TCP" in " ".join(answer(*arguments).notes)


# The plot


def test_the_plot_is_a_png(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    arguments = ("--device", "l40s", "--context", "100K", "--batch", 16, "--ttft", 20)
    done = plan(model, *arguments, "--plot", file, "--json")
    assert done.exit_code == 0, done.output
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1080, 720)
    assert 20_000 < len(data) < 500_000


def test_a_plot_of_nothing_that_fits(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.PNG"
    arguments = ("--device", "a100-40", "--count", 1, "--batch", 200)
    assert answer(model, *arguments).rows[0].fits is False
    assert plan(model, *arguments, "--plot", file).exit_code == 0
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_a_missing_matplotlib_is_named_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refusal(model, "--device", "h200", "--plot", tmp_path / "plan.png")
    assert line.startswith("error: plot=")
    assert line.endswith("plan.png' needs matplotlib; run pip install 'longspan[plot]'")
    assert plan(model, "--device", "h200").exit_code == 0, "needed for nothing else"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("plan.pdf", "must be the name of a .png file"), ("no/plan.png", "folder does not exist")],
)
def test_a_plot_that_cannot_be_written(
    model: Path, tmp_path: Path, name: str, complaint: str
) -> None:
    assert complaint in refusal(model, "--device", "h200", "--plot", tmp_path / name)


# Wrong input: one line each


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--device", "h20"), "device='h20' is unknown; did you mean 'h200'?"),
        ((), "device or calibration must be given"),
        (("--calibration", "no.json", "--memory", 80), "calibration='no.json' can't be read"),
        (("--device", "h200", "--memory", -1), "memory=-1.0 must be above 0 GB"),
        (("--device", "h200", "--count", 0), "count=0 must be at least 1"),
        (("--device", "h200", "--nodes", 0), "nodes=0 must be at least 1"),
        (("--device", "h200", "--batch", -3), "batch=-3 must be at least 1"),
        (("--device", "h200", "--ttft", 0), "ttft=0.0 must be above 0 seconds"),
        (("--device", "h200", "--context", "many"), "context='many' must be a whole number"),
        (
            ("--device", "h200", "--context", "10M"),
            "context=10,485,760 is above the 1,048,576 tokens of model=",
        ),
    ],
)
def test_wrong_options(model: Path, arguments: tuple[object, ...], complaint: str) -> None:
    assert refusal(model, *arguments).startswith(f"error: {complaint}")


def test_weights_that_no_device_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "large", intermediate_size=600_000)
    line = refusal(folder, "--device", "b200")
    assert line.endswith("Longspan has no tensor parallelism; no known device is large enough")


def test_models_that_cannot_be_planned(tmp_path: Path) -> None:
    gpt_oss = write(
        tmp_path / "gpt-oss",
        model_type="gpt_oss",
        architectures=["GptOssForCausalLM"],
        num_hidden_layers=2,
    )
    line = refusal(gpt_oss, "--device", "h200")
    assert "(GptOssForCausalLM) can't be served exactly: its attention has sinks" in line
    strange = write(tmp_path / "strange", model_type="strange")
    assert "has no model_type='strange'" in refusal(strange, "--device", "h200")
    assert "no such folder" in refusal(tmp_path / "nowhere", "--device", "h200")
    broken = tmp_path / "config.json"
    broken.write_text("{")
    assert "its config.json can't be read" in refusal(broken, "--device", "h200")


def test_help_names_all_devices_and_that_none_was_measured() -> None:
    text = " ".join(plan("--help").stdout.split())
    assert ", ".join(DEVICES) in text
    assert "no GPU was measured" in text
