"""Nodes on this machine: programs that lend ranks, and ports for them to meet at."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from family import ranks_of

SECRET = "a secret that nobody guesses"
SERVE = [sys.executable, "-c", "from longspan.cli import main; main()", "serve"]
PATIENCE_S = 120.0
"""For what takes seconds on a machine that does nothing else."""


def free_port() -> int:
    """A port that nobody uses, and that no connection is given by chance."""
    while True:
        port = random.SystemRandom().randrange(20_000, 29_000)
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class NodeProgram:
    """`longspan serve` in a process of its own, whose temporary files are in `folder`."""

    def __init__(
        self, model: Path, port: int, folder: Path, *arguments: str, secret: str = SECRET
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self._said = folder.with_suffix(".said")
        with open(self._said, "wb") as said:
            self.process = subprocess.Popen(
                [*SERVE, str(model), "--master-port", str(port), *arguments],
                stdout=said,
                stderr=said,
                env={**os.environ, "LONGSPAN_SECRET": secret, "TMPDIR": str(folder)},
            )

    @property
    def lines(self) -> list[str]:
        """What it has said, without what libraries say of their progress."""
        return [line for line in self._said.read_text().splitlines() if "%|" not in line]

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self._said.read_text(), f"{words!r} in {self.lines}")

    def rank_pids(self) -> list[int]:
        """The processes of the ranks that it has started."""
        return ranks_of(self.process.pid)

    def end(self) -> int:
        """Wait for its end; returns its status."""
        return self.process.wait(PATIENCE_S)

    def send(self, sent: signal.Signals) -> None:
        self.process.send_signal(sent)


def wait_until(met: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


def wait_until_gone(pids: list[int]) -> None:
    """Within seconds, as is promised."""
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"the end of {pids}", 20)
