"""Memory in which ranks of one host meet within a layer: faster than any message."""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence

from torch.distributed import Store  # type: ignore[attr-defined]

from longspan.compiled import NUMBER, POINTER, SOURCES, function, library
from longspan.plan import MOST_JOINT_ROWS, Joint

__all__ = ["Meeting"]

_LINE = 64
"""Bytes of a cache line: one for each rank's flag."""
_TURN_BITS = 16
"""A joint step's meetings are fewer than 2^16."""


class _Structure(ctypes.Structure):
    """As in `csrc/meeting.h`."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("ranks", ctypes.c_int64),
        ("place_floats", ctypes.c_int64),
        ("members", ctypes.c_void_p),
        ("num_members", ctypes.c_int64),
        ("index", ctypes.c_int64),
        ("turn", ctypes.c_int64),
    )


class Meeting:
    """What a rank needs to compute joint steps with others of its host."""

    def __init__(self, memory: mmap.mmap, rank: int, ranks: int, place_floats: int) -> None:
        self.rank = rank
        self._memory = ctypes.c_char.from_buffer(memory)  # keeps it open
        address = ctypes.addressof(self._memory)
        self._structure = _Structure(address, ranks, place_floats)
        self.address = ctypes.addressof(self._structure)
        """Of the structure, for kernels."""
        compiled = library(SOURCES / "joint.cpp")
        assert compiled is not None  # or nothing could be computed jointly
        self._largest = function(compiled, "largest", (POINTER, POINTER, NUMBER))

    @classmethod
    def open(cls, rank: int, ranks: int, row_floats: int | None, store: Store) -> "Meeting | None":
        """Meet all ranks of a host, which do the same with the same `store`, once each.

        A rank puts at most `row_floats` numbers of each row into its place; with None it can't
        compute jointly. None for all if any can't, or can't reach the others' memory, as where each
        has its own namespace of processes. The memory has no name and ends with the ranks.
        """
        if not _all(row_floats is not None, "asks", rank, ranks, store):
            return None
        assert row_floats is not None
        place = -(-MOST_JOINT_ROWS * row_floats * 4 // _LINE) * _LINE
        size = ranks * (_LINE + 2 * place)
        file = -1
        if rank == 0:
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                file = os.memfd_create("longspan-meeting")
                os.truncate(file, size)
            store.set("meeting/file", f"/proc/{os.getpid()}/fd/{file}")
        path = store.get("meeting/file").decode()
        try:
            with open(path, "r+b") as shared:
                memory = mmap.mmap(shared.fileno(), size)
        except (OSError, ValueError):
            memory = None
        opened = _all(memory is not None, "opened", rank, ranks, store)
        if file >= 0:
            os.close(file)
        return cls(memory, rank, ranks, place // 4) if opened and memory else None

    def begin(self, joint: Joint) -> None:
        """Meet those who compute a step with this rank, from now on."""
        self._members = (ctypes.c_int64 * len(joint.ranks))(*joint.ranks)
        structure = self._structure
        structure.members = ctypes.addressof(self._members)
        structure.num_members = len(joint.ranks)
        structure.index = joint.ranks.index(self.rank)
        structure.turn = joint.number << _TURN_BITS

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Of as many numbers of each rank, below 2^31, the largest one at each place."""
        array = (ctypes.c_int32 * len(numbers))(*numbers)
        self._largest(self.address, array, len(numbers))
        return list(array)


def _all(able: bool, what: str, rank: int, ranks: int, store: Store) -> bool:
    """Whether all ranks are able."""
    store.set(f"meeting/{what}/{rank}", str(able))
    return all(store.get(f"meeting/{what}/{other}") == b"True" for other in range(ranks))
