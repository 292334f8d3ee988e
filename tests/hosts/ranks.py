"""Ranks as processes of one thread each on several hosts, with gloo or MPI between them.

They stay for several pieces of work, since they start slowly.
"""

import contextlib
import importlib
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from netns import Hosts

from longspan.topology import Topology

PATIENCE_S = 120.0


class Ranks:
    """`sizes[h]` ranks on host number h of `hosts`; without hosts all on this one, over loopback.

    `run` calls a function with its rank's transport and some arguments on every rank. The function
    is one of a module that can be imported, or of the script that runs; arguments and results are
    plain data or nouns of Longspan.
    """

    def __init__(
        self, sizes: Sequence[int], hosts: Hosts | None = None, backend: str = "gloo"
    ) -> None:
        assert hosts is None or len(sizes) == len(hosts), "one size for each host"
        self.topology = topology_of(sizes)
        self._sizes = ",".join(map(str, sizes))
        self._backend = backend
        self._connections: list[Connection] = []
        self._processes: list[Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="longspan-ranks-")
        try:
            for host, size in enumerate(sizes):
                for _ in range(size):
                    self._start(hosts[host] if hosts else None)
        except BaseException:
            self.close()
            raise

    def _start(self, host: Any) -> None:
        ours, theirs = Pipe()
        script = [sys.executable, __file__, str(theirs.fileno()), str(len(self._processes))]
        script += [self._sizes, str(Path(self._folder.name, "store")), self._backend]
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": host.device if host else "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        popen = host.popen if host else Popen
        with theirs:
            self._processes.append(
                popen(script, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
            )
        self._connections.append(ours)

    def run(
        self, work: Callable[..., Any], *arguments: object, patience: float = PATIENCE_S
    ) -> list[Any]:
        """What `work(transport, *arguments)` returns on each rank, which work at once.

        After an error all ranks are ended: some might wait for ever for the one that failed.

        Raises:
            RuntimeError: a rank raised, with its traceback, or died.
            TimeoutError: a rank has not answered within `patience` seconds.
        """
        script = Path(sys.argv[0]).stem
        module = script if work.__module__ == "__main__" else work.__module__
        message = pickle.dumps((module, work.__name__, arguments))
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it is dead, which its answer will say
                connection.send_bytes(message)
        try:
            return self._answers(work.__name__, time.monotonic() + patience)
        except BaseException:
            self.close()
            raise

    def _answers(self, work: str, deadline: float) -> list[Any]:
        ranks = {connection: rank for rank, connection in enumerate(self._connections)}
        results: dict[int, Any] = {}
        while len(results) < len(ranks):
            waiting = [connection for connection, rank in ranks.items() if rank not in results]
            ready = wait(waiting, max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"{work}: no answer in time from a rank")
            for connection in ready:
                rank = ranks[connection]
                results[rank] = self._answer(rank)
        return [results[rank] for rank in range(len(ranks))]

    def _answer(self, rank: int) -> Any:
        try:
            result, error = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"rank {rank} is dead") from None
        if error:
            raise RuntimeError(f"rank {rank}: {error}")
        return result

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            with contextlib.suppress(TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        self._folder.cleanup()


def topology_of(sizes: Sequence[int]) -> Topology:
    """The CPU of a host is one device, which its ranks share."""
    return Topology.of_hosts(sizes, shared_device=True)


def connect(rank: int, topology: Topology, store: str, backend: str) -> Any:
    """This rank's transport."""
    import torch.distributed as dist

    from longspan.parallel.transport import TorchTransport
    from longspan.worker import mpi

    shared = dist.FileStore(store, topology.num_ranks)
    if backend == "mpi":
        return mpi.join(rank, topology, shared)
    dist.init_process_group(backend, store=shared, rank=rank, world_size=topology.num_ranks)
    return TorchTransport(topology=topology)


def serve(
    connection: Connection, rank: int, sizes: Sequence[int], store: str, backend: str
) -> None:
    """One rank: does what it is sent until the connection ends."""
    import torch

    torch.set_num_threads(1)
    transport = connect(rank, topology_of(sizes), store, backend)
    while message := _next(connection):
        module, name, arguments = pickle.loads(message)
        try:
            work = getattr(importlib.import_module(module), name)
            answer = work(transport, *arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


def _next(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except EOFError:
        return b""


def end_with(connection: Connection) -> None:
    """End this process with the other side of the connection, even in an exchange."""
    import select

    hang_up = select.poll()
    hang_up.register(connection, 0)
    hang_up.poll()
    os._exit(0)


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as parent:
        threading.Thread(target=end_with, args=[parent], daemon=True).start()
        sizes = [int(size) for size in sys.argv[3].split(",")]
        serve(parent, int(sys.argv[2]), sizes, sys.argv[4], sys.argv[5])
