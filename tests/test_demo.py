"""`longspan demo`: a small run with real ranks, and its verdict when answers or tokens differ."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

import longspan.demo.demo
from longspan.demo.demo import Asked, run
from longspan.errors import ConfigError, InvalidRequestError
from longspan.evaluation.needle import Fact, Needle
from longspan.outputs import CompletionOutput, RequestMetrics, RequestOutput

PROGRAM = [sys.executable, "-c", "from longspan.cli import main; main()"]


def test_a_small_demo_finds_all_facts_and_is_exact() -> None:
    command = [*PROGRAM, "demo", "--tokens", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    for part in (
        "A text of some 3,000 tokens for 3 ranks",
        "room for the KV of 1,264 tokens each: no rank can hold it alone",
        "a few lines of the text",
        "(told at 50 %)",
        "0 of them known from before; first token after",
        "no pool has room for the prompt's 2,9",
        "tokens in a pool of 1,264",
        "5 of 5 questions are answered right.",
        "tokens of the answers are identical.",
    ):
        assert part in text
    assert (
        len(re.findall(r"What is the code of \w+ \d+\? \(told at \d+ %\) \d{6}\. right", text)) == 5
    )
    assert re.search(r"(pass_kv|gather_kv|pass_q) [\d,]+ [\d,]+ [\d,.]+", text), "what was sent"
    assert "\x1b" not in done.stdout + done.stderr


def asked(token_ids: list[int], text: str = "930521.") -> Asked:
    metrics = RequestMetrics(10.0, 10.0, 12.0, 13.5, num_generation_tokens=3)
    completion = CompletionOutput(0, text, token_ids)
    output = RequestOutput("0", None, [1] * 9, [completion], True, metrics=metrics)
    return Asked(Needle(Fact("harbor 417", "930521"), 50.0), output)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([5, 6, 7], "All 6 tokens of the answers are identical."),
        (
            [5, 6, 8],
            "THE TOKENS DIFFER for harbor 417: Longspan [5, 6, 8], transformers [5, 6, 7].",
        ),
    ],
)
def test_the_verdict(monkeypatch: pytest.MonkeyPatch, ours: list[int], verdict: str) -> None:
    alone = [[5, 6, 7], [5, 6, 7]]
    monkeypatch.setattr(longspan.demo.demo, "_generate_alone", lambda _: (alone, 2.0))
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    identical = longspan.demo.demo._compare(console, [asked([5, 6, 7]), asked(ours)])
    assert identical == (ours == [5, 6, 7])
    assert verdict in screen.getvalue()
    assert "It took 2.0 s; all ranks together, on the same cores, 7.0 s." in screen.getvalue()


def test_a_wrong_answer_is_the_end_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [asked([5]), asked([6], "930512.")]
    monkeypatch.setattr(longspan.demo.demo, "_serve", lambda *_: (answers, {}))
    monkeypatch.setattr(longspan.demo.demo, "_show_kv", lambda *_: None)
    assert not run(3, 3000, compare=False)
    del answers[1:]
    assert run(3, 3000, compare=False)


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(2, 1_000), (3, 24_000), (64, 60_000)])
def test_pools_are_too_small_alone_and_large_enough_together(
    num_ranks: int, num_tokens: int
) -> None:
    capacity = longspan.demo.demo._capacity(num_ranks, num_tokens)
    assert capacity < num_tokens - 64
    assert capacity * num_ranks >= num_tokens


def test_lengths_outside_their_limits_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="tokens=900 must be at least 960"):
        run(3, 900)
    with pytest.raises(ConfigError, match="max_model_len=600000 is above"):
        run(3, 600_000)
