"""Starts MPI in ranks that nobody started with mpiexec.

An MPICH process asks its process manager who it is and how to reach the others, in lines of text
over a socket: the wire protocol of PMI-1 (Balaji et al., "PMI: A Scalable Parallel
Process-Management Interface for Extreme-Scale Systems", EuroMPI 2010; MPICH's `src/pmi`). Here a
thread of the process itself answers it, from a store that all ranks share.
"""

import ctypes
import importlib.util
import os
import re
import socket
import threading
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

from longspan.parallel.transport import Transport
from longspan.topology import Topology

__all__ = ["join", "obstacle"]

_ENVIRONMENT = {
    # For ranks of other hosts, of which there are none; MPICH would listen at a public address.
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "lo",
}


def obstacle(topology: Topology) -> str:
    """Why this rank can't use MPI, or would be slow; empty if it can."""
    if topology.num_hosts > 1:
        return f"there are {topology.num_hosts} hosts, and it is for ranks of one"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    try:
        from longspan.parallel.mpi_transport import MPI
    except (ImportError, RuntimeError):
        return "mpi4py finds no MPI library"
    library = MPI.Get_library_version()
    version = re.match(r"MPICH Version:\s*(\d+)", library)
    if version is None or int(version[1]) < 5:  # 4 does not copy from memory to memory
        return f"it needs MPICH 5, and finds {' '.join(library.splitlines()[0].split())}"
    return "" if _may_read_memory() else "processes may not read each other's memory here"


def join(rank: int, topology: Topology, store: Store) -> Transport:
    """Be a rank of an MPI world of all ranks, which do the same with the same `store`, once each.

    The ranks are those of one host. Nothing of them is left when they end, however they do.
    """
    from longspan.parallel.mpi_transport import MPI, MPITransport

    assert not MPI.Is_initialized()
    size = topology.num_ranks
    ours, theirs = socket.socketpair()
    manager = _ProcessManager(rank, size, store)
    threading.Thread(target=manager.serve, args=(theirs,), daemon=True).start()
    told = {"PMI_RANK": rank, "PMI_SIZE": size, "PMI_FD": ours.detach()}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    manager.meet()  # so that the next lines, in which a killed rank leaves a file, are short
    # mpi4py would hold the interpreter's lock, which the thread needs to answer.
    start, provided = ctypes.CDLL(MPI.__file__).MPI_Init_thread, ctypes.c_int()
    if status := start(None, None, MPI.THREAD_FUNNELED, ctypes.byref(provided)):
        raise RuntimeError(f"MPI_Init_thread failed: {MPI.Get_error_string(status)}")
    manager.meet()
    _forget_shared_files()
    for name in told:
        del os.environ[name]
    MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)  # as exceptions: not the end of the process
    return MPITransport(MPI.COMM_WORLD, topology)


class _ProcessManager:
    """What one rank is told: answers to the commands of PMI-1, version 1.1."""

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self.rank = rank
        self.size = size
        self.store = store
        self.num_meetings = 0

    def serve(self, connection: socket.socket) -> None:
        """Answer until the other side closes, which is when the process ends."""
        with connection, connection.makefile("rw", newline="\n") as lines:
            for line in lines:
                request = dict(word.partition("=")[::2] for word in line.split())
                lines.write(f"cmd={self._answer(request)}\n")
                lines.flush()

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.num_meetings += 1
        self.store.set(self._meeting(self.rank), "")
        self.store.wait([self._meeting(rank) for rank in range(self.size)])

    def _meeting(self, rank: int) -> str:
        return f"pmi/meeting/{self.num_meetings}/{rank}"

    def _answer(self, request: dict[str, str]) -> str:
        match request:
            case {"cmd": "init"}:
                return "response_to_init pmi_version=1 pmi_subversion=1 rc=0"
            case {"cmd": "get_maxes"}:
                return "maxes kvsname_max=64 keylen_max=64 vallen_max=1024 rc=0"
            case {"cmd": "get_appnum"}:
                return "appnum appnum=0 rc=0"
            case {"cmd": "get_universe_size"}:
                return f"universe_size size={self.size} rc=0"
            case {"cmd": "get_my_kvsname"}:
                return f"my_kvsname kvsname={self._world_name()} rc=0"
            case {"cmd": "put", "key": key, "value": value}:
                self.store.set(f"pmi/value/{key}", value)
                return "put_result rc=0"
            case {"cmd": "get", "key": "PMI_process_mapping"}:
                return f"get_result value=(vector,(0,1,{self.size})) rc=0"
            case {"cmd": "get", "key": key} if self.store.check([f"pmi/value/{key}"]):
                return f"get_result value={self.store.get(f'pmi/value/{key}').decode()} rc=0"
            case {"cmd": "get"}:
                return "get_result rc=-1 msg=unknown_key"
            case {"cmd": "barrier_in"}:
                self.meet()
                return "barrier_out rc=0"
            case {"cmd": "finalize"}:
                return "finalize_ack rc=0"
            case _:
                return f"{request.get('cmd')} rc=-1 msg=unknown_command"

    def _world_name(self) -> str:
        """MPICH names shared memory after it, so no other world on this host may have it."""
        if self.rank == 0:
            self.store.set("pmi/world", os.urandom(16).hex())
        return self.store.get("pmi/world").decode()


def _may_read_memory() -> bool:
    """Whether the system lets processes copy from each other's memory.

    Yama forbids it where `kernel.yama.ptrace_scope` is not 0 (MPICH looks at that, too), and some
    containers do. MPICH's other way, in small pieces through shared memory, is far slower than gloo
    where ranks are more than cores.
    """
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    if yama.exists() and yama.read_text().strip() != "0":
        return False
    source, target = ctypes.create_string_buffer(b"1"), ctypes.create_string_buffer(1)
    there, here = (
        (ctypes.c_size_t * 2)(ctypes.addressof(memory), 1) for memory in (source, target)
    )
    one, flags = ctypes.c_ulong(1), ctypes.c_ulong(0)
    read = ctypes.CDLL(None).process_vm_readv
    return bool(read(os.getpid(), here, one, there, one, flags) == 1)


def _forget_shared_files() -> None:
    """Remove the names of the memory that all ranks have mapped: it ends with the last of them."""
    for name in re.findall(r"/dev/shm/mpich_\w+", Path("/proc/self/maps").read_text()):
        Path(name).unlink(missing_ok=True)  # another rank has been here
