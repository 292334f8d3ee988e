"""Ranks as processes, one each, on this host and on others that lend theirs."""

import contextlib
import dataclasses
import selectors
import socket

from longspan.config import EngineConfig
from longspan.topology import Topology
from longspan.worker.channel import Channel
from longspan.worker.channel_executor import ChannelExecutor
from longspan.worker.control_port import ControlPort
from longspan.worker.digest import config_digest
from longspan.worker.interface import interface_of
from longspan.worker.launch import kind_of_device
from longspan.worker.local_ranks import LocalRanks
from longspan.worker.nodes import Node, gather, start_ranks
from longspan.worker.secret import shared_secret


class ProcessExecutor(ChannelExecutor):
    """Starts this host's ranks, takes in those of other nodes, and talks to each over a socket.

    For a rank of this host it is one of a pair that has no address, so nobody else can connect; for
    one of another node it is a connection that its node made to the control port.
    """

    _local: LocalRanks

    @property
    def pids(self) -> list[int]:
        """The processes of this host's ranks."""
        return [process.pid for process in self._local.processes.values()]

    def _start_ranks(self, config: EngineConfig) -> tuple[EngineConfig, str]:
        config = dataclasses.replace(config, device=kind_of_device(config.device))
        place = f" on node 0 ({socket.gethostname()})" if config.nnodes > 1 else ""
        self._local = LocalRanks(range(config.num_local_ranks), place)
        self._hosts.append(self._local)
        rendezvous, interface = f"file://{self._local.folder}/rendezvous", "lo"
        if config.nnodes > 1:
            address = self._take_in_nodes(config)
            rendezvous, interface = self._open_store(address), interface_of(address)
        sizes = [len(host.ranks) for host in self._hosts]
        self.topology = Topology.of_hosts(sizes, shared_device=config.device == "cpu")
        for rank in self._local.ranks:
            ours, theirs = socket.socketpair()
            self._channels[rank] = Channel(ours)
            self._local.spawn(rank, theirs, interface)
        return config, rendezvous

    def _take_in_nodes(self, config: EngineConfig) -> str:
        """Wait until the other nodes have come, and their ranks; returns this node's address."""
        nodes: list[Node] = []
        port = ControlPort(config.master_addr, config.master_port, shared_secret())
        with contextlib.closing(port):
            try:
                gather(config, config_digest(config), port, nodes)
            finally:
                self._hosts += nodes
            start_ranks(config.num_ranks, port, nodes, self._channels)
        for node in nodes:
            self._models |= dict.fromkeys(node.ranks, node.model)
            self._selector.register(node.channel, selectors.EVENT_READ, None)
        return port.address
