"""Messages between the engine and its worker processes: msgspec frames over a socket."""

import socket

import msgspec

from longspan import errors
from longspan.config import EngineConfig
from longspan.cost.rates import Rates
from longspan.cost.samples import MessageSample, Samples
from longspan.errors import LongspanError
from longspan.models import ModelSpec
from longspan.plan import RankPlan, RankResult
from longspan.topology import Topology


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Both ways, first on a connection over a network: what runs here, and a number used once."""

    release: str
    nonce: bytes


class Proof(msgspec.Struct, tag=True, frozen=True):
    """Both ways: that the sender knows the secret, made of both nonces."""

    mac: bytes


class Refused(msgspec.Struct, tag=True, frozen=True):
    """Node 0 to a node, last on a connection: why it may not join."""

    reason: str


class Join(msgspec.Struct, tag=True, frozen=True):
    """Node to node 0: it would lend so many ranks, or an even share if None.

    They load its own `model`; `digest` tells whether that has the same config.json as node 0's.
    """

    node_rank: int
    nnodes: int
    num_ranks: int | None
    host: str
    model: str
    digest: str


class Lend(msgspec.Struct, tag=True, frozen=True):
    """Node 0 to a node: start the ranks `first .. first + count - 1` of `of`."""

    first: int
    count: int
    of: int


class Attach(msgspec.Struct, tag=True, frozen=True):
    """Node to node 0, on a connection of its own: from here on, this is a rank's channel."""

    rank: int


class Start(msgspec.Struct, tag=True, frozen=True):
    """Engine to worker, once: who it is and what it serves.

    The ranks meet at `rendezvous`: tcp://host:port, or file:///path on one host.
    """

    config: EngineConfig
    spec: ModelSpec
    rank: int
    topology: Topology
    rendezvous: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Worker to engine, once: the model is loaded, and this is what the rank has and does.

    `messages` are what it measured of its links, if it did; `digest` tells whether it is the same
    model on all ranks. `transport` names what carries messages between ranks, and `joins` tells
    whether they can compute joint steps, which is the same for all.
    """

    num_pages: int
    rates: Rates
    messages: tuple[MessageSample, ...]
    digest: str
    transport: str
    joins: bool


class Execute(msgspec.Struct, tag=True, frozen=True):
    plan: RankPlan


class Done(msgspec.Struct, tag=True, frozen=True):
    result: RankResult


class Measure(msgspec.Struct, tag=True, frozen=True):
    """Engine to all workers, before any plan: measure your device and links."""


class Measured(msgspec.Struct, tag=True, frozen=True):
    samples: Samples


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Worker or node to engine: what it was told could not be done, and it does nothing more.

    `kind` is the name of the error's class; `details` its traceback, or empty if the message
    tells a user all that there is to know.
    """

    kind: str
    message: str
    details: str = ""

    @property
    def error(self) -> LongspanError | None:
        """The error, if it is one of Longspan's own, which says it all."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, LongspanError):
            return kind(self.message)
        return None


Message = (
    Hello
    | Proof
    | Refused
    | Join
    | Lend
    | Attach
    | Start
    | Ready
    | Execute
    | Done
    | Measure
    | Measured
    | Failed
)


_LENGTH_BYTES = 8


class Channel:
    """Whole messages over a connected stream socket; each is preceded by its length.

    A message of more than `limit` bytes is not read, if there is a limit.
    """

    def __init__(self, connection: socket.socket, limit: int | None = None) -> None:
        self.connection = connection
        self.limit = limit
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Message) -> None:
        """Send one message whole. Raises OSError when the other side has gone."""
        frame = self._encoder.encode(message)
        self.connection.sendall(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame)

    def receive(self) -> Message:
        """Wait for one message.

        Raises:
            EOFError: the other side has gone, or can't be reached any more.
            msgspec.DecodeError: this is no message, or a longer one than `limit`.
        """
        length = int.from_bytes(self._read(_LENGTH_BYTES), "little")
        if self.limit is not None and length > self.limit:
            raise msgspec.DecodeError(f"a message of {length} bytes, more than {self.limit}")
        message: Message = self._decoder.decode(self._read(length))
        return message

    def close(self) -> None:
        self.connection.close()

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self.connection.recv(min(size - len(data), 1 << 20))
            except OSError:  # reset, or silent for too long
                part = b""
            if not part:
                raise EOFError("the other side has closed the channel")
            data += part
        return bytes(data)
