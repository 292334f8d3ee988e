"""A context that decodes over several ranks' pools draws the tokens of one device all the way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference

from longspan import LLM, SamplingParams
from longspan.engine.completion import Group


def begun_on_the_smallest_pool(llm: LLM, prompt: list[int], new_tokens: int) -> Group:
    """Two other prompts arrive just before, and take the ranks with the larger pools."""
    for _ in range(2):
        llm.engine.add_request(prompt, SamplingParams(max_tokens=1))
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    return llm.engine.add_request(prompt, params)


@pytest.mark.parametrize(
    ("backend", "pools", "new_tokens"),
    [("uni", (1000, 2000, 2400), 5000), ("mp", (100, 200, 240), 450)],
)
def test_a_request_that_decodes_over_three_ranks(
    model_folder: Callable[[str], Path], backend: str, pools: tuple[int, ...], new_tokens: int
) -> None:
    folder, prompt = model_folder("llama"), reference.prompt(40)
    homes: list[int] = []
    with LLM(
        str(folder),
        context_parallel_size=len(pools),
        kv_cache_tokens=pools,
        enable_prefix_caching=False,
        distributed_executor_backend=backend,
    ) as llm:
        group = begun_on_the_smallest_pool(llm, prompt, new_tokens)
        [request] = group.requests
        while llm.engine.has_requests:
            llm.engine.step()
            if request.home is not None and homes[-1:] != [request.home]:
                homes.append(request.home)
        output = group.output()
        assert all(usage.used == 0 for usage in llm.engine.kv_usage)
    assert homes[0] == 0
    assert set(homes) == {0, 1, 2}
    assert output.metrics is not None
    assert sum(output.metrics.kv_tokens) == 40 + new_tokens - 1
    assert output.outputs[0].token_ids == reference.greedy(
        reference.load(folder), prompt, new_tokens
    )
