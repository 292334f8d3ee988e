"""Ranks as actors of real Ray clusters of this machine: one of two nodes, and one of their own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zoo

from longspan import LLM, SamplingParams
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, EngineStoppedError, RankFailedError
from longspan.models import load_spec
from longspan.topology import Topology

pytest.importorskip("ray.util.placement_group", reason="needs Ray: pip install 'longspan[ray]'")
sys.path.append(str(Path(__file__).parents[1] / "equivalence"))

import ray
import reference
from ray.cluster_utils import Cluster
from transformers import AutoTokenizer

from longspan.worker import ray_executor
from longspan.worker.ray_executor import RayExecutor, cpus_each

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
OPTIONS = {"kv_cache_tokens": 1000, "min_tokens_per_rank": 1, "max_num_batched_tokens": 100}
LENGTHS = (1, 65, 700)
PROGRAM = [sys.executable, "-c", "from longspan.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = zoo.build("llama", tmp_path_factory.mktemp("llama"))
    return zoo.build_tokenizer(folder)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """Two Ray nodes, with a place for one rank and for two; this process is on the first."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    with pytest.MonkeyPatch.context() as patch:
        cluster.add_node(num_cpus=2)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield
    cluster.shutdown()


def start(model: Path, ranks: int) -> LLM:
    return LLM(
        str(model), context_parallel_size=ranks, distributed_executor_backend="ray", **OPTIONS
    )


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


@pytest.mark.usefixtures("_cluster")
def test_three_actors_on_two_nodes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute the tokens of `generate`, and end together when one is killed."""
    monkeypatch.setattr(ray_executor, "_PLACEMENT_SECONDS", 1)
    prompts = [reference.prompt(length) for length in LENGTHS]
    plain = reference.load(model)
    expected = [reference.greedy(plain, prompt, 24) for prompt in prompts]
    llm = start(model, 3)
    executor = llm.engine.executor
    assert isinstance(executor, RayExecutor)
    assert executor.topology == Topology((0, 1, 1), (0, 0, 0))
    for strategy in ("auto", "tree"):
        config = dataclasses.replace(llm.config, attention_strategy=strategy)
        llm.engine = Engine(config, load_spec(config), executor, None)
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected, strategy
        assert sum(traffic.far_bytes for traffic in llm.engine.traffic.values()) > 0

    with pytest.raises(ConfigError, match=r"1 ranks need 1 CPUs .* of its 3, 0 are free; end "):
        start(model, 1)
    assert ray.is_initialized(), "by the first, which goes on"

    pids = executor.pids
    assert len({*pids}) == 3
    llm.engine.add_request([7] * 900, dataclasses.replace(GREEDY, max_tokens=1000))
    llm.engine.step()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RankFailedError, match=rf"^rank 1 on Ray node .+ \(pid {pids[1]}\) died: ."):
        llm.generate({"prompt_token_ids": [7] * 900}, GREEDY, use_tqdm=False)
    wait_until_gone(pids)
    with pytest.raises(EngineStoppedError, match="make a new one"):
        llm.generate([1, 2, 3])
    assert not ray.is_initialized()


@pytest.mark.usefixtures("_cluster")
def test_too_few_cpus_are_noticed_at_once(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"4 ranks need 4 CPUs of the Ray cluster, which has 3;"):
        start(model, 4)
    assert not ray.is_initialized()


def test_two_actors_of_a_cluster_of_their_own(model: Path) -> None:
    """The terminal shows nothing of Ray, and nothing of it is left."""
    prompt = "The demand for a statement that is long enough for two ranks."
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # sockets' paths are short
        arguments = ["generate", str(model), "--prompt", prompt, "--json", "--ignore-eos"]
        arguments += ["--context-parallel-size", "2", "--distributed-executor-backend", "ray"]
        arguments += ["--min-tokens-per-rank", "1", "--kv-cache-tokens", "48"]
        done = subprocess.run(
            [*PROGRAM, *arguments, "--temperature", "0", "--max-tokens", "24"],
            env={**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        own = [line.startswith("longspan:") for line in done.stderr.splitlines()]  # progress
        assert all(own), done.stderr
        wait_until_gone([p.pid for p in psutil.process_iter() if folder in " ".join(cmdline(p))])
    answer = json.loads(done.stdout)
    plain = reference.load(model)
    tokens = AutoTokenizer.from_pretrained(model).encode(prompt)
    assert answer["token_ids"] == reference.greedy(plain, tokens, 24)
    assert min(answer["metrics"]["kv_tokens_per_rank"]) > 0


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1: Connection refused; give the HOST:PORT that "),
        ("ray://there:1", "RAY_ADDRESS=ray://there:1 is for programs outside the cluster; run "),
    ],
)
def test_a_wrong_address_is_noticed_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"^{said}"):
        start(model, 2)


def test_without_ray_the_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "longspan.worker.ray_executor")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray; .*pip install 'longspan\[ray\]'$"):
        start(model, 2)


def test_cpus_are_shared_by_ranks_as_far_as_whole_ranks_fit() -> None:
    assert cpus_each([8], 2) == 4
    assert cpus_each([8], 3) == 2
    assert cpus_each([8, 4], 3) == 4
    assert cpus_each([8, 0, 2], 5) == 2
    assert cpus_each([1, 1], 3) == cpus_each([], 1) == 1
