"""What both executors promise: ranks work independently, and the end of one is the end of all.

A rank is kept at work by half of a step that it shares with another: it waits for the rest.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zoo

from longspan.config import EngineConfig
from longspan.engine.executor import Executor
from longspan.errors import EngineStoppedError, RankFailedError
from longspan.models import ModelSpec, load_spec
from longspan.plan import Extent, Part, RankPlan, RankResult, Run, Sampling, Segment, Shard
from longspan.worker.in_process import InProcessExecutor
from longspan.worker.processes import ProcessExecutor

EXECUTORS: dict[str, Callable[[EngineConfig, ModelSpec], Executor]] = {
    "threads": InProcessExecutor,
    "processes": ProcessExecutor,
}
IMPOSSIBLE_TOKEN = 10**6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("llama"))


def launch(kind: str, model: Path, num_ranks: int) -> Executor:
    config = EngineConfig(
        model=str(model), context_parallel_size=num_ranks, kv_cache_tokens=64, page_size=4
    )
    spec = load_spec(config)
    return EXECUTORS[kind](config, spec)


@pytest.fixture(scope="module", params=EXECUTORS)
def executor(request: pytest.FixtureRequest, model: Path) -> Iterator[Executor]:
    """Three ranks for all tests that leave them as they were."""
    executor = launch(request.param, model, 3)
    yield executor
    executor.close()


@pytest.fixture(params=EXECUTORS)
def mortal(request: pytest.FixtureRequest, model: Path) -> Iterator[Executor]:
    """Two ranks for one test, which ends them."""
    executor = launch(request.param, model, 2)
    yield executor
    executor.close()


def alone(rank: int, token_id: int = 7) -> RankPlan:
    """A step of one token that no other rank has a part in."""
    segment = Segment("alone", "local", (Shard(rank, (Run(0, 1),), 0, (Run(0, 1),)),))
    sampling = Sampling("alone", row=0, seed=0, position=1, temperature=0)
    return RankPlan((token_id,), (Part(segment, (Extent(0, 1),)),), (sampling,))


def shared(*ranks: int) -> dict[int, RankPlan]:
    """A step of one token on each of several ranks, which waits for all of them."""
    shards = tuple(Shard(rank, (Run(i, 1),), 0, (Run(i, 1),)) for i, rank in enumerate(ranks))
    part = Part(Segment("shared", "gather_kv", shards), (Extent(1, 1),))
    return {rank: RankPlan((7,), (part,), ()) for rank in ranks}


def finish(executor: Executor, *ranks: int) -> dict[int, RankResult]:
    done: dict[int, RankResult] = {}
    while len(done) < len(ranks):
        done |= executor.wait()
    assert done.keys() == set(ranks)
    return done


def test_a_rank_does_several_steps_while_another_is_at_work(executor: Executor) -> None:
    both = shared(0, 2)
    executor.start({0: both[0]})
    drawn = []
    for token_id in (7, 8, 7):
        executor.start({1: alone(1, token_id)})
        drawn.append(finish(executor, 1)[1].sampled)
    assert drawn[0] == drawn[2]
    assert executor.wait(0.05) == {}
    executor.start({2: both[2]})
    finish(executor, 0, 2)


def test_ranks_that_start_together_need_not_end_together(executor: Executor) -> None:
    both = shared(0, 2)
    executor.start({0: both[0], 1: alone(1)})
    assert executor.wait().keys() == {1}
    executor.start({1: alone(1), 2: both[2]})
    finish(executor, 0, 1, 2)


def test_wait_returns_at_once_when_nobody_is_at_work(executor: Executor) -> None:
    assert executor.wait() == {}
    executor.start({})
    assert executor.wait() == {}
    executor.start({1: alone(1)})
    finish(executor, 1)
    assert executor.wait() == {}


def test_wait_gives_up_after_its_timeout(executor: Executor) -> None:
    both = shared(0, 1)
    executor.start({0: both[0]})
    for seconds in (0.0, 0.2):
        begun = time.monotonic()
        assert executor.wait(seconds) == {}
        assert seconds <= time.monotonic() - begun + 0.01 < seconds + 5
    executor.start({1: both[1]})
    finish(executor, 0, 1)


def test_nothing_starts_on_a_closed_fleet(mortal: Executor) -> None:
    mortal.start({0: shared(0, 1)[0]})
    mortal.close()
    mortal.close()
    with pytest.raises(EngineStoppedError, match="make a new one"):
        mortal.start({1: alone(1)})
    assert mortal.wait() == {}


def test_a_failed_rank_ends_those_that_wait_for_it(mortal: Executor) -> None:
    mortal.start({0: shared(0, 1)[0], 1: alone(1, IMPOSSIBLE_TOKEN)})
    with pytest.raises(RankFailedError, match="rank 1 failed: "):
        finish(mortal, 0, 1)
    with pytest.raises(EngineStoppedError):
        mortal.start({0: alone(0)})


def test_ctrl_c_while_waiting_closes_the_fleet(mortal: Executor) -> None:
    mortal.start({0: shared(0, 1)[0]})
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        mortal.wait()
    assert time.monotonic() - begun < 2, "ranks in an exchange end by themselves"
    with pytest.raises(EngineStoppedError):
        mortal.start({1: alone(1)})


def wait_for_ever(executor: Executor) -> None:
    """Also when no rank is at work; the test's timeout ends it."""
    while True:
        assert executor.wait(1) == {}


@pytest.mark.parametrize("at_work", [(), (0,)])
def test_an_idle_rank_that_is_killed_is_noticed(model: Path, at_work: tuple[int, ...]) -> None:
    executor = launch("processes", model, 2)
    assert isinstance(executor, ProcessExecutor)
    plans = shared(0, 1)
    executor.start({rank: plans[rank] for rank in at_work})
    os.kill(executor.pids[1], signal.SIGKILL)
    with pytest.raises(RankFailedError, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
        wait_for_ever(executor)
    assert executor.wait() == {}


def test_a_single_rank_in_this_process_has_no_thread(model: Path) -> None:
    executor = launch("threads", model, 1)
    before = threading.active_count()
    executor.start({0: alone(0)})
    (sampled,) = finish(executor, 0)[0].sampled
    assert sampled.request_id == "alone"
    assert executor.wait() == {}
    assert threading.active_count() == before
    executor.start({0: alone(0, IMPOSSIBLE_TOKEN)})
    with pytest.raises(RankFailedError, match="rank 0 failed: "):
        executor.wait()
    with pytest.raises(EngineStoppedError):
        executor.start({0: alone(0)})
