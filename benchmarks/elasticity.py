"""What it costs, and what it gains, that prompts take as many ranks as they need and no more.

All on the CPU, a random model of 10 million weights, two ranks of one thread each, in three parts:

short  Prompts of 64 to 512 tokens only, all there from the start: tokens per second of one engine
       with two ranks against two engines with one rank each, the requests dealt out in turn. At
       best the same: no request needs another's rank. Aim: within 3 %, the same tokens, and
       nothing sent from rank to rank.
mixed  Such prompts arrive at random beside two of 32,768 tokens. Time to the first token (TTFT,
       from arrival) and for each further one (TPOT), on this engine and on the same engine where
       every prompt takes both ranks. At best short requests do as well as without the long ones.
long   TTFT of 8,192 to 32,768 tokens alone, against the same with both ranks for every prompt. At
       best the same, since both ranks is what a long prompt should take. Aim: within 5 %.

What is compared takes turns, `--repeats` times; figures are medians. With `--output` the parts
that `--only` leaves out are kept as they are in the file. The last line is one JSON document.

    python benchmarks/elasticity.py [--only short mixed long] [--repeats 3] [--output FILE]
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
from common import (
    build_model,
    finish,
    one_thread_each,
    print_table,
    quantile,
    random_tokens,
    verdict,
)

from longspan import LLM, SamplingParams
from longspan.engine.completion import Group
from longspan.worker.processes import ProcessExecutor

RANKS = 2
SHORT_PROMPTS = (64, 512)
SHORT_OUTPUTS = (16, 96)
LONG_OUTPUT = 16
MAX_NUM_SEQS_PER_RANK = 64
QUICK_STEP_TIME = 0.05
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "kv_cache_tokens": 80_000,
    "enable_prefix_caching": False,  # the same prompts come again
}

Row = dict[str, Any]


class Ask(NamedTuple):
    """A request of a trace, `at` seconds after its start."""

    at: float
    prompt: list[int]
    new_tokens: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.new_tokens, ignore_eos=True)


@dataclass(frozen=True)
class Served:
    at: float
    prompt_tokens: int
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Saturated:
    """All requests of a trace at once: their tokens, and the time that it took."""

    tokens: list[list[int]]
    seconds: float
    cpu_seconds: float


def short_asks(rng: random.Random, arrivals: Sequence[float]) -> list[Ask]:
    return [
        Ask(at, random_tokens(rng, rng.randint(*SHORT_PROMPTS)), rng.randint(*SHORT_OUTPUTS))
        for at in arrivals
    ]


def start(folder: Path, ranks: int, options: Row) -> LLM:
    """An engine that has run once; it may have as many requests at a time for each rank."""
    sequences = MAX_NUM_SEQS_PER_RANK * ranks
    llm = LLM(str(folder), context_parallel_size=ranks, max_num_seqs=sequences, **options)
    serve(llm, [Ask(0.0, [1] * 2048, 4)])
    return llm


class Fleet:
    """The engines that are compared; each starts when it is first needed."""

    def __init__(self, folder: Path, options: Row, stack: ExitStack) -> None:
        self._folder = folder
        self._options = options
        self._stack = stack

    @cached_property
    def elastic(self) -> LLM:
        return self._stack.enter_context(start(self._folder, RANKS, self._options))

    @cached_property
    def static(self) -> LLM:
        """Every prompt takes all ranks."""
        options = {**self._options, "min_tokens_per_rank": 1}
        return self._stack.enter_context(start(self._folder, RANKS, options))

    @cached_property
    def quick(self) -> LLM:
        """Steps are so short that those who decode beside a long prompt get on."""
        options = {**self._options, "max_step_time": QUICK_STEP_TIME}
        return self._stack.enter_context(start(self._folder, RANKS, options))

    @cached_property
    def independent(self) -> "list[Independent]":
        return [
            self._stack.enter_context(independent(self._folder, self._options))
            for _ in range(RANKS)
        ]


class Independent:
    """An engine with one rank, in a process of its own."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self._pipe = pipe
        pipe.recv()

    def start(self, asks: Sequence[Ask]) -> None:
        self._pipe.send(asks)

    def wait(self) -> Saturated:
        saturated: Saturated = self._pipe.recv()
        return saturated


@contextmanager
def independent(folder: Path, options: Row) -> Iterator[Independent]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_pipe, args=(folder, options, theirs), daemon=True)
    process.start()
    try:
        yield Independent(ours)
    finally:
        process.terminate()
        process.join()


def _serve_pipe(folder: Path, options: Row, pipe: "Connection[Any, Any]") -> None:
    one_thread_each()
    with start(folder, 1, options) as llm:
        pipe.send("ready")
        while True:
            pipe.send(saturate(llm, pipe.recv()))


def saturate(llm: LLM, asks: Sequence[Ask]) -> Saturated:
    begun, cpu = time.perf_counter(), cpu_seconds(llm)
    outputs = llm.generate(
        [{"prompt_token_ids": ask.prompt} for ask in asks],
        [ask.params for ask in asks],
        use_tqdm=False,
    )
    tokens = [output.outputs[0].token_ids for output in outputs]
    return Saturated(tokens, time.perf_counter() - begun, cpu_seconds(llm) - cpu)


