"""The same equality with real worker processes and real sockets between them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference

from longspan import LLM, SamplingParams
from longspan.topology import Topology
from longspan.worker import mpi

LENGTHS = (1, 2, 65, 700)


@pytest.mark.parametrize(
    ("ranks", "strategy", "backend"),
    [
        (1, "auto", "auto"),
        (2, "auto", "mpi"),
        (2, "pass_kv", "gloo"),
        (3, "gather_kv", "gloo"),
        (3, "tree", "mpi"),
        (4, "pass_kv", "mpi"),
    ],
)
def test_tokens_of_processes_are_those_of_generate(
    model_folder: Callable[[str], Path],
    ranks: int,
    strategy: str,
    backend: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = model_folder("llama")
    if backend == "mpi" and (obstacle := mpi.obstacle(Topology.of_hosts([ranks]))):
        pytest.skip(obstacle)
    model = reference.load(folder)
    caplog.set_level("INFO", "longspan")
    prompts = [reference.prompt(length) for length in LENGTHS]
    with LLM(
        str(folder),
        context_parallel_size=ranks,
        attention_strategy=strategy,
        max_num_batched_tokens=100,
        kv_cache_tokens=1000,
        min_tokens_per_rank=1,
        distributed_executor_backend="mp",
        communication_backend=backend,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        first = llm.generate(prompts, params, use_tqdm=False)
        again = llm.generate(prompts[::-1], params, use_tqdm=False)[::-1]
    assert (f"ranks exchange tensors over {backend}" in caplog.text) == (ranks > 1)
    expected = [reference.greedy(model, prompt, 24) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in first] == expected
    assert [output.outputs[0].token_ids for output in again] == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_texts_that_end_by_themselves_leave_no_page_behind(
    model_folder: Callable[[str], Path], ranks: int
) -> None:
    """Ranks have begun the next token when the engine learns that a text is at its end."""
    folder = model_folder("llama")
    model = reference.load(folder)
    prompts = [reference.prompt(length) for length in LENGTHS]
    texts = [reference.greedy(model, prompt, 24) for prompt in prompts]
    with LLM(
        str(folder),
        context_parallel_size=ranks,
        kv_cache_tokens=1000,
        enable_prefix_caching=False,
        distributed_executor_backend="mp",
    ) as llm:
        for _ in range(2):
            params = [
                SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[text[number + 5]])
                for number, text in enumerate(texts)
            ]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for output, text, asked in zip(outputs, texts, params, strict=True):
                assert asked.stop_token_ids
                end = text.index(asked.stop_token_ids[0]) + 1
                assert output.outputs[0].token_ids == text[:end]
        while llm.engine.has_requests:
            llm.engine.step()
        assert [usage.used for usage in llm.engine.kv_usage] == [0] * ranks
