"""Forks of this process are ranks. It has imported what they need, and sees to their end."""

import faulthandler
import gc
import math
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from typing import IO

import msgspec
import torch

from longspan.worker import rank
from longspan.worker.channel import Channel
from longspan.worker.preload import preload
from longspan.worker.rank_process import GRACE_SECONDS, NUMBER, Spawn
from longspan.worker.secret import SECRET

__all__ = ["Forks", "split_off"]

_MAX_MESSAGE_BYTES = 1 << 16


@dataclass
class _Fork:
    lifeline: FileIO
    news: FileIO
    deadline: float = math.inf
    """When it is killed; known once its lifeline has been let go of."""


class Forks:
    """Forks a rank for each `Spawn` that comes over `control`, with channel, log and two pipes.

    `run` returns when the other side of `control` has gone and all ranks have ended. This process
    must have one thread: others, and what they hold, would be missing in a fork.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._forks: dict[int, _Fork] = {}
        self._news = select.poll()
        self._wake, self._woken = socket.socketpair()
        self._closed = False

    def run(self) -> None:
        preload()
        faulthandler.enable()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # for the wake-up alone
        self._news.register(self._wake, select.POLLIN)
        self._news.register(self._control, select.POLLIN)
        while self._forks or not self._closed:
            ready = dict(self._news.poll(self._patience_ms()))
            if self._wake.fileno() in ready:
                self._wake.recv(_MAX_MESSAGE_BYTES)
                self._bury()
            self._kill_who_outstay(ready)
            if self._control.fileno() in ready:
                self._answer()

    def _patience_ms(self) -> float | None:
        first = min((fork.deadline for fork in self._forks.values()), default=math.inf)
        return None if first == math.inf else max(1000 * (first - time.monotonic()), 0)

    def _answer(self) -> None:
        message, fds, _, _ = socket.recv_fds(
            self._control, _MAX_MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC
        )
        if not message:
            self._closed = True
            self._news.unregister(self._control)
            return
        spawn = msgspec.msgpack.decode(message, type=Spawn)
        fork = _Fork(FileIO(fds[2], "r"), FileIO(fds[3], "w"))
        with socket.socket(fileno=fds[0]) as channel, FileIO(fds[1], "w") as log:
            pid = os.fork()
            if pid == 0:
                self._be_rank(spawn, channel, log, fork)
        self._forks[pid] = fork
        self._news.register(fork.lifeline, 0)  # its end is always reported
        self._tell(fork, pid)

    def _tell(self, fork: _Fork, number: int) -> None:
        with suppress(OSError):  # nobody listens any more
            fork.news.write(NUMBER.pack(number))

    def _bury(self) -> None:
        """Tell how those have ended that have."""
        while self._forks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            fork = self._forks.pop(pid)
            if fork.deadline == math.inf:
                self._news.unregister(fork.lifeline)
            self._tell(fork, os.waitstatus_to_exitcode(status))
            fork.lifeline.close()
            fork.news.close()

    def _kill_who_outstay(self, ready: Collection[int]) -> None:
        now = time.monotonic()
        for pid, fork in self._forks.items():
            if fork.deadline == math.inf and fork.lifeline.fileno() in ready:
                fork.deadline = now + GRACE_SECONDS
                self._news.unregister(fork.lifeline)
            elif fork.deadline <= now:
                fork.deadline = now + GRACE_SECONDS
                os.kill(pid, signal.SIGKILL)

    def _be_rank(self, spawn: Spawn, channel: socket.socket, log: FileIO, own: _Fork) -> None:
        """In the fork: become a rank. Does not return."""
        with _to_the_end():
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            for end in (log, self._control, self._wake, self._woken):
                end.close()
            for other in self._forks.values():
                other.lifeline.close()
                other.news.close()
            os.environ.setdefault("GLOO_SOCKET_IFNAME", spawn.interface)
            if "OMP_NUM_THREADS" not in os.environ:  # of which libraries know already
                os.environ["OMP_NUM_THREADS"] = str(spawn.threads)
                torch.set_num_threads(spawn.threads)
            gc.freeze()
            rank.serve(Channel(channel), own.lifeline, spawn.folder)


def split_off(control: socket.socket, said: IO[bytes]) -> int:
    """Fork this process, which has one thread and ranks' imports; returns the fork's number.

    The fork has nothing else of it than `control`, and what it prints goes to a file.
    """
    pid = os.fork()
    if pid == 0:
        with _to_the_end():
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with open(os.devnull, "rb") as nothing:
                for stream, file in enumerate((nothing, said, said)):
                    os.dup2(file.fileno(), stream)
            for fd in map(int, os.listdir("/proc/self/fd")):
                if fd > 2 and fd != control.fileno():
                    with suppress(OSError):  # that of the listing
                        os.close(fd)
            os.environ.pop(SECRET, None)
            Forks(control).run()
    return pid


@contextmanager
def _to_the_end() -> Iterator[None]:
    """In a fork: whatever happens in the block, what the other process was at does not go on."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # without an interpreter's end, which takes its time with torch
