"""A node that lends its ranks to the engine on node 0, for as long as that runs."""

import contextlib
import select
import socket
import time
from collections.abc import Callable

from longspan.config import EngineConfig
from longspan.errors import ConfigError, EngineStoppedError, LongspanError, RankFailedError
from longspan.models import load_spec
from longspan.worker.channel import Attach, Channel, Failed, Join, Lend, Refused
from longspan.worker.control_port import PATIENCE_SECONDS
from longspan.worker.digest import config_digest
from longspan.worker.forker import Forker
from longspan.worker.handshake import Unwelcome, dial
from longspan.worker.interface import interface_of
from longspan.worker.local_ranks import LocalRanks
from longspan.worker.secret import shared_secret

__all__ = ["lend"]

_RETRY_SECONDS = 0.5
_SETTLE_SECONDS = 0.1


def lend(config: EngineConfig, say: Callable[[str], None]) -> None:
    """Join node 0, start the ranks that it asks for, and return when it has ended.

    `say` is told in one line each what goes on. Whatever ends this, its ranks end with it, and
    node 0 is told.

    Raises:
        ConfigError: the secret or the model is missing, or node 0 does not take this node.
        RankFailedError: a rank of this node died.
    """
    secret = shared_secret()
    load_spec(config)
    Forker.current()
    name = f"node {config.node_rank} ({socket.gethostname()})"
    with contextlib.closing(_dial_patiently(config, secret, say)) as link:
        link.send(
            Join(
                config.node_rank,
                config.nnodes,
                config.context_parallel_size_local,
                socket.gethostname(),
                config.model,
                config_digest(config),
            )
        )
        say("joined; waiting for the other nodes")
        try:
            _serve(config, secret, link, f" on {name}", say)
        except BaseException as error:
            with contextlib.suppress(OSError):
                link.send(_last_words(name, error))
            raise
    say("node 0 has ended, and so does this node")


def _serve(
    config: EngineConfig, secret: bytes, link: Channel, place: str, say: Callable[[str], None]
) -> None:
    """Start the ranks and wait for the engine's end."""
    try:
        task = link.receive()
    except EOFError:
        raise EngineStoppedError("node 0 ended before all nodes had joined") from None
    if isinstance(task, Refused):
        raise ConfigError(f"node 0 refuses this node: {task.reason}")
    assert isinstance(task, Lend), task
    ranks = LocalRanks(range(task.first, task.first + task.count), place)
    try:
        for rank in ranks.ranks:
            channel = _dial(config, secret)
            channel.send(Attach(rank))
            address = channel.connection.getsockname()[0]
            ranks.spawn(rank, channel.connection, interface_of(address))
        last = task.first + task.count - 1
        named = f"rank {last}" if task.count == 1 else f"ranks {task.first} to {last}"
        say(f"lends {named} of {task.of}")
        _watch(link, ranks)
    finally:
        ranks.stop()


def _watch(link: Channel, ranks: LocalRanks) -> None:
    """Return when the engine has ended. Raises RankFailedError when a rank ends before it."""
    news = select.poll()
    news.register(link, select.POLLRDHUP)
    for process in ranks.processes.values():
        news.register(process, select.POLLIN)
    while link.fileno() not in dict(news.poll()):
        # When the engine ends, so do its ranks, and one of them may be seen to end before it.
        time.sleep(_SETTLE_SECONDS)
        if link.fileno() not in dict(news.poll()) and (error := ranks.lost()):
            raise error


def _dial_patiently(config: EngineConfig, secret: bytes, say: Callable[[str], None]) -> Channel:
    """Connect to node 0, which may not have been started yet.

    Raises:
        ConfigError: it does not come in time, or does not take this node.
    """
    waiting, begun = False, time.monotonic()
    place = f"node 0 at {config.master_addr}:{config.master_port}"
    while True:
        try:
            return _dial(config, secret)
        except socket.gaierror as error:
            raise ConfigError(f"master_addr={config.master_addr!r}: {error.strerror}") from None
        except OSError as error:
            if time.monotonic() - begun > PATIENCE_SECONDS:
                reason = error.strerror or error
                raise ConfigError(
                    f"{place} can't be reached since {PATIENCE_SECONDS:g} s: {reason}; start it "
                    "there, and see that no firewall is between"
                ) from None
            if not waiting:
                say(f"waiting for {place}")
            waiting = True
            time.sleep(_RETRY_SECONDS)


def _dial(config: EngineConfig, secret: bytes) -> Channel:
    """Connect to node 0's control port and be admitted.

    Raises:
        OSError: nobody listens there.
        ConfigError: whoever does is not node 0, or refuses this node.
    """
    host, port = config.master_addr, config.master_port
    try:
        return dial(host, port, secret)
    except Unwelcome as error:
        raise ConfigError(f"can't join node 0 at {host}:{port}: {error}") from None


def _last_words(name: str, error: BaseException) -> Failed:
    """What node 0 is told of this node's end."""
    if isinstance(error, RankFailedError):
        return Failed(RankFailedError.__name__, str(error))
    if isinstance(error, LongspanError):
        return Failed(type(error).__name__, f"{name}: {error}")
    reasons = {KeyboardInterrupt: "was interrupted", SystemExit: "was terminated"}
    reason = reasons.get(type(error), f"failed: {type(error).__name__}: {error}")
    return Failed(RankFailedError.__name__, f"{name} {reason}")
