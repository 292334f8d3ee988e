"""Ranks are forks of one process: when it is shared, what it may not have, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import zoo

from longspan.config import EngineConfig
from longspan.errors import RankFailedError
from longspan.models import load_spec
from longspan.worker.forker import Forker
from longspan.worker.processes import ProcessExecutor
from longspan.worker.rank_process import Spawn

Start = Callable[[], ProcessExecutor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    """Starts single ranks, and ends them after the test."""
    config = EngineConfig(model=str(model), kv_cache_tokens=64, distributed_executor_backend="mp")
    with ExitStack() as started:

        def start() -> ProcessExecutor:
            executor = ProcessExecutor(config, load_spec(config))
            started.callback(executor.close)
            return executor

        yield start


def wait_until(met: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def wait_until_gone(*pids: int) -> None:
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"the end of {pids}")


def parent(pid: int) -> int:
    return psutil.Process(pid).ppid()


def test_engines_share_a_process_with_one_thread(start: Start) -> None:
    one, other = start(), start()
    forker = Forker.current().pid
    assert [parent(pid) for pid in one.pids + other.pids] == [forker, forker]
    assert os.listdir(f"/proc/{forker}/task") == [str(forker)]
    assert os.getsid(one.pids[0]) == one.pids[0], "Ctrl-C does not reach it"
    one.close()
    wait_until_gone(*one.pids)
    assert psutil.pid_exists(other.pids[0])


def test_another_environment_has_its_own_which_ranks_outlive(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank without it can still be ended; only how it has ended is not known then."""
    before = Forker.current()
    monkeypatch.setenv("LONGSPAN_TEST", "another")
    [rank] = (executor := start()).pids
    forker = Forker.current()
    assert forker is not before
    assert parent(rank) == forker.pid
    assert "LONGSPAN_TEST" in psutil.Process(rank).environ()
    os.kill(forker.pid, signal.SIGKILL)
    wait_until(lambda: parent(rank) != forker.pid, "another parent")
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(RankFailedError, match=rf"rank 0 \(pid {rank}\) ended after the process"):
        wait_until(lambda: bool(executor.wait(0.1)), "the rank's end")
    monkeypatch.undo()
    assert Forker.current() is not forker


def test_what_keeps_ranks_from_starting_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no such torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    spawn = Spawn("lo", threads=1, folder=str(tmp_path))
    engine, channel = socket.socketpair()
    told = r"the process that starts ranks .* has ended\n(.*\n)*.*no such torch"
    with (
        engine,
        channel,
        open(tmp_path / "log", "wb") as log,
        pytest.raises(RankFailedError, match=told),
    ):
        Forker().fork(spawn, channel, log)


ENGINE = """
import sys
from longspan.config import EngineConfig
from longspan.cost.rates import CPU_THREAD
from longspan.models import load_spec
from longspan.worker.processes import ProcessExecutor
config = EngineConfig(model=sys.argv[1], kv_cache_tokens=64, distributed_executor_backend="mp")
executor = ProcessExecutor(config, load_spec(config))
print(*executor.pids, executor.rates.linear_flops / CPU_THREAD.linear_flops, flush=True)
sys.stdin.read()
"""


def test_a_rank_that_hangs_when_its_engine_dies_is_killed(model: Path) -> None:
    """Stopped, it can't end itself. Where nothing is said of threads, it has one a core."""
    environment = {name: os.environ[name] for name in os.environ if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as engine:
        assert engine.stdout
        pid, threads = engine.stdout.readline().split()
        assert float(threads) == os.cpu_count()
        rank, forker = int(pid), parent(int(pid))
        os.kill(rank, signal.SIGSTOP)
        engine.kill()
    wait_until_gone(rank, forker)
