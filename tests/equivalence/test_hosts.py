"""Tokens are those of `model.generate` wherever the ranks are, and tree spares the network."""

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import reference

from longspan.config import EngineConfig, Strategy
from longspan.cost.kv_shape import KVShape
from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.models import load_spec
from longspan.sampling_params import SamplingParams
from longspan.topology import Topology
from longspan.worker.in_process import InProcessExecutor

LENGTHS = (1, 7, 65, 500)
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def expected(model_folder: Callable[[str], Path]) -> Callable[[int], list[int]]:
    model = reference.load(model_folder("llama"))
    return cache(lambda length: reference.greedy(model, reference.prompt(length), NEW_TOKENS))


def serve(
    folder: Path,
    hosts: Sequence[int],
    strategy: Strategy,
    lengths: Sequence[int],
    kv_cache_tokens: int = 800,
) -> tuple[list[list[int]], Engine]:
    """The output of each prompt, and the engine that made them, on ranks of such hosts."""
    topology = Topology.of_hosts(hosts)
    config = EngineConfig(
        model=str(folder),
        context_parallel_size=topology.num_ranks,
        attention_strategy=strategy,
        max_num_batched_tokens=100,
        kv_cache_tokens=kv_cache_tokens,
        page_size=8,
        min_tokens_per_rank=1,
    )
    spec = load_spec(config)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with contextlib.closing(InProcessExecutor(config, spec, topology)) as executor:
        engine = Engine(config, spec, executor)
        groups: list[Group] = [
            engine.add_request(reference.prompt(length), params) for length in lengths
        ]
        while engine.has_requests:
            engine.step()
    return [group.output().outputs[0].token_ids for group in groups], engine


@pytest.mark.parametrize("hosts", [(1, 1), (2, 2), (1, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "pass_kv", "gather_kv", "pass_q", "tree"])
def test_tokens_over_hosts_are_those_of_generate(
    model_folder: Callable[[str], Path],
    expected: Callable[[int], list[int]],
    strategy: Strategy,
    hosts: Sequence[int],
) -> None:
    outputs, engine = serve(model_folder("llama"), hosts, strategy, LENGTHS)
    assert outputs == [expected(length) for length in LENGTHS]
    for name, traffic in engine.traffic.items():
        assert 0 < traffic.far_bytes <= traffic.bytes or name == "move"
        assert strategy in (name, "auto") or name == "move"


def test_tree_sends_to_another_host_once_where_pass_q_sends_to_each_rank(
    model_folder: Callable[[str], Path],
) -> None:
    """One request, whose keys are on both ranks of both hosts, since none has room for more."""
    sent = {}
    for strategy in ("pass_q", "tree"):
        _, engine = serve(model_folder("llama"), (2, 2), strategy, [500], kv_cache_tokens=160)
        sent[strategy] = engine.traffic[strategy]
    # In each layer each token's query goes to the other host, but for the last one drawn; in
    # the last layer only those after which a token is drawn.
    shape, tokens = KVShape.of(engine.spec), 500 + NEW_TOKENS - 1
    queries = tokens * (shape.num_layers - 1) + NEW_TOKENS
    assert sent["tree"].far_bytes == queries * shape.query_bytes
    assert sent["pass_q"].far_bytes == 2 * sent["tree"].far_bytes
    assert sent["pass_q"].bytes == sent["tree"].bytes
