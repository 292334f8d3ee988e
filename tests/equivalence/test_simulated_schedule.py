"""Simulation equals serving: what real ranks were told, step by step, is what virtual ones are.

Ranks with a real model serve requests that come, end by themselves, are aborted and preempted,
while a recorder writes down what happened when. Then another engine gets the same events, with
ranks that compute nothing and are done when the real ones were. Its plans must be the same.
"""

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from math import inf, nextafter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference

from longspan import SamplingParams
from longspan.config import EngineConfig
from longspan.cost.model import CostModel
from longspan.cost.virtual import VirtualExecutor
from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.engine.executor import Executor
from longspan.models import ModelSpec, load_spec
from longspan.plan import RankPlan, RankResult, Run, Sampling
from longspan.worker.in_process import InProcessExecutor
from longspan.worker.processes import ProcessExecutor

PAGE_SIZE = 8


class Admission(NamedTuple):
    request_id: str
    cached_pages: int
    num_preemptions: int


class Chunk(NamedTuple):
    request_id: str
    strategy: str
    home: int
    runs: dict[int, tuple[Run, ...]]
    """Of each holder, also of those that compute nothing."""


class Entry(NamedTuple):
    """What was decided before one wait."""

    admissions: list[Admission]
    chunks: list[Chunk]
    moves: list[object]
    plans: list[Mapping[int, RankPlan]]


class Event(NamedTuple):
    """What an engine was given: a request, an abort, or results of `ranks`, maybe of none."""

    time: float
    kind: str
    ranks: tuple[int, ...] = ()
    request_id: str = ""
    prompt: tuple[int, ...] = ()
    params: SamplingParams | None = None
    priority: int = 0


class Recorder:
    """An executor between an engine and another executor, which writes down all that passes.

    Results that come together come in the order of ranks, and no two waits end at the same time.
    """

    def __init__(self, executor: Executor, clock: Callable[[], float]) -> None:
        self.executor = executor
        self.clock = clock
        self.num_pages = executor.num_pages
        self.rates = executor.rates
        self.topology = executor.topology
        self.joins = executor.joins
        self.queues = executor.queues
        self.events: list[Event] = []
        self.entries: list[Entry] = []
        self.groups: dict[str, Group] = {}
        self._engine: Engine
        self._plans: list[Mapping[int, RankPlan]] = []
        self._admitted: set[tuple[str, int]] = set()
        self._time = -inf

    def engine(self, config: EngineConfig, spec: ModelSpec) -> Engine:
        self._engine = Engine(config, spec, self, clock=self.clock)
        return self._engine

    def add(self, request_id: str, prompt: tuple[int, ...], **more: Any) -> None:
        event = Event(self.clock(), "add", request_id=request_id, prompt=prompt, **more)
        self.events.append(event)
        self.groups[request_id] = self._engine.add_request(
            prompt, event.params, request_id=request_id, priority=event.priority
        )

    def abort(self, request_id: str) -> None:
        self.events.append(Event(self.clock(), "abort", request_id=request_id))
        self._engine.abort(request_id)

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        self._plans.append(plans)
        self.executor.start(plans)

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        self.entries.append(self._entry())
        results = dict(sorted(self.executor.wait(timeout).items()))
        self._time = max(self.clock(), nextafter(self._time, inf))
        self.events.append(Event(self._time, "step", tuple(results)))
        return results

    def close(self) -> None:
        self.executor.close()

    def _entry(self) -> Entry:
        plans, self._plans = self._plans, []
        running = {request.request_id: request for request in self._engine.scheduler.running}
        admissions = []
        for request in running.values():
            admission = request.request_id, request.metrics.num_preemptions
            if admission not in self._admitted:
                self._admitted.add(admission)
                cached = request.num_computed // PAGE_SIZE
                admissions.append(Admission(request.request_id, cached, admission[1]))
        parts = [part for step in plans for plan in step.values() for part in plan.parts]
        segments = {part.segment.request_id: part.segment for part in parts}
        chunks = [
            Chunk(
                name,
                segment.strategy,
                running[name].home,
                {shard.rank: shard.queries for shard in segment.shards},
            )
            for name, segment in segments.items()
        ]
        moves = [move for step in plans for plan in step.values() for move in plan.moves]
        return Entry(admissions, chunks, moves, plans)


