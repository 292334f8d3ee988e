"""`longspan serve` in a process of its own, on a port that is free."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
from family import ranks_of

SERVE = [sys.executable, "-c", "from longspan.cli import main; main()", "serve"]
PATIENCE_S = 120.0
"""For what takes seconds on a machine that does nothing else."""


class ServerProgram:
    """A server with two ranks, and those who talk to it."""

    def __init__(self, model: Path, folder: Path, *arguments: str, key: str = "none") -> None:
        self.log = folder / "server.log"
        self.key = key
        ranks = ["--context-parallel-size", "2", "--kv-cache-tokens", "4000"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*SERVE, str(model), *ranks, "--port", "0", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            )
        try:
            wait_until(lambda: self._address() or self.process.poll() is not None, "its start")
        except AssertionError:
            self.process.kill()
            self.end()
            raise
        address = self._address()
        assert address is not None, self.said
        self.url = address
        self.http = httpx.Client(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S
        )

    def client(self, **options: object) -> openai.OpenAI:
        """The official client, which does not try again by itself."""
        settings = {"api_key": self.key, "max_retries": 0, "timeout": PATIENCE_S, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)  # type: ignore[arg-type]

    def _address(self) -> str | None:
        found = re.search(r"^listening at +(http\S+)$", self.said, re.MULTILINE)
        return found[1] if found else None

    @property
    def said(self) -> str:
        return self.log.read_text()

    def figure(self, name: str) -> float:
        """The sum of a figure of /metrics over what it is told apart by."""
        lines = re.findall(rf"^{name}{{.*}} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert lines, name
        return sum(map(float, lines))

    def rank_pids(self) -> list[int]:
        return ranks_of(self.process.pid)

    def wait_until_idle(self) -> None:
        """No request has a page or waits for one."""
        for name in ("longspan:kv_pages_used", "vllm:num_requests_waiting"):
            wait_until(lambda name=name: self.figure(name) == 0, f"{name} to be 0")  # type: ignore[misc]

    def end(self) -> int:
        """Wait for its end; returns its status."""
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """For what a failed test leaves."""
        self.http.close()
        self.process.send_signal(signal.SIGKILL)
        self.end()


def wait_until(met: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
