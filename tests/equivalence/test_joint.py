"""Tokens that real processes compute jointly are those of generate."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import reference
import zoo

from longspan import LLM, SamplingParams
from longspan.errors import RankFailedError
from longspan.plan import UNKNOWN, RankPlan
from longspan.worker.processes import ProcessExecutor

LENGTHS = (1, 2, 31, 65, 200)
NEW = 40
WORTH_SHARING = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 32}
"""A model whose weights take longer to read than ranks to meet."""

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="ranks that compute jointly need a core each"
)


def start(folder: Path, **options: object) -> tuple[LLM, list[RankPlan]]:
    """An engine of two ranks, and the plans that it gives them."""
    llm = LLM(
        str(folder),
        context_parallel_size=2,
        kv_cache_tokens=1000,
        distributed_executor_backend="mp",
        **options,
    )
    executor, given = llm.engine.executor, []
    start_ranks = executor.start

    def note(plans: Mapping[int, RankPlan]) -> None:
        given.extend(plans.values())
        start_ranks(plans)

    executor.start = note  # type: ignore[method-assign]
    return llm, given


def run_to_the_end(llm: LLM) -> None:
    while llm.engine.has_requests:
        llm.engine.step()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tokens_are_those_of_generate(tmp_path: Path, name: str) -> None:
    folder = zoo.build(name, tmp_path, **WORTH_SHARING)
    model = reference.load(folder)
    prompts = [reference.prompt(length) for length in LENGTHS]
    llm, plans = start(folder, min_tokens_per_rank=1, max_num_batched_tokens=100)
    with llm:
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        alone = llm.generate(prompts[2], params, use_tqdm=False)
        several = llm.generate(prompts, params, use_tqdm=False)
    joint = [plan for plan in plans if plan.joint]
    assert len(joint) > 2 * 2 * (NEW - 10)
    assert {len(plan.token_ids) for plan in joint} >= {1, len(LENGTHS)}
    assert any(not part.extents for plan in joint for part in plan.parts), "none has no keys"
    ahead = [plan for plan in joint if UNKNOWN in plan.token_ids]
    assert len(ahead) > len(joint) / 2, "ranks tell each other what they have drawn"
    expected = [reference.greedy(model, prompt, NEW) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in several] == expected
    assert alone[0].outputs[0].token_ids == expected[2]


def test_a_model_of_which_there_is_little_to_read_is_not_shared(
    model_folder: Callable[[str], Path],
) -> None:
    llm, plans = start(model_folder("llama"))
    with llm:
        llm.generate(reference.prompt(65), SamplingParams(max_tokens=4), use_tqdm=False)
    assert not any(plan.joint for plan in plans)


def test_a_rank_without_keys_helps_one_that_has_all(tmp_path: Path) -> None:
    folder = zoo.build("llama", tmp_path, **WORTH_SHARING)
    llm, plans = start(folder)
    with llm:
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        found = llm.generate(reference.prompt(31), params, use_tqdm=False)
    assert [bool(plan.joint) for plan in plans] == [False] + 2 * (NEW - 1) * [True]
    assert sum(bool(part.extents) for plan in plans for part in plan.parts) == NEW
    expected = reference.greedy(reference.load(folder), reference.prompt(31), NEW)
    assert found[0].outputs[0].token_ids == expected


def test_a_rank_that_dies_among_them_ends_all_within_seconds(tmp_path: Path) -> None:
    """The other one waits for it in a kernel, which nothing interrupts."""
    llm, plans = start(zoo.build("llama", tmp_path, **WORTH_SHARING))
    executor = llm.engine.executor
    assert isinstance(executor, ProcessExecutor)
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    llm.engine.add_request(reference.prompt(31), params)
    while not any(plan.joint for plan in plans):
        llm.engine.step()
    os.kill(executor.pids[1], signal.SIGSTOP)  # the next step begins without it
    killer = threading.Timer(0.5, os.kill, (executor.pids[1], signal.SIGKILL))
    killer.start()
    begun = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 1 .* was killed by SIGKILL"):
        run_to_the_end(llm)
    killer.join()
    while any(psutil.pid_exists(pid) for pid in executor.pids):
        assert time.monotonic() - begun < 10
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"attention_strategy": "pass_q"}), ("gemma", {})],
    ids=["a strategy is asked for", "a layer of another kind"],
)
def test_where_it_can_not_be_ranks_send_messages(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    folder = zoo.build(name, tmp_path, **WORTH_SHARING)
    llm, plans = start(folder, min_tokens_per_rank=1, **options)
    with llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate(reference.prompt(65), params, use_tqdm=False)
        traffic = llm.engine.traffic
    assert not any(plan.joint for plan in plans)
    assert traffic
