"""What several nodes promise: exact tokens, and the end of one is the end of all, in one line."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import cluster
import httpx
import pytest
import reference
from cluster import NodeProgram, wait_until_gone
from safetensors.torch import load_file, save_file

import longspan.config
from longspan import LLM, SamplingParams
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, RankFailedError
from longspan.models import load_spec
from longspan.topology import Topology
from longspan.worker.processes import ProcessExecutor

Launch = Callable[..., NodeProgram]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
OPTIONS = {"kv_cache_tokens": 2500, "min_tokens_per_rank": 1}


def start(model: Path, port: int, ranks: int, nnodes: int, **options: object) -> LLM:
    return LLM(
        str(model),
        context_parallel_size=ranks,
        nnodes=nnodes,
        master_port=port,
        **OPTIONS | options,
    )


def executor(llm: LLM) -> ProcessExecutor:
    assert isinstance(llm.engine.executor, ProcessExecutor)
    return llm.engine.executor


def test_three_uneven_nodes(model: Path, launch: Launch, other_model: Path) -> None:
    """Who may not join is told; the others compute the tokens of `generate`; Ctrl-C ends all."""
    port = cluster.free_port()
    with ThreadPoolExecutor(1) as thread:
        options = {"context_parallel_size_local": 1, "max_num_batched_tokens": 100, "page_size": 8}
        starting = thread.submit(start, model, port, 4, 3, **options)
        stranger = launch(1, port, "--nnodes", "3", secret="another one that is long enough")
        misled = launch(2, port, "--nnodes", "3", model=other_model)
        assert (stranger.end(), misled.end()) == (1, 1)
        assert stranger.lines[-1] == (
            f"error: can't join node 0 at 127.0.0.1:{port}: it refuses this node: its "
            "LONGSPAN_SECRET is not node 0's"
        )
        assert misled.lines[-1] == (
            f"error: node 0 refuses this node: the config.json of its model='{other_model}' is not "
            "that of node 0"
        )
        nodes = [
            launch(rank, port, "--nnodes", "3", "--context-parallel-size-local", str(3 - rank))
            for rank in (1, 2)
        ]
        llm = starting.result(cluster.PATIENCE_S)
    assert executor(llm).topology == Topology((0, 1, 1, 2), (0, 0, 0, 0))
    pids = executor(llm).pids + [pid for node in nodes for pid in node.rank_pids()]
    assert len(pids) == 4
    check_every_strategy(llm, model)

    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate({"prompt_token_ids": [7] * 3000}, LONG, use_tqdm=False)
    interrupt.join()
    for number, node in enumerate(nodes, 1):
        assert node.end() == 0
        assert node.lines[-2].startswith(f"node {number}: lends rank")
        assert node.lines[-1] == f"node {number}: node 0 has ended, and so does this node"
        assert not list(node.folder.iterdir())
    wait_until_gone(pids)


def check_every_strategy(llm: LLM, model: Path) -> None:
    """One after the other, on the same ranks."""
    prompts = [reference.prompt(length) for length in (1, 2, 65, 700)]
    plain = reference.load(model)
    expected = [reference.greedy(plain, prompt, 24) for prompt in prompts]
    for strategy in get_args(longspan.config.Strategy):
        config = dataclasses.replace(llm.config, attention_strategy=strategy)
        llm.engine = Engine(config, load_spec(config), executor(llm), None)
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected, strategy
        assert len(llm.engine.traffic) >= 1, "ranks of other nodes have had a part in it"


def test_another_copy_s_weights_are_noticed(model: Path, launch: Launch, tmp_path: Path) -> None:
    """With the same config.json, so that only who has loaded it can tell."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((model / "config.json").read_bytes())
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    port = cluster.free_port()
    node = launch(1, port, "--nnodes", "2", model=other)
    with pytest.raises(
        ConfigError, match=r"that rank 1 on node 1 \(.*\) has loaded is not that of"
    ):
        start(model, port, 2, 2)
    assert node.end() == 0


