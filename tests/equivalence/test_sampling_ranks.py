"""A seed gives the same tokens on any number of ranks and in any batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference

from longspan import LLM, SamplingParams

PARAMS = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.3, top_p=0.9, top_k=50, seed=2, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, min_p=0.02, seed=3, max_tokens=40, ignore_eos=True),
    SamplingParams(
        temperature=0.7,
        seed=4,
        max_tokens=40,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        ignore_eos=True,
    ),
    SamplingParams(temperature=1.0, n=3, seed=5, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True),
]
PROMPTS = [reference.prompt(length, seed=9) for length in (1, 5, 33, 64, 150, 300)]


def sample(folder: Path, ranks: int, order: list[int], chunk: int = 2048) -> dict[int, list]:
    with LLM(
        str(folder),
        context_parallel_size=ranks,
        kv_cache_tokens=2000,
        min_tokens_per_rank=1,
        max_num_batched_tokens=chunk,
        distributed_executor_backend="uni",
    ) as llm:
        prompts = [PROMPTS[i] for i in order]
        outputs = llm.generate(prompts, [PARAMS[i] for i in order], use_tqdm=False)
    return {
        i: [completion.token_ids for completion in output.outputs]
        for i, output in zip(order, outputs, strict=True)
    }


@pytest.fixture(scope="module")
def expected(model_folder: Callable[[str], Path]) -> dict[int, list]:
    return sample(model_folder("qwen3"), 1, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_and_any_chunk(
    model_folder: Callable[[str], Path], expected: dict[int, list], ranks: int
) -> None:
    assert sample(model_folder("qwen3"), ranks, [0, 1, 2, 3, 4, 5], chunk=50) == expected
    completions = [tuple(tokens) for each in expected.values() for tokens in each]
    assert len(set(completions)) == len(completions)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_batch(
    model_folder: Callable[[str], Path], expected: dict[int, list], ranks: int
) -> None:
    for order in ([4, 2, 0], [3], [1, 0]):
        got = sample(model_folder("qwen3"), ranks, order)
        assert got == {i: expected[i] for i in order}
