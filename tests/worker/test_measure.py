"""Fleets measure themselves: processes over gloo, threads, several hosts; the engine uses it."""

from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import pytest
import torch
import zoo
from typer.testing import CliRunner

from longspan import LLM, SamplingParams
from longspan.cli import app
from longspan.config import EngineConfig
from longspan.cost.calibration import Calibration
from longspan.cost.kv_shape import KVShape
from longspan.cost.rates import CPU_THREAD
from longspan.cost.samples import Samples, fit_rates
from longspan.errors import ConfigError
from longspan.models import load_spec
from longspan.parallel.transport import ThreadTransport
from longspan.topology import Topology
from longspan.worker import measure as measuring
from longspan.worker.measure import measure
from longspan.worker.model_runner import ModelRunner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("llama"))


def measured_by(topology: Topology, model: Path) -> list[Samples]:
    """What threads measure that are told to be on such hosts."""
    config = EngineConfig(
        model=str(model), context_parallel_size=topology.num_ranks, kv_cache_tokens=64
    )
    spec, found = load_spec(config), {}

    def work(transport: ThreadTransport) -> None:
        runner = ModelRunner(config, spec, transport, torch.device("cpu"))
        found[transport.rank] = measure(runner)

    threads = [Thread(target=work, args=(one,)) for one in ThreadTransport.connect(topology)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rates = fit_rates(list(found.values()), KVShape.of(spec), spec.num_active_parameters)
    assert rates.attention_flops > 0
    return [found[rank] for rank in range(topology.num_ranks)]


def kinds(samples: Samples) -> set[tuple[str, str]]:
    return {(one.kind, one.link) for one in samples.messages}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1], [set()]),
        ([1, 1], [{("hop", "network")}] * 2),
        (
            [2, 1],
            [{("hop", "host"), ("hop", "network")}] * 2
            + [{("hop", "network"), ("all_to_all", "network")}],
        ),
    ],
    ids=["one rank", "two hosts", "two hosts, two ranks on one"],
)
def test_each_kind_of_link_is_measured_where_it_is(
    sizes: Sequence[int],
    expected: list[set[tuple[str, str]]],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "REPEATS", 3)
    monkeypatch.setattr(measuring, "MESSAGE_BYTES", (64, 4096))
    ranks = measured_by(Topology.of_hosts(sizes), model)
    found = [kinds(samples) for samples in ranks]
    for one, most in zip(found, expected, strict=True):
        assert one <= most
    assert set().union(*found) == set().union(*expected)
    for samples in ranks:
        assert [step.tokens for step in samples.steps] == [1, 32], "as many as the pool holds"
        assert all(one.seconds > 0 for one in samples.attention)
        assert {one.link for one in samples.overlaps} <= {link for _, link in kinds(samples)}


def test_a_fleet_is_calibrated_and_served_with_what_it_does(model: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "calibration.json", str(model)
    arguments = ["--context-parallel-size", "2", "--kv-cache-tokens", "512", "--device", "cpu"]
    done = CliRunner().invoke(app, ["calibrate", folder, *arguments, "--output", str(path)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{path}\n"
    assert "linear layers" in done.stderr
    calibration = Calibration.load(path)
    assert calibration.ranks_per_host == (2,)
    assert calibration.torch == torch.__version__
    assert len(calibration.samples) == 2
    (link,) = calibration.rates.links.values()
    assert link.bytes > 1e6
    assert 0 <= link.overlap <= 1
    with LLM(
        folder,
        context_parallel_size=2,
        kv_cache_tokens=512,
        device="cpu",
        calibration=str(path),
        distributed_executor_backend="uni",
    ) as llm:
        assert llm.engine.scheduler.cost.rates == calibration.rates
        [output] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 3


def test_a_missing_calibration_is_refused_before_anything_starts(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration='nowhere.json' can't be read"):
        LLM(str(model), calibration="nowhere.json")


def test_an_engine_measures_its_links_when_it_starts_without_a_calibration(
    model: Path, tmp_path: Path
) -> None:
    options = {"context_parallel_size": 2, "kv_cache_tokens": 64}
    with LLM(str(model), **options) as llm:
        found = llm.engine.executor.rates
    assumed = CPU_THREAD.hop("device")
    hop = found.links["device"]
    assert 0 < hop.seconds < 1
    assert hop.bytes > 1e6
    assert (hop.seconds, hop.bytes) != (assumed.seconds, assumed.bytes)
    assert hop.overlap == assumed.overlap
    assert found.links["network"] == CPU_THREAD.links["network"]
    assert found.all_to_all == {}, "two ranks have but one peer each"
    path = tmp_path / "rates.json"
    file = Calibration(
        date="", device="", torch="", model="", ranks_per_host=(2,), rates=found, samples=()
    )
    file.save(path)
    with LLM(str(model), calibration=str(path), **options) as llm:
        assert llm.engine.executor.rates.links == CPU_THREAD.links
