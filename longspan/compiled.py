"""C++ of ours, compiled once for the machine that it runs on, and kept."""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

__all__ = ["NUMBER", "POINTER", "SOURCES", "THREADS", "found", "function", "library"]

SOURCES = Path(__file__).parent / "csrc"
POINTER, NUMBER, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
"""What functions of ours take: addresses, int64 and how many threads to use."""

_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"),
    # Sums may be fused with products; infinities are used, and no error flag is looked at.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_SECONDS_TO_COMPILE = 300

_logger = logging.getLogger("longspan.compiled")


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The library of one source file; None where it can't be made, and then a warning says why.

    It is kept under `XDG_CACHE_HOME` (by default ~/.cache), by its source with all that lies
    beside it, the compiler and the processor.
    """
    try:
        return ctypes.CDLL(str(_compiled(source, _compiler())), mode=os.RTLD_NOW)
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        cause = next((line for line in lines if "error" in line), lines[0])
        _logger.warning("%s can't be compiled, so slower code is used: %s", source.name, cause)
        return None


def function(kernels: ctypes.CDLL, name: str, arguments: Sequence[Any]) -> Callable[..., None]:
    """One of a library's functions, which return nothing, with the types of its arguments."""
    found = getattr(kernels, f"longspan_{name}")
    found.argtypes, found.restype = arguments, None
    return cast(Callable[..., None], found)


@cache
def found(source: Path, name: str, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
    """A function of a source file's library, made ready once; None where there is no library."""
    kernels = library(source)
    return None if kernels is None else function(kernels, name, arguments)


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler; install g++")
    return compiler


def _compiled(source: Path, compiler: str) -> Path:
    """The library's file, made if it isn't there; processes that start together make it once."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"
    file = place / f"{source.stem}-{_fingerprint(source, compiler)}.so"
    if file.exists():
        return file
    place.mkdir(parents=True, exist_ok=True)
    with open(place / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=place) as folder:
                os.replace(_compile(source, compiler, Path(folder)), file)
    return file


def _compile(source: Path, compiler: str, folder: Path) -> Path:
    """In two steps, so that no OpenMP library is linked: PyTorch has loaded the one to use."""
    compiled, linked = folder / "compiled.o", folder / "linked.so"
    for arguments in (
        (*_FLAGS, "-c", str(source), "-o", str(compiled)),
        ("-shared", str(compiled), "-o", str(linked)),
    ):
        subprocess.run(
            [compiler, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_COMPILE,
        )
    return linked


def _fingerprint(source: Path, compiler: str) -> str:
    """Of everything that the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    parts = [file.read_bytes() for file in sorted(source.parent.iterdir())]
    parts += [source.name.encode(), version, " ".join(_FLAGS).encode()]
    parts += [platform.machine().encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = (b"model name", b"flags", b"Features")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))
