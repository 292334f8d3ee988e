"""Hosts for tests and benchmarks: network namespaces of this machine with shaped links between.

    with Hosts(2, gbit=1) as hosts:
        process = hosts[1].popen([sys.executable, "-c", "print('as if on another machine')"])

A host has `lo` and `eth0`, a veth pair to a bridge in one more namespace, the switch. `tbf` shapes
both ends, so a host neither sends nor receives faster than its link. There is no route out: these
addresses exist in the namespaces alone.

Namespaces get no names. One lives as long as a process in it, and its links with it; that is a
*keeper*, which hears of the end of the process that made it, in whatever way it ended, and then
ends all others in its namespace and itself. So nothing can be left behind, not even by `kill -9`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

TOOLS = ("ip", "tc", "nsenter", "unshare")
QUEUE_BYTES = 16 << 20
"""What a link may hold back. It is more than connections have under way: nothing is dropped."""
MTU = 9000
PATIENCE_S = 10.0

_NAMESPACE = "/proc/{}/ns/net"


class Host:
    """One namespace. `device` is how its processes reach those of other hosts."""

    device = "eth0"

    def __init__(self, address: str) -> None:
        self.address = address
        self._processes: list[subprocess.Popen[Any]] = []
        self._keeper = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the process that made it
        )
        assert self._keeper.stdout is not None
        if not self._keeper.stdout.readline():
            raise RuntimeError(f"no namespace: unshare ended with {self._keeper.wait()}")

    @property
    def pid(self) -> int:
        """A process that is in the namespace as long as it exists."""
        return self._keeper.pid

    def command(self, *arguments: str) -> list[str]:
        """A command that replaces itself by another in the namespace: same process, same files."""
        return ["nsenter", f"--net={_NAMESPACE.format(self.pid)}", "--", *arguments]

    def popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on this host, which ends with it; options are `subprocess.Popen`'s."""
        process = subprocess.Popen(self.command(*arguments), **options)
        self._processes.append(process)
        return process

    def run(self, *arguments: str) -> str:
        """What a command prints, run on this host to its end."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """End all processes of the host; its links go with it."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.wait()
        self._keeper.stdout.close()
        for process in self._processes:
            process.wait(PATIENCE_S)


class Hosts(Sequence[Host]):
    """So many hosts on one switch; `gbit` is the rate of a host's link in Gbit/s, both ways.

    `delay_ms` is what a packet takes in one direction, beside what the kernel takes; it needs
    `netem`, see `cannot_delay`. Not shaped is a link that is as fast as the machine.
    """

    def __init__(
        self, number: int, gbit: float | None = None, delay_ms: float | None = None
    ) -> None:
        with contextlib.ExitStack() as stack:
            self._switch = Host("")
            stack.callback(self._switch.close)
            self._hosts: list[Host] = []
            _do(self._switch, "ip link add switch type bridge")
            _do(self._switch, "ip link set switch up")
            for index in range(number):
                host = Host(f"10.77.0.{index + 1}")
                stack.callback(host.close)
                self._plug_in(host, f"port{index}", gbit, delay_ms)
                self._hosts.append(host)
            self._stack = stack.pop_all()

    def _plug_in(self, host: Host, port: str, gbit: float | None, delay_ms: float | None) -> None:
        switch, device = self._switch, host.device
        veth = f"ip link add {port} mtu {MTU} type veth peer name {device} mtu {MTU}"
        _do(switch, f"{veth} netns {host.pid}")
        _do(switch, f"ip link set {port} master switch up")
        _do(host, "ip link set lo up")
        _do(host, f"ip addr add {host.address}/24 dev {device}")
        if delay_ms:
            delay = f"netem limit 100000 delay {delay_ms}ms"
            _do(host, f"tc qdisc add dev {device} root handle 1: {delay}")
        if gbit:
            # Timers are late by some 100 us, in which a link must not stand still.
            burst = max(int(gbit * 1e9 / 8 * 200e-6), 32 << 10)
            shape = f"tbf rate {gbit}gbit burst {burst} limit {QUEUE_BYTES}"
            _do(host, f"ip link set {device} gso_max_size {min(burst // 2, 65536)}")
            _do(host, f"tc qdisc add dev {device} {'parent 1:1' if delay_ms else 'root'} {shape}")
            _do(switch, f"tc qdisc add dev {port} root {shape}")
        _do(host, f"ip link set {device} up")

    def __getitem__(self, index: Any) -> Any:
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()


def _do(host: Host, command: str) -> None:
    host.run(*command.split())


@cache
def unavailable() -> str | None:
    """Why there can be no hosts here, or None."""
    if not sys.platform.startswith("linux"):
        return "hosts are network namespaces, which only Linux has"
    if os.geteuid() != 0:
        return "hosts are network namespaces, which only root may make"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"hosts need {', '.join(missing)}; install iproute2 and util-linux"
    return _refused(
        "ip link add switch type bridge",
        "ip link add one type veth peer name other",
        f"tc qdisc add dev one root tbf rate 1gbit burst 32768 limit {QUEUE_BYTES}",
    )


@cache
def cannot_delay() -> str | None:
    """Why links can't have a delay here, or None."""
    return unavailable() or _refused(
        "ip link add one type veth peer name other", "tc qdisc add dev one root netem delay 1ms"
    )


def _refused(*commands: str) -> str | None:
    """What a namespace of its own says to commands, or None if all of them can be done."""
    # Each is shown before it runs, so that the last one shown is the one that failed.
    script = ["unshare", "--net", "sh", "-exc", "\n".join(commands)]
    done = subprocess.run(script, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return None
    return "not possible here: " + done.stderr.strip().replace("\n", "; ")


def others_in(namespace: str) -> Iterator[int]:
    """All processes but this one of a network namespace, named as `/proc/PID/ns/net` does."""
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):  # it has just ended, or is a zombie
            if pid != os.getpid() and os.readlink(_NAMESPACE.format(pid)) == namespace:
                yield pid


def keep() -> None:
    """Hold this process's namespace until stdin ends, then end whoever is in it."""
    print("ready", flush=True)
    sys.stdin.read()
    namespace = os.readlink(_NAMESPACE.format("self"))
    while others := list(others_in(namespace)):
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    keep()
