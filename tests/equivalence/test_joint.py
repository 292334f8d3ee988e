"""Tokens that real processes compute jointly are those of generate."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import reference

from longspan import LLM, SamplingParams
from longspan.plan import RankPlan

LENGTHS = (1, 2, 31, 65, 200)
NEW = 40

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


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tokens_are_those_of_generate(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    model = reference.load(folder)
    prompts = [reference.prompt(length) for length in LENGTHS]
    llm, plans = start(folder, min_tokens_per_rank=1, max_num_batched_tokens=100)
    with llm:
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        alone = llm.generate(prompts[2], params, use_tqdm=False)
        several = llm.generate(prompts, params, use_tqdm=False)
    joint = [plan for plan in plans if plan.joint]
    assert len(joint) > NEW / 2  # until short ones have been gathered at their homes
    assert {len(plan.token_ids) for plan in joint} >= {1, len(LENGTHS)}
    assert any(not part.extents for plan in joint for part in plan.parts), "none has no keys"
    expected = [reference.greedy(model, prompt, NEW) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in several] == expected
    assert alone[0].outputs[0].token_ids == expected[2]


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"attention_strategy": "pass_q"}), ("gemma", {})],
    ids=["a strategy is asked for", "a layer of another kind"],
)
def test_where_it_can_not_be_ranks_send_messages(
    model_folder: Callable[[str], Path], name: str, options: dict[str, str]
) -> None:
    llm, plans = start(model_folder(name), min_tokens_per_rank=1, **options)
    with llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate(reference.prompt(65), params, use_tqdm=False)
        traffic = llm.engine.traffic
    assert not any(plan.joint for plan in plans)
    assert traffic