def test_node_0_serves_with_the_ranks_of_another(model: Path, launch: Launch) -> None:
    port = cluster.free_port()
    nodes = ["--nnodes", "2", "--context-parallel-size", "2", "--kv-cache-tokens", "800"]
    server, node = launch(0, port, *nodes, "--port", "0"), launch(1, port, "--nnodes", "2")
    server.wait_for("listening at")
    url = server.lines[-1].split()[-1]
    prompt = reference.prompt(1200)
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 8
    likeliest = reference.log_probabilities(reference.load(model), prompt).max().item()
    first = answer["choices"][0]["logprobs"]["token_logprobs"][0]
    assert first == pytest.approx(likeliest, abs=1e-3)
    server.send(signal.SIGTERM)
    assert (server.end(), node.end()) == (0, 0)
    assert "degree=2 holders=2" in server.lines[-1]


def kill_a_rank(node: NodeProgram) -> None:
    [pid] = node.rank_pids()
    os.kill(pid, signal.SIGKILL)


ENDS = {
    "a killed rank": (
        kill_a_rank,
        r"rank 1 on node 1 \(.+\) \(pid \d+\) was killed by SIGKILL",
        r"error: rank 1 on node 1 \(.+\) \(pid \d+\) was killed by SIGKILL",
        1,
    ),
    "a killed node": (
        lambda node: node.send(signal.SIGKILL),
        r"node 1 \(.+\) was lost: it was ended or can't be reached",
        "node 1: lends rank 1 of 2",
        -signal.SIGKILL,
    ),
    "an interrupted node": (
        lambda node: node.send(signal.SIGINT),
        r"node 1 \(.+\) was interrupted",
        "interrupted",
        130,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_one_is_the_end_of_all(model: Path, launch: Launch, end: str) -> None:
    act, told_engine, told_node, status = ENDS[end]
    port = cluster.free_port()
    node = launch(1, port, "--nnodes", "2")
    llm = start(model, port, 2, 2)
    pids = executor(llm).pids + node.rank_pids()
    assert len(pids) == 2
    llm.engine.add_request([7] * 3000, LONG)
    llm.engine.step()
    act(node)
    begun = time.monotonic()
    with pytest.raises(RankFailedError, match=told_engine) as caught:
        llm.generate({"prompt_token_ids": [7] * 3000}, LONG, use_tqdm=False)
    assert "\n" not in str(caught.value)
    wait_until_gone(pids)
    assert node.end() == status
    assert time.monotonic() - begun < 20
    assert re.fullmatch(told_node, node.lines[-1])
    assert not list(node.folder.iterdir())


ENGINE = """
from longspan import LLM, SamplingParams
llm = LLM({model!r}, context_parallel_size=2, nnodes=2, master_port={port}, **{options})
print(*llm.engine.executor.pids, flush=True)
params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
llm.generate({{"prompt_token_ids": [7] * 3000}}, params)
"""


def test_a_killed_engine_is_the_end_of_all(model: Path, launch: Launch) -> None:
    port = cluster.free_port()
    node = launch(1, port, "--nnodes", "2")
    script = ENGINE.format(model=str(model), port=port, options=OPTIONS)
    engine = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True)
    assert engine.stdout
    pids = [*map(int, engine.stdout.readline().split()), *node.rank_pids()]
    assert len(pids) == 2
    time.sleep(0.5)
    engine.kill()
    engine.communicate(timeout=20)
    wait_until_gone(pids)
    assert node.end() == 0
    assert node.lines[-1] == "node 1: node 0 has ended, and so does this node"
    assert not list(node.folder.iterdir())


def test_nodes_that_wait_can_be_ended(launch: Launch) -> None:
    port = cluster.free_port()
    nodes = [launch(rank, port, "--nnodes", "3") for rank in (1, 2)]
    for node, sent, status in zip(nodes, (signal.SIGINT, signal.SIGTERM), (130, 143), strict=True):
        node.wait_for(f"waiting for node 0 at 127.0.0.1:{port}")
        node.send(sent)
        assert node.end() == status
        assert len(node.lines) == 2
