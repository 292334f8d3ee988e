"""Messages between the engine and its worker processes: msgspec frames over a socket."""

import socket

import msgspec

from longspan.config import EngineConfig
from longspan.cost.rates import Rates
from longspan.cost.samples import Samples
from longspan.models import ModelSpec
from longspan.plan import RankPlan, RankResult


class Start(msgspec.Struct, tag=True, frozen=True):
    """Engine to worker, once: who it is and what it serves. `rendezvous` is a file's path."""

    config: EngineConfig
    spec: ModelSpec
    rank: int
    rendezvous: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Worker to engine, once: the model is loaded, and this is what the rank has and does."""

    num_pages: int
    rates: Rates


class Execute(msgspec.Struct, tag=True, frozen=True):
    plan: RankPlan


class Done(msgspec.Struct, tag=True, frozen=True):
    result: RankResult


class Measure(msgspec.Struct, tag=True, frozen=True):
    """Engine to all workers, before any plan: measure your device and links."""


class Measured(msgspec.Struct, tag=True, frozen=True):
    samples: Samples


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Worker to engine: what it was told could not be done, and it does nothing more.

    `kind` is the name of the error's class; `details` its traceback, or empty if the message
    tells a user all that there is to know.
    """

    kind: str
    message: str
    details: str


Message = Start | Ready | Execute | Done | Measure | Measured | Failed


_LENGTH_BYTES = 8


class Channel:
    """Whole messages over a connected stream socket; each is preceded by its length."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Message) -> None:
        """Send one message whole. Raises OSError when the other side has gone."""
        frame = self._encoder.encode(message)
        self.connection.sendall(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame)

    def receive(self) -> Message:
        """Wait for one message. Raises EOFError when the other side has gone."""
        length = int.from_bytes(self._read(_LENGTH_BYTES), "little")
        message: Message = self._decoder.decode(self._read(length))
        return message

    def close(self) -> None:
        self.connection.close()

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self.connection.recv(min(size - len(data), 1 << 20))
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError("the other side has closed the channel")
            data += part
        return bytes(data)
