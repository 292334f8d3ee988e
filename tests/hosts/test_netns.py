"""Hosts that are namespaces: who reaches whom, how fast, and that nothing is left of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import netns
import pytest
from netns import Hosts
from ranks import Ranks

from longspan.parallel.transport import Transport

LISTEN = """
import socket, sys, time
server = socket.create_server(("0.0.0.0", 0))
print(server.getsockname()[1], flush=True)
connection, peer = server.accept()
begun, received = time.monotonic(), 0
while part := connection.recv(1 << 20):
    received += len(part)
print(peer[0], received / (time.monotonic() - begun), flush=True)
"""

SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    connection.sendall(bytes(1 << 18))
"""

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
except OSError as error:
    print(type(error).__name__, error.strerror)
else:
    print("connected")
"""


def bits_per_second(hosts: Hosts, source: int, target: int, seconds: float) -> float:
    """What comes from one host to another, by the receiver's count and clock."""
    server = hosts[target].popen([sys.executable, "-c", LISTEN], stdout=PIPE, text=True)
    with server.stdout:
        port = server.stdout.readline().strip()
        address = hosts[target].address
        hosts[source].run(sys.executable, "-c", SEND, address, port, str(seconds))
        peer, rate = server.stdout.readline().split()
    assert peer == hosts[source].address
    return 8 * float(rate)


def test_hosts_reach_each_other_at_the_rate_of_their_links() -> None:
    with Hosts(3, gbit=0.2) as hosts:
        for source, target in ((0, 1), (1, 2)):
            assert 0.1e9 < bits_per_second(hosts, source, target, 0.5) < 0.25e9
    with Hosts(2) as hosts:
        assert bits_per_second(hosts, 1, 0, 0.2) > 0.4e9, "not shaped"


def test_a_link_can_have_a_delay() -> None:
    if reason := netns.cannot_delay():
        pytest.skip(reason)
    with Hosts(2, gbit=1, delay_ms=20) as hosts:
        begun = time.monotonic()
        hosts[0].run(sys.executable, "-c", CONNECT, hosts[1].address, "9")
        assert time.monotonic() - begun > 0.04


def test_nobody_reaches_the_outside() -> None:
    with Hosts(1) as hosts, socket.create_server(("0.0.0.0", 0)) as server:
        host, port = hosts[0], str(server.getsockname()[1])
        assert host.run("ip", "-o", "link").count("\n") == 2, "loopback and its own link"
        assert "default" not in host.run("ip", "route")
        here = [line.split()[3].split("/")[0] for line in _addresses_here()]
        assert "127.0.0.1" in here
        for address in (*here, "192.0.2.1"):
            said = host.run(sys.executable, "-c", CONNECT, address, port).strip()
            assert said in (
                "ConnectionRefusedError Connection refused",  # its own loopback
                "OSError Network is unreachable",
            )
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def _addresses_here() -> list[str]:
    listed = subprocess.run(["ip", "-o", "-4", "addr"], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def namespaces() -> set[str]:
    """Network namespaces that any process is in."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue
    return found


def assert_all_end(namespaces_of_hosts: set[str]) -> None:
    deadline = time.monotonic() + 20
    while left := namespaces_of_hosts & namespaces():
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@contextlib.contextmanager
def named(pids: Iterable[int]) -> Iterator[set[str]]:
    """Names of the processes' namespaces, which are given to no new ones while this is open."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(f"/proc/{pid}/ns/net")) for pid in pids]
        yield {os.readlink(f"/proc/self/fd/{file.fileno()}") for file in files}


def test_nothing_is_left_after_a_failure() -> None:
    begun, made = [], set()

    def fail_on_hosts() -> None:
        with Hosts(2, gbit=1) as hosts:
            made.update(stack.enter_context(named(host.pid for host in hosts)))
            # Processes that have a child of their own, which knows nothing of the host.
            shell = ["sh", "-c", "sleep 1000 & echo ready; wait"]
            begun.extend(hosts[0].popen(shell, stdout=PIPE) for _ in range(2))
            for process in begun:
                process.stdout.readline()
            assert len(made & namespaces()) == 2
            raise ZeroDivisionError

    with contextlib.ExitStack() as stack:
        with pytest.raises(ZeroDivisionError):
            fail_on_hosts()
        assert [process.returncode for process in begun] == [-signal.SIGKILL] * 2
        assert not made & namespaces()
    for process in begun:
        process.stdout.close()


PROGRAM = """
import sys, time
from netns import Hosts
with Hosts(2, gbit=1) as hosts:
    process = hosts[0].popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print(*(host.pid for host in hosts), flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_program_that_is_ended(how: signal.Signals) -> None:
    folder = str(Path(netns.__file__).parent)
    program = Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": folder},
        stdout=PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with program, named(map(int, program.stdout.readline().split())) as made:
        assert len(made & namespaces()) == 2
        program.send_signal(how)
        assert_all_end(made)


def test_a_command_that_fails_is_named() -> None:
    with Hosts(1) as hosts, pytest.raises(RuntimeError, match=r"ip link show eth7: .*eth7"):
        hosts[0].run("ip", "link", "show", "eth7")


@pytest.mark.parametrize(
    ("path", "user", "reason"),
    [
        ("", 0, "hosts need ip, tc, nsenter, unshare; install iproute2 and util-linux"),
        (None, 1000, "hosts are network namespaces, which only root may make"),
    ],
)
def test_a_reason_is_given_where_there_can_be_none(
    monkeypatch: pytest.MonkeyPatch, path: str | None, user: int, reason: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    assert netns.unavailable.__wrapped__() == reason


def test_what_the_kernel_refuses_is_the_reason() -> None:
    reason = netns._refused("true", "ip link add one type no-such-kind")
    assert reason is not None
    assert reason.startswith("not possible here: + true; + ip link add one type no-such-kind; ")


def who(transport: Transport) -> tuple[int, int, int, str]:
    rank = transport.rank
    return rank, transport.topology.hosts[rank], os.getpid(), os.readlink("/proc/self/ns/net")


def fail(transport: Transport) -> None:
    if transport.rank == 1:
        raise ArithmeticError("rank 1 is broken")
    time.sleep(1000)


def test_ranks_are_on_their_hosts_and_fail_by_name() -> None:
    with Hosts(2) as hosts, Ranks((2, 1), hosts) as ranks:
        one, other = (os.readlink(f"/proc/{host.pid}/ns/net") for host in hosts)
        found = ranks.run(who)
        assert [rank for rank, *_ in found] == [0, 1, 2]
        assert [(host, namespace) for _, host, _, namespace in found] == [
            (0, one),
            (0, one),
            (1, other),
        ]
        with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*ArithmeticError: rank 1 is broken"):
            ranks.run(fail)
    with Ranks((1,)) as ranks:
        [(*_, pid, _)] = ranks.run(who)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="rank 0 is dead"):
            ranks.run(who)
