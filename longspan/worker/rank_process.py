"""One rank's process, as whoever asked for it knows it: its number, its end, how to end it."""

import os
import select
import struct
from io import FileIO

import msgspec

__all__ = ["GRACE_SECONDS", "NUMBER", "RankProcess", "Spawn"]

GRACE_SECONDS = 3.0
"""How long ranks have to end by themselves before they are killed."""

NUMBER = struct.Struct("=i")
"""What is told of a rank: first the number of its process, later with what that has ended."""


class Spawn(msgspec.Struct, frozen=True):
    """What a new rank is told besides its channel.

    Gloo talks to the other ranks over a network `interface`, and torch computes with so many
    `threads`, unless the environment says otherwise. If the engine dies, the rank removes its
    temporary `folder`.
    """

    interface: str
    threads: int
    folder: str


class RankProcess:
    """A rank that another process is to fork.

    It gets `theirs`, the other ends of two pipes: of the lifeline, to which the rank holds on, and
    of the news of its birth and death. When the lifeline is let go of here, the rank ends, and is
    killed if it hasn't soon after.
    """

    def __init__(self) -> None:
        lifeline, self._lifeline = _pipe()
        self._news, news = _pipe()
        self.theirs = (lifeline, news)
        self.pid = 0
        self.ended = False
        self.returncode: int | None = None
        """As of `subprocess`: below 0 if killed by a signal. None if nobody is left who knows."""

    def await_birth(self) -> None:
        """Raises EOFError if there will be none, since who was to fork it has ended."""
        for end in self.theirs:
            end.close()
        data = self._news.read(NUMBER.size)
        if not data:
            raise EOFError
        (self.pid,) = NUMBER.unpack(data)

    def fileno(self) -> int:
        """Can be read when it has ended."""
        return self._news.fileno()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, or does within some seconds."""
        news = select.poll()
        news.register(self._news, select.POLLIN)
        if not self.ended and news.poll(1000 * seconds):
            self.ended = True
            if data := self._news.read(NUMBER.size):
                (self.returncode,) = NUMBER.unpack(data)
        return self.ended

    def let_go(self) -> None:
        """Have it end; how it does can still be read."""
        self._lifeline.close()

    def close(self) -> None:
        """Have it end, and hear no more of it."""
        for end in (*self.theirs, self._lifeline, self._news):
            end.close()


def _pipe() -> tuple[FileIO, FileIO]:
    """Both ends of a new pipe: to read from, to write to."""
    reading, writing = os.pipe()
    return FileIO(reading, "r"), FileIO(writing, "w")
