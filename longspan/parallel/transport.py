"""The seam between ranks: tensors to and from other ranks, asynchronously, and what they cost."""

import queue
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.plan import Traffic
from longspan.topology import Topology

Message = tuple[int, Tensor]
Wait = Callable[[], None]


class Transport(ABC):
    """Sends and receives contiguous tensors between ranks 0 .. size - 1.

    Messages between two ranks arrive in the order in which they were sent; both sides know every
    size beforehand. A message of no bytes is not sent, on either side.
    """

    name: str
    """What carries the messages."""

    def __init__(self, rank: int, topology: Topology) -> None:
        self.rank = rank
        self.size = topology.num_ranks
        self.topology = topology
        self._traffic: defaultdict[str, Traffic] = defaultdict(Traffic)

    def exchange(self, label: str, sends: Sequence[Message], receives: Sequence[Message]) -> Wait:
        """Start to send tensors to ranks and to fill tensors from ranks; counted under `label`.

        One send and one receive are a step of a ring; several are an all-to-all with uneven
        splits. Returns a function that waits until every receive is filled and every sent tensor
        may be written again.
        """
        sends = [(rank, tensor) for rank, tensor in sends if tensor.numel()]
        receives = [(rank, tensor) for rank, tensor in receives if tensor.numel()]
        if not sends and not receives:
            return lambda: None
        traffic = self._traffic[label]
        traffic.calls += 1
        traffic.messages += len(sends)
        hosts = self.topology.hosts
        for peer, tensor in sends:
            traffic.bytes += tensor.nbytes
            if hosts[peer] != hosts[self.rank]:
                traffic.far_bytes += tensor.nbytes
        return self._start(sends, receives)

    def take_traffic(self) -> dict[str, Traffic]:
        """What was sent since the last call, for each label."""
        taken, self._traffic = dict(self._traffic), defaultdict(Traffic)
        return taken

    @abstractmethod
    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Wait: ...


class TorchTransport(Transport):
    """Ranks are the processes of a `torch.distributed` group: gloo on CPU, NCCL on CUDA."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, topology: Topology | None = None
    ) -> None:
        topology = topology or Topology.of_hosts([dist.get_world_size(group)])
        super().__init__(dist.get_rank(group), topology)
        self.name = dist.get_backend(group)
        self._group = group
        self._peers = dist.get_process_group_ranks(group or dist.group.WORLD)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Wait:
        # Bytes, since not every backend knows every number type.
        operations = [
            dist.P2POp(operation, tensor.view(torch.uint8), self._peers[peer], self._group)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for work in works:
                work.wait()

        return wait


class ThreadTransport(Transport):
    """Ranks are threads of this process. `connect` makes those of one fleet."""

    name = "threads"

    def __init__(
        self,
        rank: int,
        topology: Topology,
        mailboxes: list[list["queue.SimpleQueue[Tensor]"]],
        stopped: threading.Event,
    ) -> None:
        super().__init__(rank, topology)
        self._mailboxes = mailboxes
        self._stopped = stopped
        self._expected = [0] * len(mailboxes)
        self._num_arrived = [0] * len(mailboxes)
        self._arrived: list[dict[int, Tensor]] = [{} for _ in mailboxes]

    @classmethod
    def connect(cls, topology: Topology) -> list["ThreadTransport"]:
        size = topology.num_ranks
        mailboxes: list[list[queue.SimpleQueue[Tensor]]] = [
            [queue.SimpleQueue() for _ in range(size)] for _ in range(size)
        ]
        stopped = threading.Event()
        return [cls(rank, topology, mailboxes, stopped) for rank in range(size)]

    def stop(self) -> None:
        """Make every rank's waits fail, so that no thread waits for one that has failed."""
        self._stopped.set()

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Wait:
        for peer, tensor in sends:
            self._mailboxes[self.rank][peer].put(tensor.clone())

        # Messages are matched in the order in which receives were started, not waited for.
        tickets = [self._ticket(peer) for peer, _ in receives]

        def wait() -> None:
            for (peer, tensor), ticket in zip(receives, tickets, strict=True):
                message = self._take(peer, ticket)
                assert message.shape == tensor.shape, (peer, message.shape, tensor.shape)
                tensor.copy_(message)

        return wait

    def _ticket(self, peer: int) -> int:
        self._expected[peer] += 1
        return self._expected[peer] - 1

    def _take(self, peer: int, ticket: int) -> Tensor:
        arrived = self._arrived[peer]
        while ticket not in arrived:
            arrived[self._num_arrived[peer]] = self._next(peer)
            self._num_arrived[peer] += 1
        return arrived.pop(ticket)

    def _next(self, peer: int) -> Tensor:
        while not self._stopped.is_set():
            try:
                return self._mailboxes[peer][self.rank].get(timeout=0.05)
            except queue.Empty:
                continue
        raise ConnectionAbortedError(f"rank {peer} stopped before rank {self.rank} heard from it")
