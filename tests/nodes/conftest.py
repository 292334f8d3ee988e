"""Tests of several nodes: real processes and sockets, all on 127.0.0.1."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster
import pytest
import zoo

sys.path.append(str(Path(__file__).parents[1] / "equivalence"))  # `reference`

Launch = Callable[..., cluster.NodeProgram]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("other"), num_hidden_layers=2)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPAN_SECRET", cluster.SECRET)


@pytest.fixture
def launch(model: Path, tmp_path: Path) -> Iterator[Launch]:
    """Starts nodes, and ends those that a failed test leaves."""
    started: list[cluster.NodeProgram] = []

    def start(
        node_rank: int,
        port: int,
        *arguments: str,
        model: Path = model,
        secret: str = cluster.SECRET,
    ) -> cluster.NodeProgram:
        folder = tmp_path / f"program{len(started)}"
        arguments = ("--node-rank", str(node_rank), *arguments)
        started.append(cluster.NodeProgram(model, port, folder, *arguments, secret=secret))
        return started[-1]

    yield start
    for node in started:
        node.process.kill()
        node.end()
