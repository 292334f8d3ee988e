"""A rank that hangs or dies at work: everybody is told, and nothing hangs with it."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from program import ServerProgram, wait_until

LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 3500, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    folder = tmp_path_factory.mktemp("lost")
    options = ("--served-model-name", "tiny", "--health-timeout", "1", "--request-timeout", "5")
    server = ServerProgram(model, folder, *options)
    yield server
    server.kill()


def status(server: ServerProgram) -> int:
    return server.http.get("/health").status_code


def test_ranks_that_hang_make_the_server_unhealthy(server: ServerProgram) -> None:
    """Stopped, not dead: nothing ends, and /health says so until they go on."""
    ranks = [psutil.Process(pid) for pid in server.rank_pids()]
    with server.client() as client:
        stream = client.completions.create(prompt="x", stream=True, **LONG)
        next(iter(stream))
        for rank in ranks:
            rank.suspend()
        wait_until(lambda: status(server) == 503, "health to fail", 10)
        assert "no rank has finished a step" in server.http.get("/health").text
        for rank in ranks:
            rank.resume()
        wait_until(lambda: status(server) == 200, "health to be back", 10)
        stream.close()
    server.wait_until_idle()


def test_a_request_ends_at_its_deadline_with_what_it_has(server: ServerProgram) -> None:
    with server.client() as client:
        answer = client.completions.create(prompt="x", **{**LONG, "max_tokens": 7900})
    assert answer.choices[0].finish_reason == "abort"
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens < 7900
    server.wait_until_idle()


def test_a_rank_that_is_killed_at_work(server: ServerProgram) -> None:
    """Who waits for an answer gets an error that names the rank; /health is 503 from then on."""
    pids = server.rank_pids()
    told: dict[str, openai.APIError] = {}

    def run(name: str, stream: bool) -> None:
        with server.client() as client:
            try:
                for _ in client.completions.create(prompt=name, stream=stream, **LONG):
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
