"""A server from its start to its end: one process that listens, and the ranks."""

import asyncio
import dataclasses
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType

import uvicorn

from longspan.config import EngineConfig
from longspan.engine.async_engine import ABORT_SECONDS, AsyncEngine
from longspan.errors import ConfigError
from longspan.server.app import build_app
from longspan.server.config import ServerConfig
from longspan.server.serving import Serving
from longspan.start import start_engine

_BACKLOG = 2048


def serve(config: EngineConfig, server: ServerConfig, say: Callable[[str], None]) -> None:
    """Serve a model until SIGTERM or Ctrl-C; `say` is given the lines that a person wants to see.

    Raises:
        ConfigError: the address can't be listened at, or an engine's option is wrong.
        UnsupportedModelError, RankFailedError: as for `start_engine`.
    """
    logging.basicConfig(
        level=max(server.log_threshold, logging.WARNING),  # of libraries
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("longspan").setLevel(server.log_threshold)
    # A single rank is a process, too: while it computes in this one, others would have to wait.
    backend = config.distributed_executor_backend or "mp"
    config = dataclasses.replace(config, distributed_executor_backend=backend)
    with closing(_bound(server)) as listener:
        front = AsyncEngine(start_engine(config), server.max_waiting_requests)
        try:
            serving = Serving(front, server)
            for line in _summary(serving):
                say(line)
            address = _url(server, listener)
            _Program(serving, lambda: say(f"listening at     {address}")).run(sockets=[listener])
        finally:
            front.stop()


class _Program(uvicorn.Server):
    """uvicorn's server, which at its end lets running requests finish as far as is allowed."""

    def __init__(self, serving: Serving, ready: Callable[[], None]) -> None:
        config = serving.config
        super().__init__(
            uvicorn.Config(
                build_app(serving),
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                backlog=_BACKLOG,
                timeout_graceful_shutdown=math.ceil(config.drain_timeout + 2 * ABORT_SECONDS),
                ssl_keyfile=config.ssl_keyfile,
                ssl_certfile=config.ssl_certfile,
            )
        )
        self._serving = serving
        self._ready = ready
        self._interrupted = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals end the server in order. Of both only Ctrl-C is an error afterwards."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._interrupted:
            raise KeyboardInterrupt

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drained = asyncio.create_task(
            self._serving.engine.drain(self._serving.config.drain_timeout)
        )
        await super().shutdown(sockets)  # closes its sockets, then waits for what is under way
        drained.cancel()


def _bound(server: ServerConfig) -> socket.socket:
    """A socket at the server's address. Taken before the model is loaded, which may take long."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"host={server.host!r} port={server.port} can't be listened at: {error.strerror}; "
            "give another --port or --host"
        ) from None
    return listener


def _url(server: ServerConfig, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{server.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _summary(serving: Serving) -> Iterator[str]:
    """What will be served, in a few lines."""
    engine = serving.engine.engine
    config, ledger = engine.config, engine.ledger
    each = [pages * ledger.page_size for pages in ledger.num_pages]
    named = "" if serving.model == config.model else f", as {serving.model}"
    alike = len(set(each)) == 1
    shown = f"{len(each)} x {each[0]:,}" if alike else " + ".join(f"{one:,}" for one in each)
    yield f"model            {config.model}{named}"
    yield f"ranks            {config.num_ranks}"
    yield f"KV capacity      {ledger.num_tokens:,} tokens: {shown}"
    yield f"longest context  {engine.context_limit:,} tokens"
