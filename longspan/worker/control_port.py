"""Where other nodes and their ranks come in: a port of node 0 that admits those with the secret."""

import contextlib
import logging
import queue
import socket
import threading
import time

import msgspec

from longspan.errors import ConfigError
from longspan.worker.channel import Attach, Channel, Join
from longspan.worker.handshake import Unwelcome, admit

__all__ = ["ControlPort"]

logger = logging.getLogger(__name__)

_MOST_AT_THE_DOOR = 64
"""Connections that may introduce themselves at the same time; more of them wait."""

Arrival = tuple[Channel, Join | Attach]


class ControlPort:
    """Listens at one address, and lets each connection introduce itself in a thread of its own.

    So one that is silent keeps nobody waiting. What isn't a node with the secret is sent away with
    a warning in the log.

    Raises:
        ConfigError: the address is not this host's, or the port is taken.
    """

    def __init__(self, address: str, port: int, secret: bytes) -> None:
        self._secret = secret
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._at_the_door = threading.BoundedSemaphore(_MOST_AT_THE_DOOR)
        self._closed = False
        self._listener = listen(address, port)
        threading.Thread(target=self._listen, name="longspan-control-port", daemon=True).start()

    def arrival(self, timeout: float) -> Arrival | None:
        """The next one that was admitted, and how it began; None if nobody comes in time."""
        with contextlib.suppress(queue.Empty):
            return self._arrivals.get(timeout=timeout)
        return None

    def close(self) -> None:
        """Admit nobody any more."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed:
            self._at_the_door.acquire()
            try:
                connection, peer = self._listener.accept()
            except OSError:  # closed, or the peer has gone already, or too many files are open
                self._at_the_door.release()
                time.sleep(0.1)
                continue
            arguments = (connection, f"{peer[0]}:{peer[1]}")
            threading.Thread(target=self._admit, args=arguments, daemon=True).start()

    def _admit(self, connection: socket.socket, peer: str) -> None:
        try:
            channel = admit(connection, self._secret)
            message = channel.receive()
            if not isinstance(message, Join | Attach):
                raise Unwelcome("it does not say what it wants")
            self._arrivals.put((channel, message))
        except (Unwelcome, EOFError, msgspec.DecodeError) as reason:
            connection.close()
            if not self._closed:
                logger.warning("refused %s: %s", peer, reason)
        finally:
            self._at_the_door.release()


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at one address of this host; port 0 is any free one.

    Raises:
        ConfigError: the address is not this host's, or stands for all, or the port is taken.
    """
    try:
        family, _, _, _, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if found[0] in ("0.0.0.0", "::"):
            raise ConfigError(
                f"master_addr={address!r} stands for every address; give the one of node 0 that "
                "the other nodes reach"
            )
        return socket.create_server(found[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"node 0 can't listen at master_addr={address!r}, master_port={port}: {error.strerror}"
        ) from None
