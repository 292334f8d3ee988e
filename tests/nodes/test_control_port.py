"""Who may come in at node 0's port, over real sockets, and who is missed."""

import contextlib
import logging
import re
import secrets
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cluster
import pytest

from longspan import LLM
from longspan.config import EngineConfig
from longspan.errors import ConfigError, RankFailedError
from longspan.worker import control_port, handshake, node_agent
from longspan.worker.channel import Attach, Channel, Failed, Hello, Join, Proof, Refused
from longspan.worker.control_port import ControlPort, listen
from longspan.worker.handshake import Unwelcome, dial, release
from longspan.worker.nodes import Node, gather
from longspan.worker.secret import shared_secret

SECRET = cluster.SECRET.encode()


@pytest.fixture
def port() -> Iterator[ControlPort]:
    with contextlib.closing(ControlPort("127.0.0.1", 0, SECRET)) as port:
        yield port


def connect(port: ControlPort) -> socket.socket:
    return socket.create_connection((port.address, port.port), timeout=10)


def test_one_with_the_secret_comes_in(port: ControlPort) -> None:
    channel = dial(port.address, port.port, SECRET)
    channel.send(Attach(3))
    arrival = port.arrival(10)
    assert arrival is not None
    admitted, message = arrival
    assert message == Attach(3)
    large = Failed("x", "y" * 1_000_000)
    admitted.send(large)
    assert channel.receive() == large, "there is no limit any more"
    admitted.close()
    channel.close()


def test_a_wrong_secret_is_refused(port: ControlPort, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unwelcome, match=r"refuses this node: its LONGSPAN_SECRET is not node 0's$"):
        dial(port.address, port.port, b"what somebody else believes")
    assert port.arrival(0.1) is None
    assert re.search(r"refused 127.0.0.1:\d+: its LONGSPAN_SECRET is not node 0's", caplog.text)


def test_a_foreign_release_is_refused(port: ControlPort) -> None:
    with contextlib.closing(Channel(connect(port))) as channel:
        channel.send(Hello("longspan 9.9", b"nonce"))
        assert isinstance(channel.receive(), Hello)
        refused = channel.receive()
    assert isinstance(refused, Refused)
    assert refused.reason.startswith("it runs longspan 9.9, node 0 longspan ")
    assert port.arrival(0.1) is None


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ((1 << 60).to_bytes(8, "little"), "it is not Longspan"),
        ((1025).to_bytes(8, "little"), "it is not Longspan"),
        (b"GET / HTTP/1.1\r\n\r\n", "it is not Longspan"),
        ((4).to_bytes(8, "little") + b"junk", "it is not Longspan"),
        (b"", "it was silent for 0.5 s"),
    ],
)
def test_what_is_no_node_is_sent_away_unread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sent: bytes, reason: str
) -> None:
    monkeypatch.setattr(handshake, "SECONDS", 0.5)
    with (
        contextlib.closing(ControlPort("127.0.0.1", 0, SECRET)) as port,
        connect(port) as connection,
    ):
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 16):  # what node 0 says of itself
                pass
        cluster.wait_until(lambda: f": {reason}" in caplog.text, caplog.text)
        assert port.arrival(0) is None


def test_a_silent_one_keeps_nobody_waiting(port: ControlPort) -> None:
    with (
        connect(port),
        connect(port),
        contextlib.closing(dial(port.address, port.port, SECRET)) as channel,
    ):
        channel.send(Attach(0))
        arrival = port.arrival(10)
        assert arrival is not None
        arrival[0].close()


def test_a_node_is_not_taken_in_by_one_that_returns_what_it_says() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def echo() -> None:
        with contextlib.closing(Channel(listener.accept()[0])) as channel:
            channel.send(Hello(release(), secrets.token_bytes(32)))
            channel.receive()
            proof = channel.receive()
            assert isinstance(proof, Proof)
            channel.send(proof)

    thread = threading.Thread(target=echo)
    thread.start()
    with pytest.raises(Unwelcome, match="it does not know this node's LONGSPAN_SECRET"):
        dial(*listener.getsockname(), SECRET)
    thread.join()
    listener.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1", "Address already in use; another program listens there: give all nodes an"),
        ("192.0.2.77", "Cannot assign requested address; give the address of this host that the "),
        ("no-such-host.invalid", r"\w"),
    ],
)
def test_where_node_0_can_t_listen(port: ControlPort, address: str, said: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"can't listen at master_addr='{address}', master_port={port.port}: {said}",
    ):
        listen(address, port.port)


