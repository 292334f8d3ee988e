"""A narrower KV cache is close to the model's own, holds more, and travels between ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor

from longspan import LLM, SamplingParams

PROMPTS = [reference.prompt(length) for length in (1, 65, 300)]


def log_probabilities(folder: Path, **options: object) -> Tensor:
    """Of all words after each prompt."""
    with LLM(
        str(folder),
        distributed_executor_backend="uni",
        max_num_batched_tokens=100,
        kv_cache_tokens=1024,
        min_tokens_per_rank=1,
        **options,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    rows = []
    for output in outputs:
        (found,) = output.outputs[0].logprobs
        rows.append([found[token].logprob for token in sorted(found)])
    return torch.tensor(rows)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.03), ("bfloat16", 0.2), ("int8", 0.2)])
def test_it_is_close_on_any_ranks(
    model_folder: Callable[[str], Path], dtype: str, bound: float
) -> None:
    folder = model_folder("llama")
    exact = log_probabilities(folder)
    for ranks, strategy in ((1, "auto"), (3, "pass_kv"), (3, "gather_kv"), (2, "pass_q")):
        found = log_probabilities(
            folder,
            kv_cache_dtype=dtype,
            context_parallel_size=ranks,
            attention_strategy=strategy,
        )
        assert 0 < float((found - exact).abs().max()) < bound


def test_a_context_that_grows_takes_its_int8_pages_along(
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder("llama")
    tokens = []
    for pools in ([640], [160, 160, 320]):
        with LLM(
            str(folder),
            distributed_executor_backend="uni",
            kv_cache_dtype="int8",
            kv_cache_tokens=pools,
            context_parallel_size=len(pools),
        ) as llm:
            params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            (output,) = llm.generate([PROMPTS[2]], params, use_tqdm=False)
        tokens.append(output.outputs[0].token_ids)
    # Rounding may turn a close choice some day, but not among the first ones.
    assert tokens[0][:40] == tokens[1][:40]
    assert len(tokens[1]) == 200
