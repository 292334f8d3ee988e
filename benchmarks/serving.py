"""How the server does under load: latencies, many streams, clients that leave, overhead, memory.

All on the CPU, the packaged model, `longspan serve` with two ranks of one thread each, and clients
in another process on the same machine:

open      Prompts of 32 to 2,048 tokens, short ones more often, arrive at random (Poisson) at parts
          of the most requests per second that the server does. Time to the first token (TTFT, from
          when a request should arrive), for each further one (TPOT) and to the end (E2E), and
          goodput: requests per second that keep both objectives.
crowd     200 streams at once, some of prompts that one rank can't compute in a step.
leave     100 clients that go away at random, in the queue, in a prefill or while they get tokens,
          half of them without a stream. Time until a request holds no page any more. Aim: 1 s at
          most, and other streams get what they would have.
overhead  The same trace to the server and to the same engine in this process, stepped as
          `LLM.generate` does it. Aim: TTFT and TPOT through HTTP within 5 % or 1 ms.
soak      For `--soak` seconds, random requests of all kinds, some of which are left. Memory of each
          process that it shares with no other (USS), fitted over the last two thirds. Aim: flat,
          less than 2 % in ten minutes.

Tokens of `open`, `crowd` and `leave` are compared with those of `LLM.generate` on one rank, each
request alone. With `--output` the parts that are left out are kept as they are in the file. The
last line is one JSON document.

    python benchmarks/serving.py [--only open crowd leave overhead] [--soak 600] [--output FILE]
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import httpx
from common import finish, one_thread_each, print_table, quantile, verdict
from served import Answer, Ask, Server, Texts, client, drive, read

from longspan import LLM, demo
from longspan.engine.completion import Group
from longspan.evaluation.prose import prose

RANKS = 2
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 100_000}
SMALL_POOLS: dict[str, Any] = {**OPTIONS, "kv_cache_tokens": 12_000}
"""Filled within seconds, so that all of their memory has been touched."""

PROMPTS, OUTPUTS = (32, 2048), (16, 96)
LONG_PROMPTS = (4096, 8192)
STREAMS, LONG_STREAMS = 200, 10
LEAVERS, STAYERS = 100, 8
SENTENCES = 4000
SAMPLE_S = 10.0
MIB = 1 << 20

Row = dict[str, Any]


class Setting:
    """What the parts share; each of it starts when it is first needed."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self.options = options
        self._folder = folder
        self._stack = stack

    def serve(self, **options: Any) -> Server:
        sizes = {"context_parallel_size": RANKS, **options}
        return self._stack.enter_context(Server(demo.model_path(), self._folder, **sizes))

    @cached_property
    def server(self) -> Server:
        server = self.serve(**OPTIONS, enable_prefix_caching=False)
        asyncio.run(drive(server.url, [self.texts(0).ask(0.0, (2048, 2048), (4, 4))]))
        return server

    @cached_property
    def direct(self) -> LLM:
        """The same engine in this process."""
        sizes = {"context_parallel_size": RANKS, **OPTIONS, "enable_prefix_caching": False}
        return self._stack.enter_context(LLM(str(demo.model_path()), **sizes))

    @cached_property
    def alone(self) -> LLM:
        """One rank, which computes one request at a time."""
        sizes = {**OPTIONS, "distributed_executor_backend": "mp"}
        return self._stack.enter_context(LLM(str(demo.model_path()), **sizes))

    @cached_property
    def token_ids(self) -> list[int]:
        text = " ".join(islice(prose(seed=0), SENTENCES))
        return list(self.alone.get_tokenizer().encode(text))

    def texts(self, seed: int) -> Texts:
        return Texts(self.token_ids, seed)

    def wrong(self, answers: Sequence[Answer]) -> int:
        """How many answers differ from what the request gets alone."""
        wrong = 0
        for answer in answers:
            prompt = {"prompt_token_ids": answer.ask.prompt}
            [output] = self.alone.generate([prompt], answer.ask.params, use_tqdm=False)  # type: ignore[list-item]
            [completion] = output.outputs
            expected = (completion.text, len(completion.token_ids))
            wrong += expected != (answer.text, answer.tokens)
        return wrong


