"""A host that can't be reached any more, while the command line serves over it and another."""

import os
import re
import secrets
import sys
from pathlib import Path
from subprocess import PIPE

import psutil
import zoo
from family import ranks_of
from netns import Hosts

PROGRAM = [sys.executable, "-c", "from longspan.cli import main; main()"]
GENERATE = ("--prompt", "Once upon a time", "--stream", "--max-tokens", "32000", "--ignore-eos")
ENGINE = ("--min-tokens-per-rank", "1", "--kv-cache-tokens", "33000")


def test_all_end_on_both_sides_of_a_cut_link(tmp_path: Path) -> None:
    model = zoo.build_tokenizer(zoo.build("llama", tmp_path))
    options = {
        "env": {**os.environ, "LONGSPAN_SECRET": secrets.token_hex(32)},
        "stdout": PIPE,
        "stderr": PIPE,
        "text": True,
        "errors": "replace",
    }
    with Hosts(2) as hosts:
        nodes = ("--nnodes", "2", "--master-addr", hosts[0].address)
        ranks = ("--context-parallel-size", "2", *ENGINE)
        engine = hosts[0].popen(
            [*PROGRAM, "generate", str(model), *nodes, *ranks, *GENERATE], **options
        )
        node = hosts[1].popen(
            [*PROGRAM, "serve", str(model), *nodes, "--node-rank", "1"], **options
        )
        started = engine.stdout.read(10)
        assert started, engine.stderr.read()
        pids = [rank for each in (engine, node) for rank in ranks_of(each.pid)]
        assert len(pids) == 2
        hosts[1].run("ip", "link", "set", hosts[1].device, "down")
        # Some 7 s of silence are a loss.
        _, errors = engine.communicate(timeout=60)
        _, said = node.communicate(timeout=60)
    lost = r"(node 1 \(.+\) was lost: it was ended or|rank 1 on node 1 \(.+\)) can't be reached"
    assert re.match(rf"error: {lost}", errors.splitlines()[-1]), errors
    assert (engine.returncode, node.returncode) == (1, 0)
    told = [line.removeprefix("node 1: ") for line in said.splitlines()]
    assert told[-2:] == ["lends rank 1 of 2", "node 0 has ended, and so does this node"], said
    assert not any(map(psutil.pid_exists, pids))
