"""Both sides of a connection between hosts prove to each other that they know the same secret.

Each sends a nonce; each answers with the HMAC of its role and both nonces. So the secret doesn't
travel, an answer is good for one connection, and none can be sent back to where it came from. The
node proves itself first, node 0 only to one that has. Until then messages are small, and all of it
takes `SECONDS` at most. What follows is neither encrypted nor signed: a private network is taken
for granted, as torch.distributed does.
"""

import contextlib
import hmac
import secrets
import socket
import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import Literal, NoReturn, TypeVar

import msgspec

from longspan.worker.channel import Channel, Hello, Proof, Refused
from longspan.worker.secret import SECRET

__all__ = ["SECONDS", "Unwelcome", "admit", "dial", "introduce"]

SECONDS = 5.0
"""How long the other side may take for all of its introduction."""

PROTOCOL = 1
"""Changes with the messages between hosts."""

_MAX_MESSAGE_BYTES = 1024

_LOST_AFTER_SECONDS = 7
"""How long a host may be silent before its connections end."""


class Unwelcome(Exception):
    """What has connected may not come in; says why."""


def release() -> str:
    """What has to be the same on all hosts."""
    names = ("longspan", "torch", "transformers")
    versions = [f"{name} {version(name).partition('+')[0]}" for name in names]
    return f"{', '.join(versions)}, protocol {PROTOCOL}"


def admit(connection: socket.socket, secret: bytes) -> Channel:
    """Node 0's side, for whatever has connected.

    Raises:
        Unwelcome: it is not a Longspan node of this release that knows the secret; it has been
            told so, if it speaks the language.
    """
    channel = Channel(connection, _MAX_MESSAGE_BYTES)
    with _in_time(connection):
        ours, theirs = _greet(channel)
        if theirs.release != ours.release:
            _refuse(channel, f"it runs {theirs.release}, node 0 {ours.release}")
        proof = _receive(channel, Proof)
        if not hmac.compare_digest(proof.mac, _mac(secret, "node", theirs, ours)):
            _refuse(channel, f"its {SECRET} is not node 0's")
        channel.send(Proof(_mac(secret, "engine", ours, theirs)))
    return _open(channel)


def introduce(connection: socket.socket, secret: bytes) -> Channel:
    """A node's side, towards what should be node 0.

    Raises:
        Unwelcome: it is not, or it refuses this node.
    """
    channel = Channel(connection, _MAX_MESSAGE_BYTES)
    with _in_time(connection):
        ours, theirs = _greet(channel)
        if theirs.release != ours.release:
            raise Unwelcome(f"it runs {theirs.release}, this node {ours.release}")
        channel.send(Proof(_mac(secret, "node", ours, theirs)))
        proof = _receive(channel, Proof)
        if not hmac.compare_digest(proof.mac, _mac(secret, "engine", theirs, ours)):
            raise Unwelcome(f"it does not know this node's {SECRET}")
    return _open(channel)


def dial(address: str, port: int, secret: bytes) -> Channel:
    """Connect to the engine's control port and be admitted.

    Raises:
        OSError: nobody listens there.
        Unwelcome: whoever does is not the engine, or refuses this side.
    """
    connection = socket.create_connection((address, port), timeout=SECONDS)
    connection.settimeout(None)
    try:
        return introduce(connection, secret)
    except BaseException:
        connection.close()
        raise


def _greet(channel: Channel) -> tuple[Hello, Hello]:
    """What both sides do first."""
    ours = Hello(release(), secrets.token_bytes(32))
    channel.send(ours)
    return ours, _receive(channel, Hello)


def _mac(secret: bytes, role: Literal["engine", "node"], own: Hello, other: Hello) -> bytes:
    return hmac.digest(secret, role.encode() + own.nonce + other.nonce, "sha256")


_M = TypeVar("_M", Hello, Proof)


def _receive(channel: Channel, kind: type[_M]) -> _M:
    message = channel.receive()
    if isinstance(message, Refused):
        raise Unwelcome(f"it refuses this node: {message.reason}")
    if not isinstance(message, kind):
        raise Unwelcome("it does not introduce itself as Longspan does")
    return message


def _refuse(channel: Channel, reason: str) -> NoReturn:
    channel.send(Refused(reason))
    raise Unwelcome(reason)


@contextlib.contextmanager
def _in_time(connection: socket.socket) -> Iterator[None]:
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(SECONDS, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except msgspec.DecodeError:
        raise Unwelcome("it is not Longspan") from None
    except (EOFError, OSError):
        reason = f"it was silent for {SECONDS:g} s" if late.is_set() else "it hung up"
        raise Unwelcome(reason) from None
    finally:
        timer.cancel()


def _open(channel: Channel) -> Channel:
    """From now on messages have any size, go at once, and end when the other host does."""
    channel.limit = None
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 2),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, _LOST_AFTER_SECONDS - 2),
        (socket.TCP_USER_TIMEOUT, 1000 * _LOST_AFTER_SECONDS),
    ):
        channel.connection.setsockopt(socket.IPPROTO_TCP, option, value)
    channel.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return channel
