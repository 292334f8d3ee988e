"""A rank that dies: idle or at work, everybody is told, and nothing hangs."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from program import ServerProgram, wait_until

LONG: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 3500,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[[], ServerProgram]]:
    started: list[ServerProgram] = []

    def launch() -> ServerProgram:
        started.append(ServerProgram(model, tmp_path, "--served-model-name", "tiny"))
        return started[-1]

    yield launch
    for server in started:
        server.kill()


def test_a_rank_that_is_killed_at_work(start: Callable[[], ServerProgram]) -> None:
    """Who waits for an answer gets an error that names the rank; /health is 503 from then on."""
    server = start()
    pids = server.rank_pids()
    told: dict[str, openai.APIError] = {}

    def run(name: str, stream: bool) -> None:
        with server.client() as client:
            try:
                answer = client.completions.create(prompt=name, stream=stream, **LONG)
                for _ in answer:
                    pass
            except openai.APIError as error:
                told[name] = error

    threads = [threading.Thread(target=run, args=one) for one in (("a", True), ("b", False))]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.figure("vllm:num_requests_running") == 2, "both to run")
    os.kill(pids[1], signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    message = f"rank 1 (pid {pids[1]}) was killed by SIGKILL"
    assert sorted(told) == ["a", "b"]
    for error in told.values():
        assert message in str(error)
        assert "\n" not in error.message
    assert isinstance(told["b"], openai.InternalServerError)
    assert told["b"].status_code == 503
    health = server.http.get("/health")
    assert (health.status_code, message in health.text) == (503, True)
    refused = server.http.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, message in refused.text) == (503, True)
    assert server.figure("longspan:healthy") == 0
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"the end of {pids}", 10)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0, server.said


def test_a_rank_that_is_killed_idle(start: Callable[[], ServerProgram]) -> None:
    """Noticed without a request; the server's end by Ctrl-C is in order all the same."""
    server = start()
    assert server.http.get("/health").status_code == 200
    os.kill(server.rank_pids()[0], signal.SIGKILL)
    wait_until(lambda: server.http.get("/health").status_code == 503, "health to fail", 10)
    assert "rank 0" in server.http.get("/health").json()["error"]["message"]
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 130, server.said
    assert server.said.rstrip().endswith("interrupted")


def test_a_rank_that_hangs_makes_the_server_unhealthy(model: Path, tmp_path: Path) -> None:
    """Stopped, not dead: nothing ends, and /health says so after the time that is set."""
    folder = tmp_path / "hangs"
    folder.mkdir()
    server = ServerProgram(model, folder, "--health-timeout", "1", "--drain-timeout", "0")
    try:
        rank = psutil.Process(server.rank_pids()[0])
        other = psutil.Process(server.rank_pids()[1])
        with server.client() as client:
            stream = client.completions.create(
                prompt="x", stream=True, **{**LONG, "model": str(model)}
            )
            next(iter(stream))
            rank.suspend()
            other.suspend()
            wait_until(lambda: server.http.get("/health").status_code == 503, "health to fail", 10)
            assert "no rank has finished a step" in server.http.get("/health").text
            rank.resume()
            other.resume()
            wait_until(lambda: server.http.get("/health").status_code == 200, "health again", 10)
            stream.close()
        server.wait_until_idle()
    finally:
        server.kill()


def test_a_port_that_is_taken_is_one_line(start: Callable[[], ServerProgram], model: Path) -> None:
    import subprocess

    from program import SERVE

    server = start()
    port = server.url.rpartition(":")[2]
    done = subprocess.run([*SERVE, str(model), "--port", port], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: host='127.0.0.1' port={port} can't be listened at")
    assert done.stderr.count("\n") == 1