def serve(recorder: Recorder, engine: Engine, seed: int) -> None:
    """Requests of all kinds that come within about a second, and aborts of some of them."""
    rng = random.Random(seed)
    begin = [reference.prompt(96, seed) for seed in range(3)]
    coming: deque[tuple[float, str, dict[str, Any]]] = deque()
    # Two at a time: first each on a rank of its own, while there is nobody else, then over all.
    for name, at, length in (("a", 0.0, 9), ("b", 0.0, 9), ("c", 0.05, 250), ("d", 0.05, 250)):
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        arrival = {"prompt": tuple(reference.prompt(length, ord(name))), "params": params}
        coming.append((at, name, arrival))
    for number in range(36):
        grows = number < 10  # by more than all pools have, from almost nothing
        length = rng.choice((5, 17, 40, 60, 110, 230)) if number % 8 else 330
        own = reference.prompt(20 if grows else length, 100 + number)
        params = SamplingParams(
            n=2 if number % 10 == 3 else 1,
            max_tokens=180 if grows else rng.choice((3, 30, 90)),
            ignore_eos=True,
            seed=number,
            # Of the 512 tokens so many end a text.
            stop_token_ids=() if grows else tuple(range(7, 512, 40)),
        )
        prompt = begin[number % 3] + own if number % 2 and not grows else own
        arrival = {"prompt": tuple(prompt), "params": params, "priority": int(number % 7 == 6)}
        coming.append((0.1 + (0.002 if grows else 0.03) * number, f"r{number}", arrival))
    aborts = deque([(0.4, "r8"), (0.6, "r11"), (1.0, "r24"), (1.3, "r35")])
    begun = time.monotonic()
    while coming or aborts or engine.has_requests:
        now = time.monotonic() - begun
        while coming and coming[0][0] <= now:
            _, name, arrival = coming.popleft()
            recorder.add(name, **arrival)
        while aborts and aborts[0][0] <= now:
            recorder.abort(aborts.popleft()[1])
        times = [queue[0][0] for queue in (coming, aborts) if queue]
        timeout = max(min(times) - now, 0.0) if times else None
        if engine.has_requests:
            engine.step(timeout)
        elif timeout is not None:
            time.sleep(timeout)


def replay(
    recorder: Recorder, config: EngineConfig, spec: ModelSpec, num_pages: tuple[int, ...]
) -> Recorder:
    """The same events at the same times, for ranks that compute nothing."""
    tokens = {
        request.request_id: (len(request.prompt_token_ids), request.output_token_ids)
        for group in recorder.groups.values()
        for request in group.requests
    }
    ends: dict[int, deque[float]] = defaultdict(deque)
    for event in recorder.events:
        for rank in event.ranks:
            ends[rank].append(event.time)

    def token_of(sampling: Sampling) -> int:
        prompt, drawn = tokens[sampling.request_id]
        place = sampling.position - prompt
        return drawn[place] if place < len(drawn) else 1  # drawn for what had been aborted

    def done_at(now: float, plans: Mapping[int, RankPlan]) -> dict[int, float]:
        return {rank: ends[rank].popleft() if ends[rank] else now + 0.01 for rank in plans}

    executor = VirtualExecutor(
        num_pages,
        PAGE_SIZE,
        CostModel.of(spec, recorder.rates, recorder.topology, joins=recorder.joins),
        token_of=token_of,
        done_at=done_at,
        queues=recorder.queues,
    )
    executor.time = recorder.events[0].time
    copy = Recorder(executor, executor.clock)
    engine = copy.engine(config, spec)
    for event in recorder.events:
        if event.kind == "add":
            more = {"params": event.params, "priority": event.priority}
            copy.add(event.request_id, event.prompt, **more)
        elif event.kind == "abort":
            copy.abort(event.request_id)
        else:
            # Where nobody was done in time, nobody must be; else the next one is, whenever.
            engine.step(None if event.ranks else event.time - executor.time)
    return copy


