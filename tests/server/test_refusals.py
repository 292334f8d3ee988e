"""What the server refuses, in words and types that clients know, and its end by SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from program import SERVE, ServerProgram, wait_until

KEY = "correct horse"
LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 3500, "extra_body": {"ignore_eos": True}}
LIMITS = {
    "--max-num-seqs": 2,
    "--max-waiting-requests": 4,
    "--max-request-bytes": 200_000,
    "--max-n": 3,
    "--max-output-tokens": 3600,
    "--max-logprobs": 5,
    "--drain-timeout": 1.5,
    "--allowed-origins": "https://example.org",
}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    folder = tmp_path_factory.mktemp("limited")
    limits = [str(word) for option in LIMITS.items() for word in option]
    os.environ["LONGSPAN_API_KEY"] = KEY
    try:
        server = ServerProgram(model, folder, "--served-model-name", "tiny", *limits, key=KEY)
    finally:
        del os.environ["LONGSPAN_API_KEY"]
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server: ServerProgram) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x", "korrekt Pferd"])
def test_a_wrong_key_is_401(server: ServerProgram, key: str) -> None:
    with server.client(api_key=key) as stranger, pytest.raises(openai.AuthenticationError) as told:
        stranger.models.list()
    assert told.value.code == "invalid_api_key"
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 401
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": "x"}).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_another_model_is_404(client: openai.OpenAI) -> None:
    for call in (
        lambda: client.completions.create(model="large", prompt="x"),
        lambda: client.models.retrieve("large"),
    ):
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as told:
            call()
        assert told.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suffix": "end"}, "suffix is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"tempratur": 1}, "unknown field 'tempratur'; did you mean 'temperature'?"),
        ({"{0}": 1}, "unknown field"),
        ({"temperature": "1"}, "temperature: "),
        ({"temperature": -1}, "temperature=-1.0 must be a finite number of at least 0"),
        ({"top_p": 0}, "top_p=0.0 must be"),
        ({"n": 0}, "n=0 must be a whole number of at least 1"),
        ({"n": 4}, "n=4 must be at most 3"),
        ({"n": 2, "temperature": 0}, "n=2 must be 1 with temperature=0"),
        ({"max_tokens": 0}, "max_tokens=0 must be"),
        ({"max_tokens": 3601}, "max_tokens=3601 must be at most 3600"),
        ({"logprobs": 6}, "logprobs=6 must be at most 5"),
        ({"logprobs": 1, "echo": True}, "echo with logprobs is not supported"),
        ({"stop": [1]}, "stop="),
        ({"stop_token_ids": [512]}, "stop_token_ids contains 512"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x: "),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt: must be a text"),
        ({"prompt": [1, "x"]}, "prompt: must be a text"),
        ({"prompt": [512]}, r"prompt_token_ids[0]=512 is outside the vocabulary"),
        ({"prompt": [-1]}, r"prompt_token_ids[0]=-1 is outside the vocabulary"),
        ({"prompt": [7] * 8000}, "the prompt has 8000 tokens"),
        ({"prompt": "\ud800"}, "the text is not Unicode"),
        ({"prompt": ["x"] * 5}, "the request has 5 sequences"),
    ],
)
def test_what_cannot_be_served_is_400_and_says_why(
    server: ServerProgram, fields: dict[str, Any], message: str
) -> None:
    answer = server.http.post(
        "/v1/completions",
        content=json.dumps({"model": "tiny", "prompt": "x", **fields}),
        headers={"Content-Type": "application/json"},
    )
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", 400)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"content": "x"}]}, "messages.0.role: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template is not supported"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs may not have"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "chat template"),
    ],
)
def test_chats_that_cannot_be_served(
    server: ServerProgram, fields: dict[str, Any], message: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), (
        answer.text
    )


def test_what_changes_nothing_is_taken(server: ServerProgram, client: openai.OpenAI) -> None:
    client.completions.create(
        model="tiny", prompt="x", user="u", suffix="", best_of=1, logit_bias={}, max_tokens=1
    )
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "store": True}
    extras = {"response_format": {"type": "text"}, "logit_bias": None, "parallel_tool_calls": True}
    assert server.http.post("/v1/chat/completions", json=body | extras).status_code == 200


def test_bodies_that_are_no_json_are_400(server: ServerProgram) -> None:
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        answer = server.http.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, body[:10]
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert "body" in answer.json()["error"]["message"]
    form = server.http.post("/v1/completions", content=b'{"prompt": "x"}')
    assert "with the header Content-Type: application/json" in form.text


def test_a_large_body_is_413(server: ServerProgram, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="max_request_bytes=200000") as told:
        client.completions.create(model="tiny", prompt="x" * 200_000)
    assert told.value.status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    answer = server.http.post("/v1/completions", content=parts())  # says nothing of its length
    assert answer.status_code == 413
    assert server.http.get("/health").status_code == 200


def test_paths_and_methods_that_are_not_there(server: ServerProgram) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = server.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)


def test_only_allowed_pages_may_ask(server: ServerProgram) -> None:
    for origin, allowed in (("https://example.org", True), ("https://example.com", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = server.http.options("/v1/completions", headers=asked)
        assert ("access-control-allow-origin" in answer.headers) is allowed


def test_past_the_queue_it_is_429(server: ServerProgram, client: openai.OpenAI) -> None:
    """Two run, four wait, and the next is told when to come again."""
    streams = [client.completions.create(prompt="x", stream=True, **LONG) for _ in range(6)]
    try:
        wait_until(lambda: server.figure("vllm:num_requests_waiting") == 4, "four that wait")
        with pytest.raises(openai.RateLimitError, match="4 requests are waiting") as told:
            client.completions.create(prompt="x", **LONG)
        assert 1 <= int(told.value.response.headers["retry-after"]) <= 60
        assert server.http.get("/health").status_code == 200
    finally:
        for stream in streams:
            stream.close()
    server.wait_until_idle()
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


def test_half_a_request_and_a_broken_one_harm_nobody(server: ServerProgram) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (b"POST /v1/completions HTTP/1.1\r\nContent-Le", b"nonsense\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    assert server.http.get("/health").status_code == 200


def test_an_address_that_is_taken_is_one_line(server: ServerProgram, model: Path) -> None:
    """And comes before the model is loaded."""
    port = server.url.rpartition(":")[2]
    done = subprocess.run([*SERVE, str(model), "--port", port], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: host='127.0.0.1' port={port} can't be listened at")
    assert done.stderr.count("\n") == 1


def test_sigterm_drains_and_leaves_nothing(server: ServerProgram, client: openai.OpenAI) -> None:
    """What ends in time is whole; the rest is aborted, and told so. New ones are not accepted."""
    pids = [server.process.pid, *server.rank_pids()]
    ends: dict[str, Any] = {}

    def run(name: str, max_tokens: int) -> None:
        options = {**LONG, "max_tokens": max_tokens}
        parts = list(client.completions.create(prompt=name, stream=True, **options))
        ends[name] = (len(parts), parts[-1].choices[0].finish_reason)

    threads = [
        threading.Thread(target=run, args=arguments) for arguments in (("a", 60), ("b", 3500))
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.figure("vllm:num_requests_running") == 2, "both to run")
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    host, port = server.url.removeprefix("http://").split(":")
    with pytest.raises(OSError):  # noqa: PT011
        socket.create_connection((host, int(port)))
    for thread in threads:
        thread.join()
    assert server.end() == 0, server.said
    assert time.monotonic() - begun < 30
    assert ends["a"][1] == "length"
    assert ends["b"][1] == "abort"
    assert ends["b"][0] > 10
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"the end of {pids}", 10)
    assert [path.name for path in server.log.parent.iterdir()] == ["server.log"]
    assert "Traceback" not in server.said
