"""Ranks that are processes of their own, each behind a channel, wherever they are."""

import contextlib
import dataclasses
import logging
import selectors
import time
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from longspan.config import EngineConfig
from longspan.cost.samples import Samples, with_links
from longspan.errors import ConfigError, EngineStoppedError, LongspanError, RankFailedError
from longspan.models import ModelSpec
from longspan.plan import RankPlan, RankResult
from longspan.topology import Topology
from longspan.worker.channel import Channel, Done, Execute, Failed, Measure, Measured, Ready, Start
from longspan.worker.control_port import listen
from longspan.worker.host import Host
from longspan.worker.rank_process import GRACE_SECONDS

__all__ = ["ChannelExecutor"]

logger = logging.getLogger(__name__)

_CAUSE_SECONDS = 0.5
"""How long a rank's failure may come before the death of the peer that is its cause."""


class ChannelExecutor(ABC):
    """Talks to each rank over a channel.

    A rank's process that sees its end closed ends itself, so that not even a killed engine leaves
    one behind. How ranks are started is told by `_start_ranks`.
    """

    topology: Topology

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        self._hosts: list[Host] = []
        self._channels: dict[int, Channel] = {}
        self._models: dict[int, str] = {}
        """Where ranks have the model, if not at `config.model`."""
        self._selector = selectors.DefaultSelector()
        self._at_work: Counter[int] = Counter()
        """How many steps each rank is still to do."""
        self.close = weakref.finalize(self, _stop, self._selector, self._channels, self._hosts)
        try:
            config, rendezvous = self._start_ranks(config)
            self._introduce(config, spec, rendezvous)
            ready = self._all_ready()
        except BaseException:
            self.close()
            raise
        if config.num_ranks > 1:
            logger.info("ranks exchange tensors over %s", ready[0].transport)
        self.joins = ready[0].joins
        self.queues = True
        self.num_pages = tuple(ready[rank].num_pages for rank in range(config.num_ranks))
        messages = [one for message in ready.values() for one in message.messages]
        self.rates = with_links(ready[0].rates, messages)

    @abstractmethod
    def _start_ranks(self, config: EngineConfig) -> tuple[EngineConfig, str]:
        """Start all ranks: fills hosts and channels, and sets the topology.

        Returns the config with the kind of device that they have, and where they meet.
        """

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        """Begin a step, or queue it. A dead rank is noticed by `wait`.

        Raises:
            EngineStoppedError: the fleet has been stopped before.
        """
        if not self.close.alive:
            raise EngineStoppedError("the engine has been stopped; make a new one")
        try:
            for rank, plan in plans.items():
                self._at_work[rank] += 1
                with contextlib.suppress(OSError):
                    self._channels[rank].send(Execute(plan))
        except BaseException:  # Ctrl-C: half a message may be sent
            self.close()
            raise

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        """Results of the ranks that are done, at least of one, or none after `timeout` seconds.

        Raises:
            RankFailedError: a rank died or raised, at work or idle; the fleet has been stopped.
        """
        if not self.close.alive:
            return {}
        try:
            done = self._receive(Done, timeout if self._at_work else 0)
        except BaseException:  # also Ctrl-C: ranks in the middle of a step can't be used again
            self.close()
            raise
        self._at_work -= Counter(done.keys())
        return {rank: message.result for rank, message in done.items()}

    def measure(self) -> list[Samples]:
        """What each rank measures of itself, all at the same time; before any plan.

        Raises:
            RankFailedError: a rank died or raised; the fleet has been stopped.
        """
        try:
            for channel in self._channels.values():
                channel.send(Measure())
            measured: dict[int, Measured] = {}
            while len(measured) < len(self._channels):
                measured |= self._receive(Measured)
        except BaseException:
            self.close()
            raise
        return [measured[rank].samples for rank in sorted(measured)]

    def _open_store(self, address: str) -> str:
        """Where ranks of several hosts find each other: a port that the system picks."""
        listener = listen(address, 0)
        address, port = listener.getsockname()[:2]
        self._store = TCPStore(  # its own socket would listen at all addresses
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        host = f"[{address}]" if ":" in address else address
        return f"tcp://{host}:{port}"

    def _introduce(self, config: EngineConfig, spec: ModelSpec, rendezvous: str) -> None:
        """Tell all ranks who they are."""
        for rank, channel in self._channels.items():
            own = dataclasses.replace(config, model=self._models.get(rank, config.model))
            with contextlib.suppress(OSError):  # it will be found dead
                channel.send(Start(own, spec, rank, self.topology, rendezvous))
            self._selector.register(channel, selectors.EVENT_READ, rank)

    def _all_ready(self) -> dict[int, Ready]:
        ready: dict[int, Ready] = {}
        while len(ready) < len(self._channels):
            ready |= self._receive(Ready)
        for rank, message in sorted(ready.items()):
            if message.digest != ready[0].digest:
                raise ConfigError(
                    f"the model that rank {rank}{self._place(rank)} has loaded is not that of rank "
                    "0; give all nodes the same weights and config"
                )
        return ready

    _M = TypeVar("_M", Ready, Done, Measured)

    def _receive(self, kind: type[_M], timeout: float | None = None) -> dict[int, _M]:
        """A message of each rank that has sent one; waits for the first of any."""
        received: dict[int, ChannelExecutor._M] = {}
        for key, _ in self._selector.select(timeout):
            rank: int | None = key.data
            if rank is None:  # a node has news, none of which are good
                raise self._cause(0) or AssertionError(self._hosts)
            try:
                message = self._channels[rank].receive()
            except EOFError:
                raise self._cause(GRACE_SECONDS) or RankFailedError(
                    f"rank {rank}{self._place(rank)} can't be reached any more"
                ) from None
            if isinstance(message, Failed):
                raise self._failure(rank, message)
            assert isinstance(message, kind), message
            received[rank] = message
        return received

    def _failure(self, rank: int, failed: Failed) -> LongspanError:
        # A rank also fails when a peer dies under it; then the peer's death is the cause.
        return (
            failed.error
            or self._cause(_CAUSE_SECONDS)
            or RankFailedError(
                f"rank {rank}{self._place(rank)} failed: {failed.kind}: {failed.message}\n"
                f"{failed.details}".rstrip()
            )
        )

    def _cause(self, seconds: float) -> LongspanError | None:
        """How a rank or a node ended, if one ends within some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            for host in self._hosts:
                if error := host.lost():
                    return error
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)

    def _place(self, rank: int) -> str:
        return next(host.place(rank) for host in self._hosts if rank in host.ranks)


def _stop(
    selector: selectors.BaseSelector, channels: dict[int, Channel], hosts: list[Host]
) -> None:
    selector.close()
    for channel in channels.values():
        channel.close()
    for host in reversed(hosts):  # other nodes are let go of before this one's ranks are waited for
        host.stop()
