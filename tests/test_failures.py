"""What happens to the processes: real workers, real kills, real interrupts."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import zoo

from longspan import LLM, SamplingParams
from longspan.errors import ConfigError, EngineStoppedError, RankFailedError
from longspan.plan import Part, RankPlan, Run, Segment, Shard
from longspan.topology import Topology
from longspan.worker import mpi
from longspan.worker.forker import Forker
from longspan.worker.processes import ProcessExecutor

LONG = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
PROMPT = {"prompt_token_ids": [7] * 3000}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("llama"))


def start(model: Path, backend: str = "auto") -> LLM:
    return LLM(
        str(model),
        context_parallel_size=2,
        kv_cache_tokens=4000,
        min_tokens_per_rank=1,
        communication_backend=backend,
    )


def executor(llm: LLM) -> ProcessExecutor:
    assert isinstance(llm.engine.executor, ProcessExecutor)
    return llm.engine.executor


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("backend", ["gloo", "mpi"])
def test_a_killed_rank_ends_all_and_is_named(model: Path, backend: str) -> None:
    if backend == "mpi" and (obstacle := mpi.obstacle(Topology.of_hosts([2]))):
        pytest.skip(obstacle)
    llm = start(model, backend)
    pids = executor(llm).pids
    llm.engine.add_request(PROMPT["prompt_token_ids"], LONG)
    llm.engine.step()
    os.kill(pids[1], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RankFailedError, match=rf"rank 1 \(pid {pids[1]}\) was killed by SIGKILL"):
        llm.generate(PROMPT, LONG, use_tqdm=False)
    wait_until_gone(pids)
    assert time.monotonic() - begun < 10
    with pytest.raises(EngineStoppedError, match="make a new one"):
        llm.generate(PROMPT, LONG)


def test_an_exception_in_a_rank_is_shown_and_ends_all(model: Path) -> None:
    llm = start(model)
    pids = executor(llm).pids
    shard = Shard(0, (Run(0, 1),), 0, (Run(0, 1),))
    nonsense = RankPlan((10**6,), (Part(Segment("x", "local", (shard,)), ()),), ())
    executor(llm).start({0: nonsense})
    with pytest.raises(RankFailedError, match=r"rank 0 failed: .*\n(.*\n)*.*longspan/worker"):
        executor(llm).wait()
    wait_until_gone(pids)


def test_a_rank_that_cannot_load_says_why_and_ends_all(model: Path, tmp_path: Path) -> None:
    broken = zoo.build("llama", tmp_path / "broken")
    weights = broken / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    forker = Forker.current()
    before = set(psutil.Process(forker.pid).children())
    weights.write_bytes(weights.read_bytes()[: header + 100])
    with pytest.raises(Exception, match=r"(?i)safetensors|weights|incomplete"):
        start(broken)
    assert Forker.current() is forker
    assert set(psutil.Process(forker.pid).children()) <= before


def test_mpi_that_is_asked_for_and_not_there_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPI4PY_MPIABI", "openmpi")  # mpi4py then looks for a library of that kind
    with pytest.raises(ConfigError, match=r"'mpi': mpi4py finds no MPI library; install"):
        start(model, "mpi")


def test_close_and_with_leave_nothing(model: Path) -> None:
    with start(model) as llm:
        pids = executor(llm).pids
        assert llm.generate([1, 2, 3], SamplingParams(max_tokens=2))[0].finished
    wait_until_gone(pids, 1)
    llm.close()
    with pytest.raises(EngineStoppedError):
        llm.generate([1, 2, 3])


SCRIPT = """
from longspan import LLM, SamplingParams
llm = LLM({model!r}, context_parallel_size=2, kv_cache_tokens=4000, min_tokens_per_rank=1)
print(*llm.engine.executor.pids, flush=True)
params = SamplingParams(temperature=0, max_tokens={max_tokens}, ignore_eos=True)
out = llm.generate({{"prompt_token_ids": [7] * 3000}}, params)
print(len(out[0].outputs[0].token_ids), flush=True)
"""


def run_script(
    model: Path, max_tokens: int, command: list[str], stdin: bool, folder: Path
) -> subprocess.Popen[str]:
    script = textwrap.dedent(SCRIPT.format(model=str(model), max_tokens=max_tokens))
    process = subprocess.Popen(
        [*command] if stdin else [*command, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    if stdin:
        assert process.stdin
        process.stdin.write(script)
        process.stdin.close()
        process.stdin = None
    return process


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout
    return [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize("stdin", [False, True], ids=["script", "stdin"])
def test_no_main_guard_is_needed_and_the_end_leaves_nothing(
    model: Path, stdin: bool, tmp_path: Path
) -> None:
    command = [sys.executable, "-"] if stdin else [sys.executable, "-c"]
    process = run_script(model, 3, command, stdin, tmp_path)
    pids = read_pids(process)
    output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("3\n", 0), errors
    assert len(pids) == 2
    wait_until_gone(pids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_engine_ends_every_rank_within_seconds(
    model: Path, sent: signal.Signals, tmp_path: Path
) -> None:
    process = run_script(model, 4000, [sys.executable, "-c"], stdin=False, folder=tmp_path)
    pids = read_pids(process)
    [forker] = psutil.Process(process.pid).children()
    assert pids == [rank.pid for rank in forker.children()]
    time.sleep(1)
    assert all(psutil.pid_exists(pid) for pid in pids)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=15)
    assert process.returncode != 0
    if sent == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
    wait_until_gone([forker.pid, *pids])
    assert not list(tmp_path.iterdir())
