"""Worker processes of this host, one a rank, and their end: whatever happens, none is left."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from longspan.errors import RankFailedError
from longspan.worker.handshake import SECRET

GRACE_SECONDS = 3.0
"""How long ranks have to end by themselves before they are killed."""


class LocalRanks:
    """Starts `python -m longspan.worker` for each of `num_ranks` ranks of this host.

    A worker ends itself when its channel to the engine closes or when this process ends, so that
    not even a killed one leaves any behind. `place` follows a rank's number in errors.
    """

    def __init__(self, num_ranks: int, place: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="longspan-"))
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.place = place
        self._environment = {
            "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_ranks, 1)),
            "PYTHONFAULTHANDLER": "1",
            **os.environ,
        }
        self._environment.pop(SECRET, None)

    def spawn(self, rank: int, channel: socket.socket, interface: str) -> None:
        """Start a rank that talks to the engine over `channel`, which is closed here.

        Gloo talks to the other ranks over a network `interface`, unless the environment says which.
        """
        arguments = [str(channel.fileno()), str(self.folder)]
        with channel, open(self._log(rank), "wb") as log:
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "longspan.worker", *arguments],
                env={"GLOO_SOCKET_IFNAME": interface, **self._environment},
                stdin=subprocess.PIPE,  # nothing is written; its end tells a worker of ours
                stdout=log,
                stderr=log,
                pass_fds=[channel.fileno()],
                start_new_session=True,  # Ctrl-C reaches this process only, which ends them
            )

    def lost(self) -> RankFailedError | None:
        """How a rank ended and its last words, if one has."""
        for rank, process in self.processes.items():
            if process.poll() is not None:
                return RankFailedError("\n".join(self._last_words(rank, process)))
        return None

    def stop(self) -> None:
        """End all ranks. Those whose channels have been closed before do so by themselves."""
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _last_words(self, rank: int, process: subprocess.Popen[bytes]) -> Iterator[str]:
        status = process.returncode
        reason = (
            f"was killed by {signal.Signals(-status).name}"
            if status < 0
            else (f"ended with status {status}")
        )
        yield f"rank {rank}{self.place} (pid {process.pid}) {reason}"
        with contextlib.suppress(OSError):
            yield from self._log(rank).read_text(errors="replace").splitlines()[-20:]

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"
