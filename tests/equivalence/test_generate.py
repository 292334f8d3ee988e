"""The product: tokens of any number of ranks, by any strategy, are those of `model.generate`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch

from longspan import LLM, RequestOutput, SamplingParams

LENGTHS = (1, 2, 7, 63, 64, 65, 500, 1000)
MODELS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "phi3",
    "olmo2",
    "granite",
    "mixtral",
    "qwen3_moe",
)
# Chunks of one step that do and don't divide the prompts, and one smaller than a page.
CASES = (
    (1, "auto", 2048),
    (1, "auto", 7),
    (2, "auto", 100),
    (2, "pass_kv", 250),
    (2, "gather_kv", 64),
    (2, "pass_q", 37),
    (3, "auto", 2048),
    (3, "pass_kv", 100),
    (3, "gather_kv", 500),
    (3, "pass_q", 64),
    (4, "pass_kv", 37),
    (4, "gather_kv", 125),
    (4, "pass_q", 2048),
)

Built = Callable[[str], Path]


def generate(folder: Path, ranks: int, strategy: str, chunk: int, **params: object) -> list:
    prompts = [{"prompt_token_ids": reference.prompt(length)} for length in LENGTHS]
    options = {"max_tokens": reference.NEW_TOKENS, "ignore_eos": True, **params}
    with LLM(
        str(folder),
        context_parallel_size=ranks,
        attention_strategy=strategy,
        max_num_batched_tokens=chunk,
        kv_cache_tokens=3000,
        page_size=8,
        min_tokens_per_rank=1,
        distributed_executor_backend="uni",
        dtype="float32",
    ) as llm:
        outputs: list[RequestOutput] = llm.generate(
            prompts, SamplingParams(temperature=0, **options), use_tqdm=False
        )
        assert all(usage.used == 0 for usage in llm.engine.kv_usage)
        used = set(llm.engine.traffic) - {"move"}
        on_one_host = {"pass_kv", "gather_kv", "pass_q"}
        assert used == {strategy} if strategy != "auto" else used <= on_one_host
    return outputs


@pytest.fixture(scope="module")
def expected(model_folder: Built) -> Callable[[str], list[list[int]]]:
    known: dict[str, list[list[int]]] = {}

    def tokens(name: str) -> list[list[int]]:
        if name not in known:
            model = reference.load(model_folder(name))
            known[name] = [reference.greedy(model, reference.prompt(n)) for n in LENGTHS]
            assert len({tuple(one) for one in known[name]}) == len(LENGTHS)
        return known[name]

    return tokens


@pytest.mark.parametrize(("ranks", "strategy", "chunk"), CASES)
@pytest.mark.parametrize("name", MODELS)  # a model's cases follow each other, on one worker
def test_tokens_are_those_of_generate(
    model_folder: Built,
    expected: Callable[[str], list[list[int]]],
    name: str,
    ranks: int,
    strategy: str,
    chunk: int,
) -> None:
    outputs = generate(model_folder(name), ranks, strategy, chunk)
    assert [output.outputs[0].token_ids for output in outputs] == expected(name)


@pytest.mark.parametrize("name", MODELS)
def test_final_logits_are_within_a_thousandth(model_folder: Built, name: str) -> None:
    model = reference.load(model_folder(name))
    outputs = generate(model_folder(name), 3, "auto", 100, max_tokens=3, logprobs=-1)
    for output in outputs:
        completion = output.outputs[0]
        assert completion.logprobs is not None
        for position, found in enumerate(completion.logprobs):
            known = [*output.prompt_token_ids, *completion.token_ids[:position]]
            wanted = reference.log_probabilities(model, known)
            got = torch.tensor([found[token].logprob for token in range(len(wanted))])
            torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)


def test_bfloat16_states_merge_in_float32(model_folder: Built) -> None:
    """Spreading a bfloat16 model over ranks changes its logits by no more than rounding does.

    Token equality is not promised in bfloat16: the same sums in another order round differently.
    """
    folder = model_folder("llama")
    prompt = reference.prompt(500)
    wanted = reference.log_probabilities(reference.load(folder, torch.bfloat16), prompt)
    exact = reference.log_probabilities(reference.load(folder), prompt)
    rounding = (wanted - exact).abs().max()
    for ranks in (1, 2, 3):
        with LLM(
            str(folder),
            context_parallel_size=ranks,
            dtype="bfloat16",
            kv_cache_tokens=800,
            min_tokens_per_rank=1,
            distributed_executor_backend="uni",
        ) as llm:
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
            found = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].logprobs
        assert found is not None
        got = torch.tensor([found[0][token].logprob for token in range(len(wanted))])
        assert (got - exact).abs().max() <= 1.5 * rounding