def latencies(name: str, answers: Sequence[Answer], options: argparse.Namespace) -> Row:
    seconds = max(answer.last or 0.0 for answer in answers) - min(a.ask.at for a in answers)
    kept = sum(a.ttft <= options.ttft and a.tpot <= options.tpot for a in answers)
    row: Row = {"requests": name, "number": len(answers)}
    for what, values in (
        ("TTFT", [answer.ttft for answer in answers]),
        ("TPOT", [answer.tpot for answer in answers]),
        ("E2E", [answer.e2e for answer in answers]),
    ):
        row |= {f"{what} p{part}, ms": 1e3 * quantile(values, part / 100) for part in (50, 90, 99)}
    return row | {
        "tokens/s": sum(answer.tokens for answer in answers) / seconds,
        "in objectives": kept / len(answers),
        "goodput/s": kept / seconds,
    }


def measure_open(setting: Setting) -> Row:
    options, url, texts = setting.options, setting.server.url, setting.texts(1)
    some = [texts.ask(0.0, PROMPTS, OUTPUTS) for _ in range(96)]
    answers = asyncio.run(drive(url, some))
    most = len(some) / max(answer.last or 0.0 for answer in answers)
    rows, wrong = [latencies("96 at once", answers, options)], 0
    for load in options.loads:
        rate = load * most
        asks = setting.texts(2).poisson(rate, options.seconds, PROMPTS, OUTPUTS)
        answers = asyncio.run(drive(url, asks))
        rows.append(latencies(f"{rate:.2f}/s, {100 * load:.0f} %", answers, options))
        wrong += setting.wrong(answers)
    print_table(rows)
    return {
        "most_requests_per_s": most,
        "objectives": {"ttft_s": options.ttft, "tpot_s": options.tpot},
        "rows": rows,
        "wrong_answers": wrong,
    }


def measure_crowd(setting: Setting) -> Row:
    texts, server = setting.texts(3), setting.server
    asks = [texts.ask(0.0, PROMPTS, OUTPUTS) for _ in range(STREAMS - LONG_STREAMS)]
    asks += [texts.ask(0.0, LONG_PROMPTS, OUTPUTS) for _ in range(LONG_STREAMS)]
    texts.rng.shuffle(asks)
    running: list[int] = []

    async def run() -> list[Answer]:
        watch = asyncio.create_task(each(0.25, partial(count_running, running), server.url))
        answers = await drive(server.url, asks)
        watch.cancel()
        return answers

    answers = asyncio.run(run())
    row = latencies(f"{STREAMS} at once", answers, setting.options)
    print_table([row])
    return {
        "row": row,
        "prompt_tokens": sum(len(ask.prompt) for ask in asks),
        "most_running": max(running),
        "wrong_answers": setting.wrong(answers),
    }


async def each(
    seconds: float, look: Callable[[httpx.AsyncClient], Awaitable[None]], url: str
) -> None:
    """Look at a server again and again."""
    async with client(url) as http:
        while True:
            await look(http)
            await asyncio.sleep(seconds)


async def picture(http: httpx.AsyncClient) -> Row:
    """What the dashboard is told at the moment."""
    async with http.stream("GET", "/dashboard/events") as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                shown: Row = json.loads(line[6:])
                return shown
    raise SystemExit("the server has no picture of itself")


async def count_running(running: list[int], http: httpx.AsyncClient) -> None:
    running.append(len((await picture(http))["engine"]["requests"]))


