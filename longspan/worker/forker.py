"""The process that forks this host's ranks, as the engine or a node's agent knows it."""

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import IO, ClassVar

import msgspec

from longspan.errors import RankFailedError
from longspan.worker.preload import preload
from longspan.worker.rank_process import RankProcess, Spawn
from longspan.worker.secret import SECRET

__all__ = ["Forker"]

_LAST_LINES = 20
_INDIFFERENT = {SECRET, "PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that ranks must not have, that nobody reads, or that imports set."""


class Forker:
    """A process that imports what ranks need, and forks each of them then.

    It ends with this process, whatever happens, and leaves no rank.
    """

    in_program: ClassVar[bool] = False
    """Whether this process is a program of Longspan's own and not a user's: then it is forked
    itself, where it has one thread; it has used no GPU when the first engine starts."""

    _current: ClassVar["Forker | None"] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def prepare(cls) -> None:
        """Let another process begin with its imports, while this one does its own."""
        if not cls.in_program:
            cls.current()

    @classmethod
    def current(cls) -> "Forker":
        """This process's; another one if that has ended, or the environment is not what it was."""
        with cls._lock:
            if cls._current is None or not cls._current._is_fit():
                cls._current = cls()
            return cls._current

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            alone = self.in_program and threading.active_count() == 1
            begin = _split_off if alone else _start
            self.pid, end = begin(theirs, self._said)
        self._surroundings = _surroundings()
        weakref.finalize(self, _stop, end, self._control, self._said)

    def fork(self, spawn: Spawn, channel: socket.socket, log: IO[bytes]) -> RankProcess:
        """Start a rank that talks to the engine over `channel`; what it prints goes to `log`.

        Raises:
            RankFailedError: it can't, since this process has ended.
        """
        rank = RankProcess()
        try:
            fds = [end.fileno() for end in (channel, log, *rank.theirs)]
            socket.send_fds(self._control, [msgspec.msgpack.encode(spawn)], fds)
            rank.await_birth()
        except BaseException as error:  # also Ctrl-C: nobody holds its lifeline then
            rank.close()
            if isinstance(error, EOFError | OSError):
                raise RankFailedError("\n".join(self._last_words())) from None
            raise
        return rank

    def _is_fit(self) -> bool:
        news = select.poll()
        news.register(self._control, select.POLLRDHUP)
        return not news.poll(0) and self._surroundings == _surroundings()

    def _last_words(self) -> Iterator[str]:
        yield f"the process that starts ranks (pid {self.pid}) has ended"
        self._said.seek(0)
        yield from self._said.read().decode(errors="replace").splitlines()[-_LAST_LINES:]


def _surroundings() -> tuple[str, dict[str, str]]:
    """What a process has from the one that starts it."""
    return os.getcwd(), {k: v for k, v in os.environ.items() if k not in _INDIFFERENT}


def _start(control: socket.socket, said: IO[bytes]) -> tuple[int, Callable[[], object]]:
    """A process of its own: its number, and how to end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan.worker", str(control.fileno())],
        env={name: value for name, value in os.environ.items() if name != SECRET},
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        pass_fds=[control.fileno()],
        start_new_session=True,  # Ctrl-C reaches this process only, which ends them
    )

    def end() -> None:
        process.kill()
        process.wait()

    return process.pid, end


def _split_off(control: socket.socket, said: IO[bytes]) -> tuple[int, Callable[[], object]]:
    """A fork of this process, which needs those imports itself: its number, and how to end it."""
    preload()
    from longspan.worker.forks import split_off

    pid = split_off(control, said)

    def end() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    return pid, end


def _stop(end: Callable[[], object], control: socket.socket, said: IO[bytes]) -> None:
    """Nobody is left who could ask for a rank or has one."""
    end()
    control.close()
    said.close()
