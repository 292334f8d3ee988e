"""The other nodes as node 0 sees them: who joins, which ranks they bring, and how they are lost."""

import contextlib
import logging
import select
import time

from longspan.config import EngineConfig
from longspan.errors import LongspanError, RankFailedError
from longspan.worker.channel import Attach, Channel, Failed, Join, Lend, Refused
from longspan.worker.control_port import ControlPort

__all__ = ["Node", "attach", "gather"]

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 1.0
"""After so long without a node it is said who is waited for."""


class Node:
    """Another host that lends `ranks`. Its agent's channel tells when one of them has ended."""

    def __init__(self, join: Join, channel: Channel, num_ranks: int) -> None:
        self.rank = join.node_rank
        self.model = join.model
        self.name = f"node {join.node_rank} ({join.host})"
        self.num_ranks = num_ranks
        self.ranks = range(0)
        self.channel = channel

    @property
    def own_address(self) -> str:
        """The address of node 0 by which this node has reached it."""
        address: str = self.channel.connection.getsockname()[0]
        return address

    def lost(self) -> LongspanError | None:
        """How the node or one of its ranks ended, if one has."""
        news = select.poll()
        news.register(self.channel, select.POLLIN)
        if not news.poll(0):
            return None
        try:
            message = self.channel.receive()
        except EOFError:
            return RankFailedError(f"{self.name} was lost: it was ended or can't be reached")
        assert isinstance(message, Failed), message
        return message.error or RankFailedError(f"{self.name}: {message.kind}: {message.message}")

    def stop(self) -> None:
        """Let go of the node, which ends its ranks then."""
        self.channel.close()


def gather(config: EngineConfig, digest: str, port: ControlPort, nodes: list[Node]) -> None:
    """Wait until all other nodes have joined; they are in `nodes` then, in order.

    Whoever doesn't fit is sent away, and one that leaves again may come back.
    """
    begun, said = time.monotonic(), ""
    while missing := sorted({*range(1, config.nnodes)} - {node.rank for node in nodes}):
        waiting = f"waiting for node {', '.join(map(str, missing))} of {config.nnodes}"
        if waiting != said and time.monotonic() - begun > _PATIENCE_SECONDS:
            said = waiting
            logger.warning("%s at %s:%d", waiting, config.master_addr, config.master_port)
        for node in [node for node in nodes if node.lost()]:
            logger.warning("%s has left again", node.name)
            nodes.remove(node)
            node.stop()
        arrival = port.arrival(timeout=0.2)
        if arrival is None:
            continue
        channel, join = arrival
        if not isinstance(join, Join):
            _send_away(channel, "a rank", "its node has not joined")
        elif reason := _misfit(join, config, digest, nodes):
            _send_away(channel, f"node {join.node_rank} ({join.host})", reason)
        else:
            nodes.append(Node(join, channel, join.num_ranks or config.num_ranks // config.nnodes))
    nodes.sort(key=lambda node: node.rank)
    first = config.num_local_ranks
    for node in nodes:
        node.ranks = range(first, first := first + node.num_ranks)


def _misfit(join: Join, config: EngineConfig, digest: str, nodes: list[Node]) -> str | None:
    """Why a node can't be one of this engine's, if it can't."""
    if join.nnodes != config.nnodes:
        return f"it is one of nnodes={join.nnodes}, node 0 has nnodes={config.nnodes}"
    if not 1 <= join.node_rank < config.nnodes:
        return f"node_rank={join.node_rank} is not one of 1 to {config.nnodes - 1}"
    if any(node.rank == join.node_rank for node in nodes):
        return f"node_rank={join.node_rank} has joined already"
    if join.digest != digest:
        return f"the config.json of its model={join.model!r} is not that of node 0"
    if join.num_ranks is None and config.num_ranks % config.nnodes:
        return (
            f"context_parallel_size={config.num_ranks} can't be shared evenly by "
            f"nnodes={config.nnodes}; set its context_parallel_size_local"
        )
    brought = join.num_ranks or config.num_ranks // config.nnodes
    left = config.num_ranks - config.num_local_ranks - sum(node.num_ranks for node in nodes)
    others = config.nnodes - 2 - len(nodes)  # are still to come, each with a rank at least
    if brought > left - others or (not others and brought < left):
        return (
            f"it brings {brought} ranks, and {left - others} are left of "
            f"context_parallel_size={config.num_ranks}; set context_parallel_size_local"
        )
    return None


def attach(num_ranks: int, port: ControlPort, nodes: list[Node], into: dict[int, Channel]) -> None:
    """Have the nodes start their ranks; each rank's channel is put `into` a dictionary.

    Raises:
        RankFailedError: a node was lost; or another error that it tells of.
    """
    for node in nodes:
        with contextlib.suppress(OSError):  # it will be found lost
            node.channel.send(Lend(node.ranks.start, node.num_ranks, num_ranks))
    missing = {rank for node in nodes for rank in node.ranks}
    while missing:
        for error in filter(None, (node.lost() for node in nodes)):
            raise error
        arrival = port.arrival(timeout=0.2)
        if arrival is None:
            continue
        channel, message = arrival
        if isinstance(message, Attach) and message.rank in missing:
            into[message.rank] = channel
            missing.remove(message.rank)
        else:
            _send_away(channel, "a latecomer", "all nodes and ranks have come")


def _send_away(channel: Channel, name: str, reason: str) -> None:
    logger.warning("refused %s: %s", name, reason)
    with contextlib.suppress(OSError):
        channel.send(Refused(reason))
    channel.close()