class Leavers:
    """Clients that go away at a moment of their own, and how long their pages stay."""

    def __init__(self, url: str, texts: Texts) -> None:
        self._url = url
        self._texts = texts
        self._left: dict[str, tuple[float, str]] = {}
        """Those that have left and were not yet seen to be gone: when, and at what."""
        self.gone: list[tuple[str, float]] = []
        """At what they left, and after how many seconds their requests were gone."""

    async def leave(self, begun: float, seconds: float) -> None:
        """Come and go within so many seconds, and be seen to be gone."""
        async with client(self._url) as http, asyncio.TaskGroup() as group:
            watch = group.create_task(each(0.01, self._look, self._url))
            await asyncio.gather(
                *(self._visit(http, begun, number, seconds) for number in range(LEAVERS))
            )
            while self._left:
                await asyncio.sleep(0.01)
            watch.cancel()

    async def _visit(
        self, http: httpx.AsyncClient, begun: float, number: int, seconds: float
    ) -> None:
        rng = self._texts.rng
        long = number % 4 == 0
        ask = self._texts.ask(
            rng.uniform(0, seconds), LONG_PROMPTS if long else PROMPTS, (400, 400)
        )
        most, name = rng.randint(1, 30), f"leaver-{number}"
        patience = None if number % 4 == 3 else rng.uniform(0.02, 2.0)
        answer = Answer(ask)
        if number % 2:
            visit: Coroutine[Any, Any, object] = read(
                http, ask, begun, name=name, most=most, into=answer
            )
        else:
            visit = self._wait_for(http, ask, begun, name)
        task = asyncio.create_task(visit)
        await asyncio.sleep(begun + ask.at - time.perf_counter())
        await asyncio.wait({task}, timeout=patience)
        at = "decode" if answer.lines or await self._decodes(http, name) else "prefill or queue"
        now = time.perf_counter()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        self._left[f"cmpl-{name}:0/0"] = now, at

    async def _wait_for(self, http: httpx.AsyncClient, ask: Ask, begun: float, name: str) -> None:
        await asyncio.sleep(begun + ask.at - time.perf_counter())
        body = {key: value for key, value in ask.body.items() if not key.startswith("stream")}
        await http.post("/v1/completions", json=body, headers={"X-Request-Id": name})

    async def _decodes(self, http: httpx.AsyncClient, name: str) -> bool:
        requests = (await picture(http))["engine"]["requests"]
        return any(
            one["id"].startswith(f"cmpl-{name}:") and one["output_tokens"] for one in requests
        )

    async def _look(self, http: httpx.AsyncClient) -> None:
        begun = time.perf_counter()
        ids = {one["id"] for one in (await picture(http))["engine"]["requests"]}
        now = time.perf_counter()
        for name, (left, at) in list(self._left.items()):
            if left < begun and name not in ids:
                self.gone.append((at, now - left))
                del self._left[name]


def measure_leave(setting: Setting) -> Row:
    server, texts = setting.server, setting.texts(5)
    free = server.figure("longspan:kv_pages_free")
    stayers = [texts.ask(0.0, PROMPTS, (300, 400)) for _ in range(STAYERS)]
    leavers = Leavers(server.url, setting.texts(6))

    async def run() -> list[Answer]:
        begun = time.perf_counter() + 0.1
        async with client(server.url) as http:
            answers, _ = await asyncio.gather(
                asyncio.gather(*(read(http, ask, begun) for ask in stayers)),
                leavers.leave(begun, setting.options.leaving),
            )
        return [answer.decode() for answer in answers]

    answers = asyncio.run(run())
    server.wait_until_idle()
    times = {
        at: [1e3 * seconds for where, seconds in leavers.gone if where == at]
        for at in sorted({at for at, _ in leavers.gone})
    }
    print_table(
        [
            {
                "left in": at,
                "clients": len(ms),
                "pages free after p50, ms": quantile(ms, 0.5),
                "p99, ms": quantile(ms, 0.99),
                "most, ms": max(ms),
            }
            for at, ms in times.items()
        ]
    )
    return {
        "ms_until_free": times,
        "most_ms": max(map(max, times.values())),
        "stayers": latencies(f"{STAYERS} that stay", answers, setting.options),
        "pages_not_free": free - server.figure("longspan:kv_pages_free"),
        "wrong_answers": setting.wrong(answers),
    }


def direct(llm: LLM, asks: Sequence[Ask]) -> list[tuple[float, float]]:
    """TTFT and TPOT of requests that arrive at their time, by stepping as `LLM.generate` does."""
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
    times = []
    for ask, group in zip(asks, groups, strict=True):
        metrics = group.requests[0].metrics
        first, further = metrics.first_token_time, metrics.time_per_output_token
        assert first is not None
        assert further is not None
        times.append((first - begun - ask.at, further))
    return times


def through_http(server: Server, asks: Sequence[Ask]) -> list[tuple[float, float]]:
    return [(answer.ttft, answer.tpot) for answer in asyncio.run(drive(server.url, asks))]


