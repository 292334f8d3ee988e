"""Ranks as processes of this host, one each, and their end: whatever happens, none is left."""

import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from longspan import errors
from longspan.config import EngineConfig
from longspan.cost.samples import Samples
from longspan.errors import EngineStoppedError, LongspanError, RankFailedError
from longspan.models import ModelSpec
from longspan.plan import RankPlan, RankResult
from longspan.topology import Topology
from longspan.worker.channel import Channel, Done, Execute, Failed, Measure, Measured, Ready, Start

GRACE_SECONDS = 3.0
"""How long ranks have to end by themselves before they are killed."""


class ProcessExecutor:
    """Starts `python -m longspan.worker` for each rank and talks to it over a socket pair.

    The pair has no address, so nobody else can connect; a worker that sees its end closed ends
    itself, so that not even a killed engine leaves one behind.
    """

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="longspan-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._selector = selectors.DefaultSelector()
        self._at_work: set[int] = set()
        self.close = weakref.finalize(
            self, _stop, self._processes, self._channels, self._selector, self._folder
        )
        try:
            for rank in range(config.num_ranks):
                self._spawn(rank, config)
            for rank, channel in enumerate(self._channels):
                rendezvous = str(self._folder / "rendezvous")
                channel.send(Start(config, spec, rank, rendezvous))
            ready: dict[int, Ready] = {}
            while len(ready) < config.num_ranks:
                ready |= self._receive(Ready)
        except BaseException:
            self.close()
            raise
        self.num_pages = tuple(ready[rank].num_pages for rank in range(config.num_ranks))
        self.rates = ready[0].rates
        self.topology = Topology.of_hosts([config.num_ranks])

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        """Begin a step on ranks that are not at work. A dead rank is noticed by `wait`.

        Raises:
            EngineStoppedError: the fleet has been stopped before.
        """
        if not self.close.alive:
            raise EngineStoppedError("the engine has been stopped; make a new one")
        try:
            for rank, plan in plans.items():
                self._at_work.add(rank)
                with contextlib.suppress(OSError):
                    self._channels[rank].send(Execute(plan))
        except BaseException:  # Ctrl-C: half a message may be sent
            self.close()
            raise

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        """Results of the ranks that are done, at least of one, or none after `timeout` seconds.

        Raises:
            RankFailedError: a rank died or raised, at work or idle; the fleet has been stopped.
        """
        if not self.close.alive:
            return {}
        try:
            done = self._receive(Done, timeout if self._at_work else 0)
        except BaseException:  # also Ctrl-C: ranks in the middle of a step can't be used again
            self.close()
            raise
        self._at_work -= done.keys()
        return {rank: message.result for rank, message in done.items()}

    def measure(self) -> list[Samples]:
        """What each rank measures of itself, all at the same time; before any plan.

        Raises:
            RankFailedError: a rank died or raised; the fleet has been stopped.
        """
        try:
            for channel in self._channels:
                channel.send(Measure())
            measured: dict[int, Measured] = {}
            while len(measured) < len(self._channels):
                measured |= self._receive(Measured)
        except BaseException:
            self.close()
            raise
        return [measured[rank].samples for rank in sorted(measured)]

    def _spawn(self, rank: int, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair()
        threads = max((os.cpu_count() or 1) // config.num_ranks, 1)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONFAULTHANDLER": "1",
            **os.environ,
        }
        arguments = [str(theirs.fileno()), str(self._folder)]
        with theirs, open(self._log(rank), "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "longspan.worker", *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C reaches the engine only, which ends them
                )
            )
        self._channels.append(Channel(ours))
        self._selector.register(ours, selectors.EVENT_READ, rank)

    _M = TypeVar("_M", Ready, Done, Measured)

    def _receive(self, kind: type[_M], timeout: float | None = None) -> dict[int, _M]:
        """A message of each rank that has sent one; waits for the first of any."""
        received: dict[int, ProcessExecutor._M] = {}
        for key, _ in self._selector.select(timeout):
            rank: int = key.data
            try:
                message = self._channels[rank].receive()
            except EOFError:
                raise self._death(rank) from None
            if isinstance(message, Failed):
                raise self._failure(rank, message)
            assert isinstance(message, kind), message
            received[rank] = message
        return received

    def _failure(self, rank: int, failed: Failed) -> LongspanError:
        kind = getattr(errors, failed.kind, None)
        if isinstance(kind, type) and issubclass(kind, LongspanError):
            return kind(failed.message)
        # A rank also fails when a peer dies under it; then the peer's death is the cause.
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            for other, process in enumerate(self._processes):
                if other != rank and process.poll() is not None:
                    return self._death(other)
            time.sleep(0.02)
        return RankFailedError(
            f"rank {rank} failed: {failed.kind}: {failed.message}\n{failed.details}".rstrip()
        )

    def _death(self, rank: int) -> RankFailedError:
        process = self._processes[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        status = process.returncode
        if status is not None and status < 0:
            reason = f"was killed by {signal.Signals(-status).name}"
        else:
            reason = f"ended with status {status}"
        tail = self._log(rank).read_text(errors="replace").splitlines()[-20:]
        return RankFailedError("\n".join([f"rank {rank} (pid {process.pid}) {reason}", *tail]))

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"


def _stop(
    processes: list[subprocess.Popen[bytes]],
    channels: list[Channel],
    selector: selectors.BaseSelector,
    folder: Path,
) -> None:
    selector.close()
    for channel in channels:
        channel.close()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(folder, ignore_errors=True)
