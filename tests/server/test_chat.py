"""`longspan chat` in a terminal of its own, against a real server."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zoo
from program import PATIENCE_S, ServerProgram, wait_until

from longspan.evaluation.subject import ServerSubject
from longspan.evaluation.sweep import Sweep, evaluate

CHAT = [sys.executable, "-c", "from longspan.cli import main; main()", "chat"]
KEY = "a key of the tests"
GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    folder = tmp_path_factory.mktemp("chat")
    model = zoo.build("llama", folder / "model", max_position_embeddings=32_768)
    zoo.build_tokenizer(model)
    options = ("--served-model-name", "tiny", "--api-key", KEY, "--kv-cache-tokens", "12000")
    server = ServerProgram(model, folder, *options, key=KEY)
    yield server
    server.kill()


class Talk:
    """The program; standard error is a terminal, standard input and output are pipes."""

    def __init__(self, url: str, *arguments: str, key: str = KEY) -> None:
        self.seen = b""
        self._terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*CHAT, "--url", url, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "LONGSPAN_API_KEY": key, "TERM": "xterm", "COLUMNS": "120"},
        )
        os.close(theirs)
        os.set_blocking(self._terminal, False)

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def shown(self) -> str:
        """What standard error has shown so far, without colours and moves."""
        with suppress(OSError):  # there is nothing more now, or ever
            while part := os.read(self._terminal, 65536):
                self.seen += part
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen.decode(errors="replace"))

    def wait_for(self, text: str) -> None:
        wait_until(lambda: re.search(text, self.shown()) is not None, text)

    def end(self) -> tuple[int, str]:
        """Its status and what it has written to standard output."""
        written, _ = self.process.communicate(timeout=PATIENCE_S)
        self.shown()
        os.close(self._terminal)
        return self.process.returncode, written.decode()


def test_it_shows_how_far_a_long_document_is(server: ServerProgram, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("All the lists of the import system, and what they say. " * 700)
    talk = Talk(server.url, "--document", str(document), "--max-tokens", "8", *GREEDY)
    talk.type("What does it say?")
    talk.wait_for(r"prefill [\d,]+ of [\d,]{6} tokens on 2 ranks")
    talk.wait_for(r"\([\d,]{6} prompt tokens, 0 of them cached; first token after .* 8 tokens")
    talk.type("And what else?")
    talk.wait_for(r"\([\d,]{6} prompt tokens, [\d,]{6} of them cached; .* 8 tokens")
    status, written = talk.end()
    assert status == 0, talk.shown()
    messages = [{"role": "user", "content": f"{document.read_text()}\n\nWhat does it say?"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = server.http.post("/v1/chat/completions", json=asked).json()
    assert written.startswith(answer["choices"][0]["message"]["content"] + "\n")


def test_an_interrupt_ends_the_answer_and_not_the_talk(server: ServerProgram) -> None:
    talk = Talk(server.url, *GREEDY)
    talk.type("Say something about lists.")
    wait_until(lambda: server.figure("longspan:kv_pages_used") > 10, "a long answer")
    talk.process.send_signal(signal.SIGINT)
    talk.wait_for(r"\(stopped\)")
    server.wait_until_idle()
    assert talk.process.poll() is None
    assert talk.end()[0] == 0


@pytest.mark.parametrize(
    ("key", "arguments", "said"),
    [
        ("another", (), "error: the API key is missing or wrong"),
        (KEY, ("--document", "/no/such"), "error: --document /no/such can't be read: No such file"),
        (KEY, ("--url", "http://127.0.0.1:9"), "error: no server at http://127.0.0.1:9: "),
        (KEY, ("--max-tokens", "0"), "error: max_tokens"),
    ],
)
def test_what_is_wrong_is_one_line(
    server: ServerProgram, key: str, arguments: tuple[str, ...], said: str
) -> None:
    talk = Talk(server.url, *arguments, key=key)
    with suppress(BrokenPipeError):
        talk.type("x")
    code, written = talk.end()
    assert (code, written) == (1, "")
    assert talk.shown().startswith(said), talk.shown()
    assert len(talk.shown().splitlines()) == 1


def test_an_evaluation_asks_it_over_texts_of_about_the_lengths_wanted(
    server: ServerProgram,
) -> None:
    """What a random model answers is never right; texts and the cache are what is looked at."""
    sweep = Sweep((512, 2048), (0.0, 100.0), samples=2, seed=5)
    report = evaluate(ServerSubject(f"{server.url}/v1", KEY, "tiny"), sweep, None, lambda *_: None)
    for length in sweep.lengths:
        answers = [question.answer for question in report.at(length)]
        assert len(answers) == 4
        assert all(0.85 * length < answer.prompt_tokens < 1.05 * length for answer in answers)
        assert all(answer.output_tokens for answer in answers)
        assert answers[1].cached_tokens > 0.7 * length
        assert report.accuracy(length) == 0