def measure_overhead(setting: Setting) -> Row:
    """One request after the other, through HTTP and directly in turn; and several at a time."""
    options, texts = setting.options, setting.texts(7)
    single = [[texts.ask(0.0, PROMPTS, (64, 96))] for _ in range(options.overhead_requests)]
    several = texts.poisson(options.overhead_rate, options.seconds / 2, PROMPTS, (64, 96))
    rows = compared(setting, "one at a time", single)
    rows += compared(setting, "at random", [several] * options.pairs)
    print_table([{name: row[name] for name in list(row)[:9]} for row in rows])
    return {"rows": rows}


def compared(setting: Setting, name: str, traces: Sequence[Sequence[Ask]]) -> list[Row]:
    """Medians over all requests of some traces, each of which goes both ways, in turn."""
    server, llm = setting.server, setting.direct
    times: dict[str, list[tuple[float, float]]] = {"http": [], "direct": []}
    before = server.cpu_seconds()
    for turn, asks in enumerate(traces):
        for kind in list(times)[:: -1 if turn % 2 else 1]:
            run = through_http(server, asks) if kind == "http" else direct(llm, asks)
            times[kind] += run
    cpu = server.cpu_seconds() - before
    tokens = sum(ask.new_tokens for asks in traces for ask in asks)
    rows = []
    for number, what in enumerate(("TTFT", "TPOT")):
        http, plain = ([1e3 * one[number] for one in times[kind]] for kind in times)
        ratio = statistics.median(http) / statistics.median(plain)
        more = statistics.median(one - other for one, other in zip(http, plain, strict=True))
        rows.append(
            {
                "requests": name,
                "number": len(http),
                "time": what,
                "HTTP p50, ms": statistics.median(http),
                "direct p50, ms": statistics.median(plain),
                "ratio": ratio,
                "more p50, ms": more,
                "server CPU, ms a token": 1e3 * cpu / tokens,
                "": verdict(ratio <= 1.05 or more <= 1.0),
                "http, ms": http,
                "direct, ms": plain,
            }
        )
    return rows


def measure_soak(setting: Setting) -> Row:
    """Random requests of all kinds, so many at a time, and each process's memory meanwhile."""
    server = setting.serve(**SMALL_POOLS)
    samples: list[Row] = []
    done = asyncio.run(soak(setting, server, samples))
    server.wait_until_idle()
    warm = [sample for sample in samples if sample["seconds"] >= setting.options.soak / 3]
    rows = []
    for name in server.processes:
        times = [sample["seconds"] for sample in warm]
        slope = statistics.linear_regression(times, [sample[name]["uss"] for sample in warm]).slope
        first, last = warm[0][name]["uss"], warm[-1][name]["uss"]
        rows.append(
            {
                "process": name,
                "USS after warm-up, MiB": first,
                "USS at the end, MiB": last,
                "PSS at the end, MiB": warm[-1][name]["pss"],
                "slope, MiB in 10 min": 600 * slope,
                "": verdict(600 * slope < 0.02 * last),
            }
        )
    print_table(rows)
    return {
        "seconds": setting.options.soak,
        "requests": done,
        "pages_used": server.figure("longspan:kv_pages_used"),
        "processes": rows,
        "samples": samples,
    }


async def soak(setting: Setting, server: Server, samples: list[Row]) -> dict[str, int]:
    begun, numbers = time.perf_counter(), count()
    end, texts = begun + setting.options.soak, setting.texts(8)
    done = {"finished": 0, "left": 0, "refused": 0}

    async def ask_again(http: httpx.AsyncClient) -> None:
        while time.perf_counter() < end:
            outcome = await one_of_all_kinds(http, texts, next(numbers))
            done[outcome] += 1

    async with client(server.url) as http, asyncio.TaskGroup() as group:
        for _ in range(setting.options.soak_clients):
            group.create_task(ask_again(http))
        while time.perf_counter() < end:
            samples.append(sample(server, time.perf_counter() - begun))
            if len(samples) % 3 == 1:
                print_sample(samples[-1], done)
            await asyncio.sleep(SAMPLE_S)
    return done


