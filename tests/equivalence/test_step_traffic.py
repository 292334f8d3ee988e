"""What the ranks of a running engine send in each step is what the formulas say, to the byte."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference

from longspan import LLM, SamplingParams
from longspan.cost.strategy import KVShape, exchanged_bytes
from longspan.engine.step import Step
from longspan.plan import RankResult, Traffic

PAGE_SIZE = 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["auto", "pass_kv", "gather_kv", "pass_q"])
def test_every_step_sends_what_its_segments_need(
    model_folder: Callable[[str], Path], strategy: str, dtype: str
) -> None:
    with LLM(
        str(model_folder("llama")),
        context_parallel_size=3,
        attention_strategy=strategy,
        dtype=dtype,
        kv_cache_tokens=600,
        page_size=PAGE_SIZE,
        max_num_batched_tokens=64,
        min_tokens_per_rank=64,
        distributed_executor_backend="uni",
    ) as llm:
        engine, shape = llm.engine, KVShape.of(llm.engine.spec)
        for length in (500, 130, 20):
            params = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
            engine.add_request(reference.prompt(length), params)
        shared = 0
        while engine.has_requests:
            steps = engine.scheduler.schedule()
            results: dict[int, RankResult] = {}
            for step in steps:
                engine.executor.start(step.plans)
                while not step.plans.keys() <= results.keys():
                    results |= engine.executor.wait()
            engine.scheduler.update(results)
            for step in steps:
                expected = expected_bytes(step, shape)
                assert sent_bytes(step, shape) == expected
                shared += bool(expected)
    assert shared > 5


def sent_bytes(step: Step, shape: KVShape) -> dict[str, int]:
    sent: dict[str, int] = {}
    for result in step.results.values():
        for name, traffic in result.traffic.items():
            if name != "move":
                assert_calls(traffic, name, shape.num_layers, len(step.plans))
            sent[name] = sent.get(name, 0) + traffic.bytes
    return sent


def expected_bytes(step: Step, shape: KVShape) -> dict[str, int]:
    expected: dict[str, int] = {}
    for chunk in step.chunks:
        segment = chunk.segment
        if segment.strategy != "local":
            each_layer = exchanged_bytes(segment.strategy, segment.shards, shape)
            expected.setdefault(segment.strategy, 0)
            expected[segment.strategy] += shape.num_layers * each_layer
    moved = sum(len(gathering.places) for gathering in step.gatherings)
    if moved:
        expected["move"] = moved * PAGE_SIZE * shape.token_bytes
    return expected


def assert_calls(traffic: Traffic, strategy: str, layers: int, ranks: int) -> None:
    """Exchanges of one rank in one step: R - 1 hops of a ring, 1 gather, or queries and states.

    pass-KV has a ring for each set of ranks, here that of the long and that of the shorter prompt.
    """
    most = {"pass_kv": 2 * (ranks - 1), "gather_kv": 1, "pass_q": 2}[strategy]
    assert 0 < traffic.calls <= layers * most
    assert traffic.messages <= layers * 2 * most * (ranks - 1)
