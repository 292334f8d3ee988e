"""Where other nodes and their ranks come in: a port of node 0 that admits those with the secret."""

import contextlib
import errno
import logging
import queue
import socket
import threading
import time
from collections.abc import Sequence

import msgspec

from longspan.errors import ConfigError, RankFailedError
from longspan.worker.channel import Attach, Channel, Join, Refused
from longspan.worker.handshake import Unwelcome, admit
from longspan.worker.host import Host

__all__ = ["ControlPort"]

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0
"""How long nodes wait for each other, and the engine for a rank that is being started."""

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
        self.address: str = self._listener.getsockname()[0]
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, name="longspan-control-port", daemon=True).start()

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"

    def arrival(self, timeout: float) -> Arrival | None:
        """The next one that was admitted, and how it began; None if nobody comes in time."""
        with contextlib.suppress(queue.Empty):
            return self._arrivals.get(timeout=timeout)
        return None

    def attach(self, hosts: Sequence[Host], into: dict[int, Channel]) -> None:
        """Wait for all ranks of some hosts; each one's channel is put `into` a dictionary.

        Raises:
            LongspanError: how a host or a rank was lost; RankFailedError: one has not come in time.
        """
        missing = {rank: host for host in hosts for rank in host.ranks}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while missing:
            for error in filter(None, (host.lost() for host in hosts)):
                raise error
            if time.monotonic() > deadline:
                rank, host = min(missing.items())
                raise RankFailedError(
                    f"rank {rank}{host.place(rank)} has not connected to {self} within "
                    f"{PATIENCE_SECONDS:g} s"
                )
            arrival = self.arrival(timeout=0.2)
            if arrival is None:
                continue
            channel, message = arrival
            if isinstance(message, Attach) and message.rank in missing:
                into[message.rank] = channel
                del missing[message.rank]
            else:
                refuse(channel, "a latecomer", "all nodes and ranks have come")

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


def refuse(channel: Channel, name: str, reason: str) -> None:
    """Send one away that was admitted, and say so in the log."""
    logger.warning("refused %s: %s", name, reason)
    with contextlib.suppress(OSError):
        channel.send(Refused(reason))
    channel.close()


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
        remedies = {
            errno.EADDRINUSE: "another program listens there: give all nodes another master_port",
            errno.EADDRNOTAVAIL: "give the address of this host that the other nodes reach",
        }
        reason = (error.strerror or "").partition(" (while")[0]  # which says the address again
        remedy = remedies.get(error.errno or 0, "")
        raise ConfigError(
            f"node 0 can't listen at master_addr={address!r}, master_port={port}: "
            f"{reason}; {remedy}".removesuffix("; ")
        ) from None
