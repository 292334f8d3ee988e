"""Greedy tokens are those of `model.generate` whatever comes and goes: random traces, real model.

Requests of 1 to 4,000 tokens that begin alike come over time, with priorities, with n = 2, some
aborted, to tiny unequal pools, so that they grow from rank to rank, take pages from each other and
from the prefix cache, and are gathered where the links are said to be fast.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from longspan import LLM, SamplingParams
from longspan.cost.rates import CPU_THREAD, LinkRates
from longspan.engine.completion import Group

MORE = os.environ.get("LONGSPAN_TRACES")
"""So many new random traces for each number of ranks, instead of the same few in each run."""

explore = settings(
    max_examples=int(MORE or 12),
    derandomize=not MORE,
    suppress_health_check=[HealthCheck.too_slow],
)

PAGE_SIZE = 16
NEW_TOKENS = 48
LONGEST = 4000

FAST_LINKS = replace(CPU_THREAD, links={"host": LinkRates(110e-6, 1e13, overlap=0)})
"""Gathering pays at once, and so does spreading a prompt of a few hundred tokens."""

SLOW = replace(CPU_THREAD, linear_flops=2e8, attention_flops=2e8)
"""Steps hold few tokens, so that prompts take many."""


@dataclass(frozen=True)
class Arrival:
    after: int
    """Steps since the last one came."""
    length: int
    text: int
    """Which of two texts it begins."""
    new_tokens: int
    n: int
    priority: int
    aborted_after: int | None


@dataclass(frozen=True)
class Trace:
    options: dict[str, Any]
    rates: Any
    arrivals: list[Arrival]


lengths = st.integers(1, 40) | st.integers(1, 600) | st.integers(600, LONGEST)

arrivals = st.builds(
    Arrival,
    after=st.integers(0, 12),
    length=lengths,
    text=st.integers(0, 1),
    new_tokens=st.integers(1, NEW_TOKENS),
    n=st.sampled_from((1, 1, 1, 2)),
    priority=st.sampled_from((0, 0, 1, -1)),
    aborted_after=st.none() | st.none() | st.none() | st.integers(0, 30),
)


@st.composite
def traces(draw: st.DrawFn, ranks: int) -> Trace:
    coming = draw(st.lists(arrivals, min_size=2, max_size=7))
    need = max(arrival.length + arrival.new_tokens for arrival in coming) // PAGE_SIZE + 2
    parts = draw(st.lists(st.integers(1, 4), min_size=ranks, max_size=ranks))
    pages = [need * part // sum(parts) + draw(st.integers(1, 4)) for part in parts]
    options = {
        "context_parallel_size": ranks,
        "kv_cache_tokens": tuple(PAGE_SIZE * each for each in pages),
        "max_num_batched_tokens": draw(st.sampled_from((24, 160, 2048))),
        "max_step_time": draw(st.sampled_from((None, 0.05))),
        "min_tokens_per_rank": draw(st.sampled_from((None, 16, 300))),
        "attention_strategy": draw(st.sampled_from(("auto", "auto", "pass_kv", "pass_q", "tree"))),
    }
    return Trace(options, draw(st.sampled_from((CPU_THREAD, FAST_LINKS, SLOW))), coming)


class Expected:
    """What `generate` says, each prompt asked for once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.texts = [reference.prompt(LONGEST, seed) for seed in range(2)]
        self._known: dict[tuple[int, int], list[int]] = {}

    def prompt(self, arrival: Arrival) -> list[int]:
        return self.texts[arrival.text][: arrival.length]

    def tokens(self, arrival: Arrival) -> list[int]:
        key = (arrival.text, arrival.length)
        if key not in self._known:
            prompt = self.prompt(arrival)
            self._known[key] = reference.greedy(self.model, prompt, NEW_TOKENS)
        return self._known[key][: arrival.new_tokens]


def serve(folder: Path, trace: Trace, expected: Expected) -> tuple[LLM, list[Group]]:
    groups: list[Group] = []
    with (
        patch("longspan.worker.in_process.rates_of", lambda device, dtype: trace.rates),
        LLM(
            str(folder),
            page_size=PAGE_SIZE,
            dtype="float32",
            distributed_executor_backend="uni",
            **trace.options,
        ) as llm,
    ):
        engine = llm.engine
        ends: dict[int, list[str]] = {}
        step = 0

        def advance() -> None:
            nonlocal step
            engine.step()
            step += 1
            for request_id in ends.pop(step, ()):
                engine.abort(request_id)

        for arrival in trace.arrivals:
            for _ in range(arrival.after):
                advance()
            # Greedy too: for several sequences vLLM's rules ask for sampling, here of one token.
            params = SamplingParams(
                temperature=float(arrival.n > 1),
                top_k=1,
                max_tokens=arrival.new_tokens,
                n=arrival.n,
                ignore_eos=True,
            )
            group = engine.add_request(expected.prompt(arrival), params, priority=arrival.priority)
            groups.append(group)
            if arrival.aborted_after is not None:
                ends.setdefault(step + arrival.aborted_after + 1, []).append(group.request_id)
        while engine.has_requests:
            advance()
        assert [usage.used for usage in engine.kv_usage] == [0] * engine.ledger.num_ranks
    return llm, groups


@pytest.fixture(scope="module")
def expected(model_folder: Callable[[str], Path]) -> Expected:
    return Expected(reference.load(model_folder("llama")))


@pytest.mark.long
def test_tokens_of_random_traces_are_those_of_generate(
    model_folder: Callable[[str], Path], expected: Expected
) -> None:
    seen: Counter[str] = Counter()

    def check(trace: Trace) -> None:
        llm, groups = serve(model_folder("llama"), trace, expected)
        for arrival, group in zip(trace.arrivals, groups, strict=True):
            wanted = expected.tokens(arrival)
            for completion in group.output().outputs:
                if completion.finish_reason == "abort":
                    assert completion.token_ids == wanted[: len(completion.token_ids)]
                else:
                    assert completion.token_ids == wanted
                seen[f"ends by {completion.finish_reason}"] += 1
            seen["prefix hits"] += group.requests[0].num_cached_tokens > 0
        requests = [request for group in groups for request in group.requests]
        holders = [
            sum(tokens > 0 for tokens in request.metrics.kv_tokens or ()) for request in requests
        ]
        seen["preemptions"] += sum(request.metrics.num_preemptions for request in requests)
        seen["several holders"] += sum(count > 1 for count in holders)
        seen["gathered"] += "move" in llm.engine.traffic

    for ranks in (1, 2, 3, 4):
        explore(given(traces(ranks))(check))()
    print(dict(seen))
    for what in ("ends by abort", "ends by length", "prefix hits", "preemptions", "gathered"):
        assert seen[what], f"nothing shown: {what}"
    assert seen["several holders"]
