"""Worker processes of this host, one a rank, and their end: whatever happens, none is left."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from longspan.errors import RankFailedError
from longspan.worker.forker import Forker
from longspan.worker.rank_process import GRACE_SECONDS, RankProcess, Spawn

_PATIENCE_SECONDS = GRACE_SECONDS + 1
"""How long a rank may take to end: those that don't by themselves are killed before."""


class LocalRanks:
    """Starts a process for each of some `ranks` on this host.

    A worker ends itself when its channel to the engine closes or when this process ends, so that
    not even a killed one leaves any behind. `place` follows a rank's number in errors.
    """

    def __init__(self, ranks: Sequence[int], place: str = "") -> None:
        self.ranks = ranks
        self.folder = Path(tempfile.mkdtemp(prefix="longspan-"))
        self.processes: dict[int, RankProcess] = {}
        self._place = place
        self._forker = Forker.current()
        self._threads = max((os.cpu_count() or 1) // len(ranks), 1)

    def place(self, _: int) -> str:
        return self._place

    def spawn(self, rank: int, channel: socket.socket, interface: str) -> None:
        """Start a rank that talks to the engine over `channel`, which is closed here.

        Gloo talks to the other ranks over a network `interface`, unless the environment says which.

        Raises:
            RankFailedError: no process can be started.
        """
        spawn = Spawn(interface, self._threads, str(self.folder))
        with channel, open(self._log(rank), "wb") as log:
            self.processes[rank] = self._forker.fork(spawn, channel, log)

    def lost(self) -> RankFailedError | None:
        """How a rank ended and its last words, if one has."""
        for rank, process in self.processes.items():
            if process.wait(0):
                return RankFailedError("\n".join(self._last_words(rank, process)))
        return None

    def stop(self) -> None:
        """End all ranks. Those whose channels have been closed before do so by themselves."""
        for process in self.processes.values():
            process.let_go()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for process in self.processes.values():
            process.wait(max(deadline - time.monotonic(), 0))
            process.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _last_words(self, rank: int, process: RankProcess) -> Iterator[str]:
        yield f"rank {rank}{self._place} (pid {process.pid}) {_end(process.returncode)}"
        with contextlib.suppress(OSError):
            yield from self._log(rank).read_text(errors="replace").splitlines()[-20:]

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


def _end(status: int | None) -> str:
    if status is None:
        return "ended after the process that had started it"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