def test_node_0_listens_at_one_address() -> None:
    assert EngineConfig(model="m").master_addr == "127.0.0.1"
    for every in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="stands for every address; give the one of node 0"):
            listen(every, 0)


MISFITS = {
    "another nnodes": ({"nnodes": 2}, "it is one of nnodes=2, node 0 has nnodes=3"),
    "no such node": ({"node_rank": 3}, "node_rank=3 is not one of 1 to 2"),
    "a second one": ({"node_rank": 2}, "node_rank=2 has joined already"),
    "another model": ({"digest": "b"}, "the config.json of its model='m' is not that of node 0"),
    "too many ranks": ({"num_ranks": 2}, "it brings 2 ranks, and 1 are left of context_parallel_"),
}


def test_nodes_that_do_not_fit_are_told_why(port: ControlPort) -> None:
    config = EngineConfig(
        model="m", nnodes=3, context_parallel_size=4, context_parallel_size_local=1
    )
    nodes: list[Node] = []
    right = {"nnodes": 3, "num_ranks": 1, "host": "there", "model": "m", "digest": "a"}

    def join(**told: object) -> Channel:
        channel = dial(port.address, port.port, SECRET)
        channel.send(Join(**{"node_rank": 1} | right | told))
        return channel

    with ThreadPoolExecutor(1) as thread:
        gathering = thread.submit(gather, config, "a", port, nodes)
        second = join(node_rank=2, num_ranks=2)
        cluster.wait_until(lambda: len(nodes) == 1, "the second node")
        for name, (told, reason) in MISFITS.items():
            with contextlib.closing(join(**told)) as channel:
                refused = channel.receive()
            assert isinstance(refused, Refused), name
            assert refused.reason.startswith(reason), name
        leaving = join(num_ranks=1)
        gathering.result(10)
    assert [(node.name, node.ranks) for node in nodes] == [
        ("node 1 (there)", range(1, 2)),
        ("node 2 (there)", range(2, 4)),
    ]
    leaving.close()
    cluster.wait_until(lambda: nodes[0].lost() is not None, "the loss")
    assert nodes[1].lost() is None
    second.close()
    for node in nodes:
        node.stop()


def test_a_node_that_never_comes_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_port, "PATIENCE_SECONDS", 1.5)
    port = cluster.free_port()
    with pytest.raises(
        RankFailedError,
        match=rf"^node 1, 2 of 3 has not come to 127.0.0.1:{port} within 1.5 s; start there: "
        rf"longspan serve MODEL --nnodes 3 --node-rank 1 --master-addr 127.0.0.1 "
        rf"--master-port {port}; and see that no firewall is between$",
    ):
        LLM(str(model), nnodes=3, context_parallel_size=3, master_port=port)
    waiting = (
        "longspan.worker.nodes",
        logging.WARNING,
        f"waiting for node 1, 2 of 3 at 127.0.0.1:{port}",
    )
    assert waiting in caplog.record_tuples
    listen("127.0.0.1", port).close()  # which is free again


def test_a_node_does_not_wait_for_ever(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_agent, "PATIENCE_SECONDS", 0.6)
    port = cluster.free_port()
    config = EngineConfig(model=str(model), nnodes=2, node_rank=1, master_port=port)
    said: list[str] = []
    with pytest.raises(
        ConfigError,
        match=rf"^node 0 at 127.0.0.1:{port} can't be reached since 0.6 s: Connection refused; ",
    ):
        node_agent.lend(config, said.append)
    assert said == [f"waiting for node 0 at 127.0.0.1:{port}"]


@pytest.mark.parametrize(("secret", "said"), [("", "it is not set"), ("short", "it has 5 bytes")])
def test_the_secret_is_asked_for(monkeypatch: pytest.MonkeyPatch, secret: str, said: str) -> None:
    monkeypatch.setenv("LONGSPAN_SECRET", secret)
    with pytest.raises(ConfigError, match=f"LONGSPAN_SECRET, the same on all nodes; {said}.*"):
        shared_secret()
