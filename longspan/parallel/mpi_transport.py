"""Tensors between ranks over MPI: through shared memory, where ranks share a host."""

import os
import time
from collections.abc import Iterator, Sequence

import mpi4py
from torch import Tensor

from longspan.parallel.transport import Message, Transport, Wait
from longspan.topology import Topology

mpi4py.rc(initialize=False, finalize=False)  # whoever makes the ranks starts MPI
from mpi4py import MPI  # noqa: E402

__all__ = ["MPI", "MPITransport"]

SPIN_SECONDS, SPIN_SECONDS_OF_MANY = 1e-3, 100e-6
"""How long a rank asks without pause whether a message has come, and how long where the ranks of a
host are more than its cores: others that wait for a core may be those whom it waits for."""
SLEEP_PART = 0.05
"""How long it then sleeps between two questions, as part of what it has waited already."""
MAX_SLEEP_SECONDS = 1e-3
MAX_BYTES = 1 << 30
"""The most of one message: a system call copies less than 2 GiB."""


class MPITransport(Transport):
    """Ranks are the processes of an MPI communicator, on the CPU.

    MPI moves messages only while it is called. A rank that waits keeps asking: first at once, then
    after pauses that grow with the time waited, since others may need its core.
    """

    name = "mpi"

    def __init__(self, communicator: MPI.Comm, topology: Topology | None = None) -> None:
        topology = topology or Topology.of_hosts([communicator.size])
        super().__init__(communicator.rank, topology)
        self._communicator = communicator
        few = topology.num_ranks_beside(self.rank) <= len(os.sched_getaffinity(0))
        self._spin_seconds = SPIN_SECONDS if few else SPIN_SECONDS_OF_MANY

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Wait:
        # Sends first: a receive whose message is there already takes the time to copy it.
        starts = ((self._communicator.Isend, sends), (self._communicator.Irecv, receives))
        requests = [
            start([part, MPI.BYTE], peer)
            for start, messages in starts
            for peer, tensor in messages
            for part in _parts(tensor)
        ]
        under_way = [sends, receives]  # so that their memory stays

        def wait() -> None:
            _wait_for(requests, self._spin_seconds)
            under_way.clear()

        return wait


def _parts(tensor: Tensor) -> Iterator[MPI.buffer]:
    """A tensor's memory, in pieces that are not too long."""
    assert tensor.is_contiguous(), tensor.stride()
    for start in range(0, tensor.nbytes, MAX_BYTES):
        size = min(tensor.nbytes - start, MAX_BYTES)
        yield MPI.buffer.fromaddress(tensor.data_ptr() + start, size)


def _wait_for(requests: list[MPI.Request], spin_seconds: float) -> None:
    if MPI.Request.Testall(requests):
        return
    begun = time.perf_counter()
    while not MPI.Request.Testall(requests):
        waited = time.perf_counter() - begun
        if waited > spin_seconds:
            time.sleep(min(SLEEP_PART * waited, MAX_SLEEP_SECONDS))