def difference(served: Recorder, simulated: Recorder) -> str:
    """The first step in which they differ, and in what; empty if they don't."""
    for number, (one, other) in enumerate(zip(served.entries, simulated.entries, strict=True)):
        for name, wanted, found in zip(Entry._fields, one, other, strict=True):
            if wanted != found:
                return f"step {number}, {name}: served {wanted}, simulated {found}"
    return ""


def facts(recorder: Recorder) -> dict[str, int]:
    """What has happened in a run, so that none of it is missing."""
    homes: dict[str, int] = {}
    seen: dict[str, int] = defaultdict(int)
    for entry in recorder.entries:
        prefills = 0
        for chunk in entry.chunks:
            computing = [rank for rank, runs in chunk.runs.items() if runs]
            prefills += len(computing) > 1
            decoding = sum(run.length for runs in chunk.runs.values() for run in runs) == 1
            before = homes.get(chunk.request_id)
            seen["growth"] += decoding and before is not None and before != chunk.home
            homes[chunk.request_id] = chunk.home
        seen["long prefills together"] += prefills > 1
        seen["steps apart"] += len(entry.plans) > 1
        seen["moves"] += len(entry.moves)
        seen["prefix hits"] += sum(one.cached_pages > 0 for one in entry.admissions)
    requests = [request for group in recorder.groups.values() for request in group.requests]
    for request in requests:
        seen["preemptions"] += request.metrics.num_preemptions
        seen[f"ended by {request.finish_reason}"] += 1
    seen["waits for nothing"] = sum(
        event.kind == "step" and not event.ranks for event in recorder.events
    )
    return seen


@pytest.mark.parametrize(
    ("launch", "num_pages"),
    [
        pytest.param(InProcessExecutor, (48, 30, 60), id="3 threads"),
        pytest.param(InProcessExecutor, (60, 60), id="2 threads"),
        pytest.param(ProcessExecutor, (60, 60), id="2 processes"),
    ],
)
def test_a_simulated_schedule_is_the_served_one(
    model_folder: Callable[[str], Path],
    launch: Callable[[EngineConfig, ModelSpec], Executor],
    num_pages: tuple[int, ...],
) -> None:
    config = EngineConfig(
        model=str(model_folder("llama")),
        context_parallel_size=len(num_pages),
        kv_cache_tokens=tuple(PAGE_SIZE * pages for pages in num_pages),
        page_size=PAGE_SIZE,
        max_num_batched_tokens=48,
        min_tokens_per_rank=64,
        dtype="float32",
    )
    spec = load_spec(config)
    served = Recorder(launch(config, spec), time.monotonic)
    try:
        engine = served.engine(config, spec)
        serve(served, engine, seed=1)
    finally:
        served.close()

    simulated = replay(served, config, spec, num_pages)
    assert difference(served, simulated) == ""
    assert simulated.groups.keys() == served.groups.keys()
    for name, group in served.groups.items():
        other = simulated.groups[name]
        assert [r.output_token_ids for r in other.requests] == [
            r.output_token_ids for r in group.requests
        ]
        ends = [[r.finish_reason for r in one.requests] for one in (group, other)]
        assert ends[0] == ends[1]
    missing = [fact for fact in EXPECTED if not facts(served)[fact]]
    assert not missing

    fewer = (num_pages[0] - 1, *num_pages[1:])
    assert difference(served, replay(served, config, spec, fewer)), "pages make no difference"


EXPECTED = (
    "growth",
    "long prefills together",
    "steps apart",
    "moves",
    "prefix hits",
    "preemptions",
    "ended by stop",
    "ended by length",
    "ended by abort",
)