async def one_of_all_kinds(http: httpx.AsyncClient, texts: Texts, number: int) -> str:
    """Completions and chats, streams and not, several at once, refused ones, and some are left."""
    rng: random.Random = texts.rng
    ask = texts.ask(0.0, LONG_PROMPTS if number % 50 == 0 else PROMPTS, OUTPUTS)
    path, body = "/v1/completions", {**ask.body, "temperature": rng.choice([0, 1])}
    if number % 5 == 1:
        path = "/v1/chat/completions"
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": f"{number} " * 50}]
    if number % 7 == 2:
        body |= {"temperature": 1, "n": 2, "logprobs": path == "/v1/chat/completions" or 2}
    if number % 3 == 0:
        del body["stream"], body["stream_options"]
    if number % 20 == 3:
        body["unknown"] = 1
    try:
        async with asyncio.timeout(rng.uniform(0.05, 2.0) if number % 10 == 4 else None):
            async with http.stream("POST", path, json=body) as answer:
                async for _ in answer.aiter_bytes():
                    pass
    except TimeoutError:
        return "left"
    if answer.status_code >= 500:
        raise SystemExit(f"the server answered {answer.status_code}")
    return "refused" if answer.status_code >= 400 else "finished"


def sample(server: Server, seconds: float) -> Row:
    """Each process's memory, in MiB."""
    full = {name: process.memory_full_info() for name, process in server.processes.items()}
    memory = {name: {"uss": one.uss / MIB, "pss": one.pss / MIB} for name, one in full.items()}
    return {"seconds": seconds, **memory}


def print_sample(sample: Row, done: dict[str, int]) -> None:
    memory = ", ".join(
        f"{name} {sizes['uss']:.1f} ({sizes['pss']:.1f})"
        for name, sizes in sample.items()
        if name != "seconds"
    )
    print(f"{sample['seconds']:5.0f} s  USS (PSS) in MiB: {memory}; requests {done}", flush=True)


PARTS: dict[str, Callable[[Setting], Row]] = {
    "open": measure_open,
    "crowd": measure_crowd,
    "leave": measure_leave,
    "overhead": measure_overhead,
}


def aims(parts: Row) -> list[Row]:
    rows: list[tuple[str, object, bool]] = [
        (
            f"{name}: answers with other tokens",
            parts[name]["wrong_answers"],
            not parts[name]["wrong_answers"],
        )
        for name in ("open", "crowd", "leave")
        if name in parts
    ]
    if leave := parts.get("leave"):
        most, kept = leave["most_ms"], leave["pages_not_free"]
        rows.append(("leave: ms until pages are free, at most", round(most), most <= 1000))
        rows.append(("leave: pages that are not free afterwards", kept, not kept))
    for row in parts.get("overhead", {}).get("rows", ()):
        name = f"overhead: {row['time']}, {row['requests']}"
        rows.append((name, f"{row['ratio']:.3f}, {row['more p50, ms']:.2f} ms", row[""] == "met"))
    for row in parts.get("soak", {}).get("processes", ()):
        slope = row["slope, MiB in 10 min"]
        rows.append((f"soak: {row['process']}, MiB in 10 min", f"{slope:.2f}", row[""] == "met"))
    return [{"aim": name, "is": str(is_), "": verdict(met)} for name, is_, met in rows]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--soak", type=float, help="also soak, for so many seconds")
    parser.add_argument("--soak-clients", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals in `open`")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.35, 0.7])
    parser.add_argument("--ttft", type=float, default=0.5, help="objective in seconds")
    parser.add_argument("--tpot", type=float, default=0.05, help="objective in seconds")
    parser.add_argument("--leaving", type=float, default=15.0, help="seconds in which 100 leave")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--overhead-requests", type=int, default=30)
    parser.add_argument("--overhead-rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def parts_so_far(output: Path | None) -> Row:
    """What earlier runs have measured."""
    if output is None or not output.exists():
        return {}
    rows: Row = json.loads(output.read_text())["rows"]
    return rows


def main() -> None:
    options = arguments()
    one_thread_each()
    parts = parts_so_far(options.output)
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder, ExitStack() as stack:
        setting = Setting(options, Path(folder), stack)
        for name in options.only:
            parts[name] = PARTS[name](setting)
        if options.soak:
            parts["soak"] = measure_soak(setting)
    print_table(aims(parts))
    finish("serving", parts, options.output, model="packaged", ranks=RANKS, options=OPTIONS)


if __name__ == "__main__":
    main()
