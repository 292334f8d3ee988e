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
