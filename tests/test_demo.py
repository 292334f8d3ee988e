"""`longspan demo`: a small run with real ranks, and its verdict when tokens differ."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

import longspan.demo.demo
from longspan.demo.demo import run
from longspan.errors import ConfigError, InvalidRequestError
from longspan.outputs import CompletionOutput, RequestMetrics, RequestOutput

PROGRAM = [sys.executable, "-c", "from longspan.cli import main; main()"]


def test_a_small_demo_is_exact() -> None:
    command = [*PROGRAM, "demo", "--tokens", "3000", "--max-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for part in (
        "A prompt of 3,000 tokens for 3 ranks",
        "room for the KV of 1,264 tokens each: no rank can hold it alone",
        "the end of the prompt",
        "time to first token",
        "no pool has room for the prompt's 3,000 tokens",
        "tokens in a pool of 1,264",
        "All 8 tokens are identical.",
    ):
        assert part in text
    assert re.search(r"(pass_kv|gather_kv|pass_q) [\d,]+ [\d,]+ [\d,.]+", text), "what was sent"
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([5, 6, 7], "All 3 tokens are identical."),
        ([5, 6, 8], "THE TOKENS DIFFER from output token 2 on: Longspan 8, transformers 7."),
        ([4, 6, 8], "THE TOKENS DIFFER from output token 0 on: Longspan 4, transformers 5."),
    ],
)
def test_the_verdict(monkeypatch: pytest.MonkeyPatch, ours: list[int], verdict: str) -> None:
    monkeypatch.setattr(longspan.demo.demo, "_generate_alone", lambda *_: ([5, 6, 7], 2.0))
    metrics = RequestMetrics(10.0, 10.0, 12.0, 13.5, num_generation_tokens=3)
    output = RequestOutput(
        "0", None, [1] * 9, [CompletionOutput(0, "", ours)], True, metrics=metrics
    )
    screen = io.StringIO()
    identical = longspan.demo.demo._compare(Console(file=screen, width=200), output)
    assert identical == (ours == [5, 6, 7])
    assert verdict in screen.getvalue()
    assert "It took 2.0 s; all ranks together, on the same cores, 3.5 s." in screen.getvalue()


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(2, 1_000), (3, 24_000), (64, 60_000)])
def test_pools_are_too_small_alone_and_large_enough_together(
    num_ranks: int, num_tokens: int
) -> None:
    for max_tokens in (1, 48, num_tokens // 2):
        capacity = longspan.demo.demo._capacity(num_ranks, num_tokens, max_tokens)
        assert capacity < num_tokens
        assert capacity * num_ranks >= num_tokens + max_tokens


def test_lengths_outside_their_limits_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens=51 must be at most half of"):
        run(2, 100, 51)
    with pytest.raises(InvalidRequestError, match="tokens=12 must be more"):
        run(2, 12, 1)
    with pytest.raises(ConfigError, match="max_model_len=70048 is above"):
        run(3, 70_000, 48)
