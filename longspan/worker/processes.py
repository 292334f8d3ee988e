"""The fleet of an engine: ranks as processes, one each, on this host and on others."""

import contextlib
import dataclasses
import selectors
import socket
import time
import weakref
from collections.abc import Mapping
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from longspan.config import EngineConfig
from longspan.cost.samples import Samples
from longspan.errors import ConfigError, EngineStoppedError, LongspanError, RankFailedError
from longspan.models import ModelSpec
from longspan.plan import RankPlan, RankResult
from longspan.topology import Topology
from longspan.worker.channel import Channel, Done, Execute, Failed, Measure, Measured, Ready, Start
from longspan.worker.control_port import ControlPort, listen
from longspan.worker.digest import config_digest
from longspan.worker.handshake import shared_secret
from longspan.worker.interface import interface_of
from longspan.worker.launch import kind_of_device
from longspan.worker.local_ranks import GRACE_SECONDS, LocalRanks
from longspan.worker.nodes import Node, attach, gather

_CAUSE_SECONDS = 0.5
"""How long a rank's failure may come before the death of the peer that is its cause."""


class ProcessExecutor:
    """Starts this host's ranks, takes in those of other nodes, and talks to each over a socket.

    For a rank of this host it is one of a pair that has no address, so nobody else can connect; for
    one of another node it is a connection that its node made to the control port. A worker that
    sees its end closed ends itself, so that not even a killed engine leaves one behind.
    """

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        config = dataclasses.replace(config, device=kind_of_device(config.device))
        place = f" on node 0 ({socket.gethostname()})" if config.nnodes > 1 else ""
        self._local = LocalRanks(config.num_local_ranks, place)
        self._nodes: list[Node] = []
        self._channels: dict[int, Channel] = {}
        self._selector = selectors.DefaultSelector()
        self._at_work: set[int] = set()
        self.close = weakref.finalize(
            self, _stop, self._selector, self._channels, self._nodes, self._local
        )
        try:
            rendezvous = f"file://{self._local.folder}/rendezvous"
            interface = "lo"
            if config.nnodes > 1:
                self._take_in_nodes(config)
                rendezvous, interface = self._open_store(config.master_addr)
            for rank in range(config.num_local_ranks):
                ours, theirs = socket.socketpair()
                self._channels[rank] = Channel(ours)
                self._local.spawn(rank, theirs, interface)
            self._introduce(config, spec, rendezvous)
            ready = self._all_ready()
        except BaseException:
            self.close()
            raise
        self.num_pages = tuple(ready[rank].num_pages for rank in range(config.num_ranks))
        self.rates = ready[0].rates

    @property
    def pids(self) -> list[int]:
        """The processes of this host's ranks."""
        return [process.pid for process in self._local.processes.values()]

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        """Begin a step on ranks that are not at work. A dead rank is noticed by `wait`.

        Raises:
            EngineStoppedError: the fleet has been stopped before.
        """
        if not self.close.alive:
            raise EngineStoppedError("the engine has been stopped; make a new one")
        try:
            for rank, plan in plans.items():
                self._at_work.add(rank)
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
        self._at_work -= done.keys()
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

    def _take_in_nodes(self, config: EngineConfig) -> None:
        """Wait until the other nodes have come, and their ranks."""
        port = ControlPort(config.master_addr, config.master_port, shared_secret())
        with contextlib.closing(port):
            gather(config, config_digest(config), port, self._nodes)
            attach(config.num_ranks, port, self._nodes, self._channels)

    def _open_store(self, address: str) -> tuple[str, str]:
        """Where ranks of several hosts find each other, and the interface that it is on."""
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
        return f"tcp://{host}:{port}", interface_of(address)

    def _introduce(self, config: EngineConfig, spec: ModelSpec, rendezvous: str) -> None:
        """Tell all ranks who they are; those of a node load its own copy of the model."""
        sizes = [config.num_local_ranks, *(node.num_ranks for node in self._nodes)]
        self.topology = Topology.of_hosts(sizes, shared_device=config.device == "cpu")
        models = {rank: node.model for node in self._nodes for rank in node.ranks}
        for rank, channel in self._channels.items():
            own = dataclasses.replace(config, model=models.get(rank, config.model))
            with contextlib.suppress(OSError):  # it will be found dead
                channel.send(Start(own, spec, rank, self.topology, rendezvous))
            self._selector.register(channel, selectors.EVENT_READ, rank)
        for node in self._nodes:
            self._selector.register(node.channel, selectors.EVENT_READ, None)

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
        received: dict[int, ProcessExecutor._M] = {}
        for key, _ in self._selector.select(timeout):
            rank: int | None = key.data
            if rank is None:  # a node has news, none of which are good
                raise self._cause(0) or AssertionError(self._nodes)
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
            hosts: list[LocalRanks | Node] = [self._local, *self._nodes]
            for host in hosts:
                if error := host.lost():
                    return error
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)

    def _place(self, rank: int) -> str:
        for node in self._nodes:
            if rank in node.ranks:
                return f" on {node.name}"
        return self._local.place


def _stop(
    selector: selectors.BaseSelector,
    channels: dict[int, Channel],
    nodes: list[Node],
    local: LocalRanks,
) -> None:
    selector.close()
    for channel in channels.values():
        channel.close()
    for node in nodes:
        node.stop()
    local.stop()
