"""The CPU kernel in C++ (`csrc/`), compiled once for the machine that it runs on, and kept."""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from longspan.attention.state import AttentionState
from longspan.attention.work import Work

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"),
    # Sums may be fused with products; infinities are used, and no error flag is looked at.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
SECONDS_TO_COMPILE = 300

logger = logging.getLogger("longspan.attention")


class Native:
    """The kernel of a compiled library; see `longspan.attention.kernel.Kernel`.

    Keys are read where they lie, in any format of `kv_format`; arithmetic is float32. It uses as
    many threads as PyTorch.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = {
            dtype: getattr(library, f"longspan_attend_{str(dtype).removeprefix('torch.')}")
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
        }

    def __call__(
        self, state: AttentionState, q: Tensor, kv: Tensor, work: Work, *, scale: float
    ) -> None:
        if len(work.table) == 0:
            return
        q = q.float()
        if q.stride(2) != 1:
            q = q.contiguous()
        k, v = kv if kv.stride(3) == 1 else kv.contiguous()
        assert state.out.stride()[1:] == (q.shape[2], 1)
        assert state.lse.stride(1) == 1
        strides = (state.out.stride(0), state.lse.stride(0), *q.stride()[:2])
        strides += (*k.stride()[:2], *v.stride()[:2])
        shape = (k.shape[0], q.shape[1] // k.shape[0], q.shape[2])
        self._attend[kv.dtype](
            *map(_address, (state.out, state.lse, q, k, v)),
            (ctypes.c_int64 * 8)(*strides),
            (ctypes.c_int64 * 3)(*shape),
            ctypes.c_float(scale),
            _address(work.table),
            ctypes.c_int64(len(work.table)),
            torch.get_num_threads(),
        )


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it can't be compiled or loaded, and then a warning says why.

    It is kept under `XDG_CACHE_HOME` (by default ~/.cache), by its sources, compiler and processor.
    """
    try:
        return ctypes.CDLL(str(_compiled(_compiler())), mode=os.RTLD_NOW)
    except (OSError, subprocess.SubprocessError) as error:
        printed = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "the CPU attention kernel can't be compiled, so a slower one is used: %s",
            printed.strip().splitlines()[-1],
        )
        return None


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler; install g++")
    return compiler


def _compiled(compiler: str) -> Path:
    """The library's file, made if it isn't there; processes that start together make it once."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"
    file = place / f"attention-{_fingerprint(compiler)}.so"
    if file.exists():
        return file
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "attention.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            logger.info("compiling the CPU attention kernel, once for this machine")
            with tempfile.TemporaryDirectory(dir=place) as folder:
                _compile(compiler, Path(folder))
                os.replace(Path(folder) / "attention.so", file)
    return file


def _compile(compiler: str, folder: Path) -> None:
    """In two steps, so that no OpenMP library is linked: PyTorch has loaded the one to use."""
    source, compiled = SOURCES / "attention.cpp", folder / "attention.o"
    for arguments in (
        (*FLAGS, "-c", str(source), "-o", str(compiled)),
        ("-shared", str(compiled), "-o", str(folder / "attention.so")),
    ):
        subprocess.run(
            [compiler, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_COMPILE,
        )


def _fingerprint(compiler: str) -> str:
    """Of everything that the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    parts = [file.read_bytes() for file in sorted(SOURCES.iterdir())]
    parts += [version, " ".join(FLAGS).encode(), platform.machine().encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = (b"model name", b"flags", b"Features")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))
