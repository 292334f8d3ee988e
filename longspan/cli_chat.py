"""The command `longspan chat`: talk to a server, and see how far a long prompt is."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any

import typer

from longspan.chat_client import Answer, ChatClient
from longspan.errors import InvalidRequestError, ServerError
from longspan.server.config import API_KEY

__all__ = ["chat"]

PATIENCE_SECONDS = 0.5
"""A prompt that is computed sooner shows nothing."""


def chat(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(help=f"Its key; better given as {API_KEY} in the environment."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, if it has more.")] = None,
    document: Annotated[
        Path | None, typer.Option(help="File in UTF-8 whose text comes before the first message.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of each answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits before a token is drawn; 0 is greedy.")
    ] = None,
) -> None:
    """Talk to a server that is running.

    Each line is a message. Ctrl-C ends an answer, Ctrl-D the talk. Answers go to standard output;
    how far a long prompt is, and figures of each answer, go to standard error.
    """
    client = ChatClient(url, api_key or os.environ.get(API_KEY))
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    talk = _Talk(client, model or client.model(), settings)
    before = "" if document is None else _text_of(document) + "\n\n"
    for line in _lines():
        talk.say(before + line)
        before = ""


@dataclass(slots=True)
class _Talk:
    """A conversation, and what it is asked with."""

    client: ChatClient
    model: str
    settings: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Send a message and print the answer, as far as it is wanted."""
        self.messages.append({"role": "user", "content": text})
        begun, first, said = time.monotonic(), None, ""
        try:
            with closing(self.client.answer(self.model, self.messages, **self.settings)) as answer:
                with _Waiting(self.client, answer) as waiting:
                    for piece in answer:
                        first = first or time.monotonic()
                        waiting.end()
                        typer.echo(piece, nl=False)
                        said += piece
                typer.echo()
                typer.echo(_figures(answer.usage, begun, first), err=True)
        except KeyboardInterrupt:
            typer.echo("\n(stopped)", err=True)
        except ServerError as error:
            if not sys.stdin.isatty():
                raise
            typer.echo(f"error: {error}", err=True)
        self.messages.append({"role": "assistant", "content": said})


class _Waiting:
    """Shows how far the prompt is, until the answer begins, where there is a terminal."""

    def __init__(self, client: ChatClient, answer: Answer) -> None:
        self._client = client
        self._request_id = answer.request_id
        self._over = Event()
        self._thread = Thread(target=self._show, daemon=True)

    def __enter__(self) -> "_Waiting":
        if self._request_id is not None and sys.stderr.isatty():
            self._thread.start()
        return self

    def end(self) -> None:
        """Clear the line, so that the answer can be printed."""
        if not self._over.is_set():
            self._over.set()
            if self._thread.ident is not None:
                self._thread.join(1.0)

    def __exit__(self, *_: object) -> None:
        self.end()

    def _show(self) -> None:
        if self._over.wait(PATIENCE_SECONDS):
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("waiting for the server", total=None, left="")
            for progress in self._client.progress(str(self._request_id)):
                if self._over.is_set() or progress["state"] not in ("waiting", "prefill"):
                    return
                if progress["state"] == "prefill":
                    done, total = progress["prefilled_tokens"], progress["prompt_tokens"]
                    told = _told(progress)
                    bars.update(task, description=told, completed=done, total=total)
                    bars.update(task, left=_left(progress["seconds_left"]))


def _told(progress: dict[str, Any]) -> str:
    ranks = len(progress["ranks"])
    where = f"{ranks} ranks" if ranks > 1 else "1 rank"
    return (
        f"prefill {progress['prefilled_tokens']:,} of {progress['prompt_tokens']:,} tokens "
        f"on {where}"
    )


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"


def _figures(usage: dict[str, Any], begun: float, first: float | None) -> str:
    """One line about an answer: tokens and times."""
    if not usage or first is None:
        return "(no text)"
    prompt, new = usage["prompt_tokens"], usage["completion_tokens"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    pace = (new - 1) / max(time.monotonic() - first, 1e-6)
    return (
        f"({prompt:,} prompt tokens, {cached:,} of them cached; first token after "
        f"{first - begun:.1f} s; {new:,} tokens, {pace:.0f} tokens/s)"
    )


def _lines() -> Iterator[str]:
    """What is typed, or comes from a pipe; lines without text are passed over."""
    if not sys.stdin.isatty():
        yield from filter(str.strip, map(str.rstrip, sys.stdin))
        return
    import readline  # noqa: F401  what is typed can be edited

    with suppress(EOFError):
        while True:
            line = input("> ").strip()
            if line:
                yield line


def _text_of(path: Path) -> str:
    """A file's text. Raises InvalidRequestError if it can't be read or is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InvalidRequestError(f"--document {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"--document {path} is not UTF-8: {error.reason}") from None
