"""A server in a process of its own, and clients that drive it over HTTP."""

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import psutil  # type: ignore[import-untyped]

from longspan import SamplingParams

_START_S = 120.0
_PATIENCE_S = 900.0


class Ask(NamedTuple):
    """A request of a trace, `at` seconds after its start."""

    at: float
    prompt: list[int]
    new_tokens: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=self.new_tokens, ignore_eos=True, skip_special_tokens=False
        )

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class Server:
    """`longspan serve` with its ranks; use it in a `with` block."""

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        words = [option(name.replace("_", "-"), value) for name, value in options.items()]
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from longspan.cli import main; main()"),
                    *("serve", str(model), "--port=0", "--log-level=warning", *words),
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _START_S
        while not (found := re.search(r"^listening at +(\S+)$", self.said, re.MULTILINE)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise SystemExit(f"the server did not start:\n{self.said}")
            time.sleep(0.05)
        self.url = found[1]

    @property
    def said(self) -> str:
        return self._log.read_text()

    @cached_property
    def processes(self) -> dict[str, Any]:
        """The server's process and its ranks'."""
        server = psutil.Process(self._process.pid)
        ranks = sorted(server.children(), key=lambda child: child.pid)
        return {"server": server} | {f"rank {i}": rank for i, rank in enumerate(ranks)}

    def cpu_seconds(self) -> float:
        """What the server's process, without the ranks, has computed so far."""
        return float(sum(self.processes["server"].cpu_times()[:2]))

    def figure(self, name: str) -> float:
        """The sum of a figure of /metrics over what it is told apart by."""
        text = httpx.get(f"{self.url}/metrics", timeout=_PATIENCE_S).text
        return sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)))

    def wait_until_idle(self) -> None:
        """No request runs or waits any more."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        while any(self.figure(name) for name in names):
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()


def option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


@dataclass(slots=True)
class Answer:
    """What a client has read of a stream. Times are in seconds from the trace's start.

    `lines` are the events' lines with their time; they are decoded when all is over.
    """

    ask: Ask
    lines: list[tuple[float, str]] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    first: float | None = None
    last: float | None = None

    def decode(self) -> Self:
        for at, line in self.lines:
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"the server answered {event['error']}")
            for choice in event["choices"]:
                self.first = at if self.first is None else self.first
                self.last = at
                self.text += choice["text"]
            if event["usage"] is not None:
                self.tokens = event["usage"]["completion_tokens"]
        self.lines.clear()
        return self

    @property
    def ttft(self) -> float:
        assert self.first is not None
        return self.first - self.ask.at

    @property
    def tpot(self) -> float:
        """As clients see it: a token that waits for the next one's character counts with it."""
        assert self.first is not None
        assert self.last is not None
        return (self.last - self.first) / max(self.tokens - 1, 1)

    @property
    def e2e(self) -> float:
        assert self.last is not None
        return self.last - self.ask.at


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=limits)


async def read(
    http: httpx.AsyncClient,
    ask: Ask,
    begun: float,
    *,
    name: str = "",
    most: int | None = None,
    into: Answer | None = None,
) -> Answer:
    """Send a request when its time has come, and read its answer, at most `most` lines of it."""
    answer = Answer(ask) if into is None else into
    await asyncio.sleep(begun + ask.at - time.perf_counter())
    headers = {"X-Request-Id": name}
    async with http.stream("POST", "/v1/completions", json=ask.body, headers=headers) as response:
        if response.status_code != 200:
            raise SystemExit(f"the server answered {(await response.aread()).decode()}")
        async with aclosing(response.aiter_lines()) as lines:
            async for line in lines:
                if line:
                    answer.lines.append((time.perf_counter() - begun, line))
                    if len(answer.lines) == most:
                        break
    return answer


async def drive(url: str, asks: Sequence[Ask]) -> list[Answer]:
    """Let requests arrive at their time whatever the others do, and read all answers.

    The first has a connection that is there already, as clients keep theirs.
    """
    async with client(url) as http:
        await http.get("/version")
        begun = time.perf_counter() + 0.1
        answers = await asyncio.gather(*(read(http, ask, begun) for ask in asks))
    return [answer.decode() for answer in answers]


class Texts:
    """Prompts cut from a long text at random places."""

    def __init__(self, token_ids: Sequence[int], seed: int) -> None:
        self._token_ids = list(token_ids)
        self.rng = random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        start = self.rng.randrange(len(self._token_ids) - length)
        return self._token_ids[start : start + length]

    def ask(self, at: float, prompts: tuple[int, int], outputs: tuple[int, int]) -> Ask:
        """A request of a length between both; twice as long is half as likely."""
        least, most = prompts
        length = round(least * (most / least) ** self.rng.random())
        return Ask(at, self.prompt(length), self.rng.randint(*outputs))

    def poisson(
        self, rate: float, seconds: float, prompts: tuple[int, int], outputs: tuple[int, int]
    ) -> list[Ask]:
        """Requests that arrive at random, so many a second on average."""
        asks, at = list[Ask](), self.rng.expovariate(rate)
        while at < seconds:
            asks.append(self.ask(at, prompts, outputs))
            at += self.rng.expovariate(rate)
        return asks