def cpu_seconds(llm: LLM) -> float:
    """What this process and an engine's workers have computed so far."""
    executor = llm.engine.executor
    pids = executor.pids if isinstance(executor, ProcessExecutor) else []
    times = [psutil.Process(pid).cpu_times() for pid in (None, *pids)]
    return float(sum(each.user + each.system for each in times))


def serve(llm: LLM, asks: Sequence[Ask]) -> list[Served]:
    """Let requests arrive at their time, and run until all have ended."""
    engine, begun = llm.engine, time.monotonic()
    coming, groups = deque(asks), list[Group]()
    while coming or engine.has_requests:
        now = time.monotonic() - begun
        while coming and coming[0].at <= now:
            ask = coming.popleft()
            groups.append(engine.add_request(ask.prompt, ask.params))
        left = max(coming[0].at - now, 0.0) if coming else None
        if engine.has_requests:
            engine.step(left)
        elif left:
            time.sleep(left)
    served = []
    for ask, group in zip(asks, groups, strict=True):
        metrics = group.requests[0].metrics
        first, further = metrics.first_token_time, metrics.time_per_output_token
        assert first is not None
        assert further is not None
        served.append(Served(ask.at, len(ask.prompt), first - begun - ask.at, further))
    return served


def measure_short(fleet: Fleet, options: argparse.Namespace) -> Row:
    asks = short_asks(random.Random(1), [0.0] * options.short_requests)
    few = asks[: 16 * RANKS]
    runs = {"one engine": partial(on_one, fleet), "two engines": partial(on_two, fleet)}
    for run in runs.values():
        run(few)
    traffic = fleet.elastic.engine.traffic
    traffic.clear()
    results: dict[str, list[Saturated]] = {name: [] for name in runs}
    for turn in range(options.repeats):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            results[name].append(run(asks))
    expected = results["two engines"][0].tokens
    count = sum(map(len, expected))
    rows = [short_row(name, each, count, len(asks)) for name, each in results.items()]
    print_table([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    ones, twos = rows[0]["seconds"], rows[1]["seconds"]
    wrong = max(
        sum(tokens != same for tokens, same in zip(each.tokens, expected, strict=True))
        for each in results["one engine"] + results["two engines"]
    )
    return {
        "requests": len(asks),
        "prompt_tokens": sum(len(ask.prompt) for ask in asks),
        "output_tokens": count,
        "engines": rows,
        "ratio": statistics.median(twos) / statistics.median(ones),
        "ratio_of_pairs": [two / one for one, two in zip(ones, twos, strict=True)],
        "requests_with_other_tokens": wrong,
        "traffic": {name: asdict(sent) for name, sent in traffic.items()},
    }


def short_row(name: str, results: Sequence[Saturated], tokens: int, requests: int) -> Row:
    seconds = [each.seconds for each in results]
    median = statistics.median(seconds)
    return {
        "short requests": name,
        "tokens/s": tokens / median,
        "requests/s": requests / median,
        "least tokens/s": tokens / max(seconds),
        "most tokens/s": tokens / min(seconds),
        "CPU s": statistics.median(each.cpu_seconds for each in results),
        "seconds": seconds,
    }


def on_one(fleet: Fleet, asks: Sequence[Ask]) -> Saturated:
    return saturate(fleet.elastic, asks)


def on_two(fleet: Fleet, asks: Sequence[Ask]) -> Saturated:
    engines, begun = fleet.independent, time.perf_counter()
    for number, engine in enumerate(engines):
        engine.start(asks[number::RANKS])
    parts = [engine.wait() for engine in engines]
    seconds = time.perf_counter() - begun
    tokens = [parts[index % RANKS].tokens[index // RANKS] for index in range(len(asks))]
    return Saturated(tokens, seconds, sum(part.cpu_seconds for part in parts))


def measure_mixed(fleet: Fleet, options: argparse.Namespace) -> Row:
    some = short_asks(random.Random(2), [0.0] * 48 * RANKS)
    most = len(some) / min(saturate(fleet.elastic, some).seconds for _ in range(2))
    rate = options.load * most
    shorts = short_asks(random.Random(3), arrivals(random.Random(4), rate, options.seconds))
    length, rng = max(options.long_lengths), random.Random(5)
    longs = [
        Ask(part * options.seconds, random_tokens(rng, length), LONG_OUTPUT)
        for part in options.long_arrivals
    ]
    both = sorted(shorts + longs, key=lambda ask: ask.at)
    scenarios: dict[str, Callable[[], list[Served]]] = {
        "short alone": lambda: serve(fleet.elastic, shorts),
        "short alone, static": lambda: serve(fleet.static, shorts),
        "short and long": lambda: serve(fleet.elastic, both),
        f"short and long, max_step_time={QUICK_STEP_TIME}": lambda: serve(fleet.quick, both),
        "short and long, static": lambda: serve(fleet.static, both),
    }
    served = {name: run() for name, run in scenarios.items()}
    print(
        f"{len(shorts)} short requests in {options.seconds:g} s, {rate:.2f}/s, are "
        f"{100 * options.load:.0f} % of the most, {most:.2f}/s; {length:,} tokens at "
        + ", ".join(f"{ask.at:g} s" for ask in longs)
    )
    print_table([mixed_row(name, each, length) for name, each in served.items()])
    return {
        "seconds": options.seconds,
        "most_requests_per_s": most,
        "load": options.load,
        "rate_per_s": rate,
        "scenarios": {name: [asdict(one) for one in each] for name, each in served.items()},
        "summary": [mixed_row(name, each, length) for name, each in served.items()],
    }


def arrivals(rng: random.Random, rate: float, seconds: float) -> list[float]:
    times = [rng.expovariate(rate)]
    while times[-1] < seconds:
        times.append(times[-1] + rng.expovariate(rate))
    return times[:-1]


def mixed_row(name: str, served: Sequence[Served], long: int) -> Row:
    shorts = [one for one in served if one.prompt_tokens < long]
    longs = [one.ttft_s for one in served if one.prompt_tokens >= long]
    ttfts, tpots = ([1e3 * one.ttft_s for one in shorts], [1e3 * one.tpot_s for one in shorts])
    return {
        "requests": name,
        "TTFT p50, ms": quantile(ttfts, 0.5),
        "TTFT p99, ms": quantile(ttfts, 0.99),
        "TPOT p50, ms": quantile(tpots, 0.5),
        "TPOT p99, ms": quantile(tpots, 0.99),
        "long TTFT, s": " ".join(f"{ttft:.2f}" for ttft in longs) or None,
    }


def measure_long(fleet: Fleet, options: argparse.Namespace) -> Row:
    rows = []
    for length in options.long_lengths:
        ask = Ask(0.0, random_tokens(random.Random(length), length), 2)
        elastic: list[float] = []
        static: list[float] = []
        for turn in range(options.repeats):
            for llm, ttfts in [(fleet.elastic, elastic), (fleet.static, static)][
                :: -1 if turn % 2 else 1
            ]:
                ttfts.append(serve(llm, [ask])[0].ttft_s)
        rows.append(
            {
                "long prompt": length,
                "TTFT, s": statistics.median(elastic),
                "static, s": statistics.median(static),
                "ratio": statistics.median(elastic) / statistics.median(static),
                "all, s": elastic,
                "all static, s": static,
            }
        )
    print_table([{key: row[key] for key in list(row)[:4]} for row in rows])
    return {"lengths": rows, "ratio": max(row["ratio"] for row in rows)}


PARTS: dict[str, Callable[[Fleet, argparse.Namespace], Row]] = {
    "short": measure_short,
    "mixed": measure_mixed,
    "long": measure_long,
}


def aims(parts: Row) -> list[Row]:
    rows = []
    if short := parts.get("short"):
        rows += [
            ("short: tokens/s, of two engines'", f"{short['ratio']:.3f}", short["ratio"] >= 0.97),
            ("short: sent to another rank", short["traffic"] or "nothing", not short["traffic"]),
            (
                "short: requests with other tokens",
                short["requests_with_other_tokens"],
                not short["requests_with_other_tokens"],
            ),
        ]
    if long := parts.get("long"):
        rows.append(
            ("long: TTFT, of static at worst", f"{long['ratio']:.3f}", long["ratio"] <= 1.05)
        )
    return [{"aim": name, "is": is_, "": verdict(met)} for name, is_, met in rows]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short-requests", type=int, default=640)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-step-time", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=36.0, help="of arrivals in `mixed`")
    parser.add_argument("--load", type=float, default=0.35, help="of the most requests/s")
    parser.add_argument("--long-lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--long-arrivals", type=float, nargs="+", default=[0.04, 0.5])
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def parts_so_far(output: Path | None, model: Row, settings: Row) -> Row:
    """What an earlier run of the same model and settings has measured."""
    if output is None or not output.exists():
        return {}
    document: Row = json.loads(output.read_text())
    same = document["model"] == model and document["settings"] == settings
    return document["rows"] if same else {}


def main() -> None:
    options = arguments()
    one_thread_each()
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder, ExitStack() as stack:
        model = build_model(Path(folder))
        steps = {
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "max_step_time": options.max_step_time,
        }
        fleet = Fleet(Path(folder), {**OPTIONS, **steps}, stack)
        settings = {
            "ranks": RANKS,
            "max_num_seqs_per_rank": MAX_NUM_SEQS_PER_RANK,
            **OPTIONS,
            **steps,
        }
        parts = parts_so_far(options.output, model, settings)
        print(", ".join(f"{name}={value}" for name, value in settings.items()) + "\n")
        for name in options.only:
            parts[name] = {"repeats": options.repeats, **PARTS[name](fleet, options)}
    if rows := aims(parts):
        print_table(rows)
    finish("elasticity", parts, options.output, model=model, settings=settings)


if __name__ == "__main__":
    main()
