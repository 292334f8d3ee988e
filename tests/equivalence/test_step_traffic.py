"""What the ranks of a running engine send in each step is what the formulas say, to the byte."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import reference

from longspan import SamplingParams
from longspan.config import Dtype, EngineConfig
from longspan.config import Strategy as AttentionStrategy
from longspan.cost.kv_shape import KVShape
from longspan.cost.strategy import Sent, exchanged_bytes, num_calls
from longspan.engine.engine import Engine
from longspan.engine.step import Step
from longspan.models import load_spec
from longspan.plan import RankResult, Strategy, Traffic
from longspan.topology import Topology
from longspan.worker.in_process import InProcessExecutor

PAGE_SIZE = 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hosts", [(3,), (2, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "pass_kv", "gather_kv", "pass_q", "tree"])
def test_every_step_sends_what_its_segments_need(
    model_folder: Callable[[str], Path],
    strategy: AttentionStrategy,
    hosts: Sequence[int],
    dtype: Dtype,
) -> None:
    topology = Topology.of_hosts(hosts)
    config = EngineConfig(
        model=str(model_folder("llama")),
        context_parallel_size=topology.num_ranks,
        attention_strategy=strategy,
        dtype=dtype,
        kv_cache_tokens=600,
        page_size=PAGE_SIZE,
        max_num_batched_tokens=64,
        min_tokens_per_rank=64,
    )
    spec = load_spec(config)
    with contextlib.closing(InProcessExecutor(config, spec, topology)) as executor:
        engine, shape = Engine(config, spec, executor), KVShape.of(spec)
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
                expected = expected_bytes(step, shape, topology)
                assert sent_bytes(step, shape, topology) == expected
                shared += bool(expected)
    assert shared > 5


def sent_bytes(step: Step, shape: KVShape, topology: Topology) -> dict[str, Sent]:
    sent: dict[str, Sent] = {}
    for result in step.results.values():
        for name, traffic in result.traffic.items():
            if name != "move":
                assert_calls(traffic, name, shape.num_layers, list(step.plans), topology)
            near, far = sent.get(name, Sent(0, 0))
            new_near = traffic.bytes - traffic.far_bytes
            sent[name] = Sent(near + new_near, far + traffic.far_bytes)
    return sent


def expected_bytes(step: Step, shape: KVShape, topology: Topology) -> dict[str, Sent]:
    expected: dict[str, Sent] = {}

    def add(name: str, near: int, far: int) -> None:
        known = expected.get(name, Sent(0, 0))
        expected[name] = Sent(known.near + near, known.far + far)

    for chunk in step.chunks:
        segment = chunk.segment
        if segment.strategy != "local":
            in_layers = [segment] * (shape.num_layers - 1) + [segment.in_last_layer()]
            for shards in (one.shards for one in in_layers):
                add(segment.strategy, *exchanged_bytes(segment.strategy, shards, shape, topology))
    for move in (move for plan in step.plans.values() for move in plan.moves):
        half = sum(extent.length for extent in move.sources) * PAGE_SIZE * shape.token_bytes // 2
        crosses = topology.hosts[move.source] != topology.hosts[move.target]
        add("move", half * (not crosses), half * crosses)  # two ranks' plans have each move
    return expected


def assert_calls(
    traffic: Traffic, strategy: Strategy, layers: int, ranks: Sequence[int], topology: Topology
) -> None:
    """Exchanges of one rank in one step are no more than those of all its ranks together.

    pass-KV has a ring for each set of ranks, here that of the long and that of the shorter prompt.
    """
    most = sum(num_calls(strategy, ranks, topology)) * (2 if strategy == "pass_kv" else 1)
    assert 0 < traffic.calls <= layers * most
    assert traffic.messages <= layers * 2 * most * (len(ranks) - 1)
