"""Contexts that no rank could hold alone, and pages that all come back."""

import random
from collections.abc import Callable
from pathlib import Path

import reference

from longspan import LLM, SamplingParams
from longspan.engine.engine import Engine


def start(folder: Path, **options: object) -> LLM:
    return LLM(str(folder), page_size=16, distributed_executor_backend="uni", **options)


def used(engine: Engine) -> list[int]:
    return [usage.used for usage in engine.kv_usage]


def test_a_prompt_three_times_a_ranks_pool(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    prompt = reference.prompt(3072)
    with start(
        folder,
        context_parallel_size=4,
        kv_cache_tokens=1024,
        max_num_batched_tokens=200,
        min_tokens_per_rank=512,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        group = llm.engine.add_request(prompt, params)
        chunks = 0
        while llm.engine.has_requests:
            llm.engine.step()
            chunks += not group.requests[0].output_token_ids
            pages = used(llm.engine)
            assert max(pages) <= 1024 // 16
            assert max(pages) - min(pages) <= chunks + 1
        output = group.output()
    assert output.metrics is not None
    assert sum(output.metrics.kv_tokens) == 3072 + 31
    assert all(700 < tokens < 900 for tokens in output.metrics.kv_tokens)
    assert output.outputs[0].token_ids == reference.greedy(reference.load(folder), prompt, 32)


def test_a_context_that_outgrows_its_rank_grows_onto_the_next(
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder("llama")
    prompt = reference.prompt(100)
    with start(folder, context_parallel_size=3, kv_cache_tokens=(128, 64, 256)) as llm:
        params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
        output = llm.generate(prompt, params, use_tqdm=False)[0]
    assert output.metrics is not None
    assert output.metrics.kv_tokens == [128, 15, 256]
    assert output.outputs[0].token_ids == reference.greedy(reference.load(folder), prompt, 300)


def test_preempted_requests_come_back_with_the_same_tokens(
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder("llama")
    prompts = [reference.prompt(100, seed) for seed in range(6)]
    with start(folder, context_parallel_size=2, kv_cache_tokens=192) as llm:
        params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    model = reference.load(folder)
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == reference.greedy(model, prompt, 120)


def test_no_page_leaks_after_200_random_requests(model_folder: Callable[[str], Path]) -> None:
    rng = random.Random(7)
    with start(
        model_folder("llama"),
        context_parallel_size=3,
        kv_cache_tokens=(160, 96, 320),
        max_num_batched_tokens=48,
        min_tokens_per_rank=32,
    ) as llm:
        engine, aborted = llm.engine, 0
        waiting, running = 200, {}
        while waiting or engine.has_requests:
            for _ in range(min(waiting, rng.randrange(4))):
                length = rng.choice((1, 2, 15, 16, 17, 40, 100, 300))
                params = SamplingParams(
                    n=rng.choice((1, 1, 2)), seed=waiting, max_tokens=rng.randrange(1, 40)
                )
                group = engine.add_request(reference.prompt(length, waiting), params)
                running[group.request_id] = group
                waiting -= 1
            if running and rng.random() < 0.05:
                aborted += engine.abort(running.popitem()[0]) is not None
            if engine.has_requests:
                for group in engine.step():
                    if group.finished:
                        running.pop(group.request_id, None)
        assert aborted > 3
        assert used(engine) == [0, 0, 0]
        assert not running
