"""Whatever strategy takes the keys or queries of a request from host to host, nothing changes.

Two ranks on one host and one on another, with a link of 1 Gbit/s between them. Attention on every
rank is that of one device; tokens of an engine whose ranks are on both are those of
`model.generate`.
"""

import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
import reference
import zoo
from fleet import SHARED, Request, Shape, assert_expected, attend
from netns import Hosts
from ranks import Ranks

from longspan.attention.state import AttentionState
from longspan.parallel.transport import Transport
from longspan.plan import Run, Strategy

SIZES = (2, 1)
PROMPT = (
    (Run(0, 11), Run(50, 10)),
    (Run(11, 9), Run(40, 10)),
    (Run(20, 20),),
)
SHORT = ((Run(0, 6),), (Run(6, 4),))
TOKEN = (Run(0, 1),)

REQUESTS = {
    "a prompt over all ranks": [Request((0, 1, 2), (40, 0, 25), PROMPT, PROMPT)],
    "a token whose keys are on all ranks": [
        Request((0, 1, 2), (70, 31, 64), ((), (), TOKEN), ((), (), TOKEN))
    ],
    "several requests at once": [
        Request((0, 2), (5, 80), (TOKEN, ()), (TOKEN, ())),
        Request((1, 2), (0, 33), SHORT, SHORT),
        Request((0, 1), (16, 16), ((), TOKEN), ((), TOKEN)),
    ],
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(len(SIZES), gbit=1) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def ranks(hosts: Hosts) -> Iterator[Ranks]:
    with Ranks(SIZES, hosts) as ranks:
        yield ranks


def attend_to(
    transport: Transport, requests: list[Request], strategy: Strategy
) -> list[AttentionState]:
    """This rank's states of the requests."""
    return attend(requests, strategy, transport, Shape())


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("strategy", SHARED)
def test_attention_over_hosts_is_that_of_one_device(
    ranks: Ranks, strategy: Strategy, name: str
) -> None:
    by_rank = ranks.run(attend_to, REQUESTS[name], strategy)
    for request, states in zip(REQUESTS[name], zip(*by_rank, strict=True), strict=True):
        assert_expected(request, states, Shape())


NODE_0 = """
import dataclasses, json, sys
from longspan import LLM, SamplingParams
from longspan.engine.engine import Engine

folder, address, strategies, prompts, new_tokens = json.loads(sys.argv[1])
params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
with LLM(
    folder,
    nnodes=2,
    master_addr=address,
    context_parallel_size=3,
    context_parallel_size_local=2,
    max_num_batched_tokens=100,
    kv_cache_tokens=1000,
    min_tokens_per_rank=1,
) as llm:
    spec, executor = llm.engine.spec, llm.engine.executor
    for strategy in strategies:  # the ranks are the same, which do what they are told
        config = dataclasses.replace(llm.config, attention_strategy=strategy)
        llm.engine = Engine(config, spec, executor)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        sent = {name: traffic.far_bytes for name, traffic in llm.engine.traffic.items()}
        print(json.dumps([[output.outputs[0].token_ids for output in outputs], sent]))
"""

PROGRAM = [sys.executable, "-c", "from longspan.cli import main; main()"]
LENGTHS = (1, 65, 700)
NEW_TOKENS = 24


def test_tokens_of_an_engine_over_hosts_are_those_of_generate(tmp_path: Path, hosts: Hosts) -> None:
    folder = zoo.build("llama", tmp_path)
    prompts = [reference.prompt(length) for length in LENGTHS]
    options = {
        "env": {**os.environ, "LONGSPAN_SECRET": secrets.token_hex(32)},
        "stdout": PIPE,
        "stderr": PIPE,
        "text": True,
    }
    strategies = ("auto", *SHARED)
    task = json.dumps([str(folder), hosts[0].address, strategies, prompts, NEW_TOKENS])
    engine = hosts[0].popen([sys.executable, "-c", NODE_0, task], **options)
    serve = f"serve {folder} --nnodes 2 --node-rank 1 --master-addr {hosts[0].address}"
    node = hosts[1].popen(
        [*PROGRAM, *serve.split(), "--context-parallel-size-local", "1"], **options
    )
    printed, errors = engine.communicate()
    if engine.returncode:
        node.kill()  # it would wait for its engine
    _, node_errors = node.communicate()
    assert (engine.returncode, node.returncode) == (0, 0), errors + node_errors

    model = reference.load(folder)
    expected = [reference.greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    for strategy, line in zip(strategies, printed.splitlines(), strict=True):
        tokens, far_bytes = json.loads(line)
        assert tokens == expected, strategy
        assert strategy == "auto" or far_bytes[strategy] > 0
