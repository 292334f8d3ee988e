"""The command line. Options are the fields of dataclasses; each command is one function here.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

import dataclasses
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import longspan
from longspan.cli_calibrate import calibrate
from longspan.cli_chat import chat
from longspan.cli_eval import needle
from longspan.cli_plan import plan
from longspan.config import EngineConfig
from longspan.errors import InvalidRequestError, LongspanError, RankFailedError
from longspan.options import with_options
from longspan.sampling_params import SamplingParams
from longspan.server.config import ServerConfig
from longspan.worker.forker import Forker

if TYPE_CHECKING:
    from longspan.outputs import CompletionOutput, RequestOutput

__all__ = ["main"]

_INTERRUPTED, _TERMINATED = 130, 143

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of long options
)


def main() -> None:
    """The program `longspan`."""
    # A mistyped model would else be told about each of the hub's retries, besides the error.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    Forker.in_program = True
    app(prog_name="longspan")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longspan {longspan.__version__}")
        raise typer.Exit


@app.callback()
def _longspan(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Exact serving of long contexts over several devices."""


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    try:
        yield
    except LongspanError as error:
        message = str(error)
        if not isinstance(error, RankFailedError):  # which brings the rank's traceback
            message = " ".join(message.split())
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(_INTERRUPTED) from None


evaluations = typer.Typer(no_args_is_help=True, help="Evaluate a model.", rich_markup_mode=None)


def _command(function: Callable[..., None], of: typer.Typer = app) -> Callable[..., None]:
    """Make a function a command of its name; what Longspan refuses ends it with one line."""
    return of.command()(_errors_on_one_line()(with_options(function)))


@_command
def generate(
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="File with the prompt, in UTF-8; - is standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt as a user's message in a chat.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document with text, tokens and metrics.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the text as it is drawn; without either, if it goes to a terminal.",
        ),
    ] = None,
    *,
    config: EngineConfig,
    params: SamplingParams,
) -> None:
    """Complete a prompt.

    The text goes to standard output, progress and figures go to standard error. Options are those
    of the prompt, then of the engine, then of sampling.
    """
    if json and stream:
        raise typer.BadParameter("give one of --json and --stream")
    text = _prompt(prompt, prompt_file)
    from rich.console import Console

    from longspan.llm import LLM
    from longspan.progress import summary

    with LLM(**dataclasses.asdict(config)) as llm:
        asked = llm.preprocess_chat([{"role": "user", "content": text}])[0] if chat else text
        if not json and (sys.stdout.isatty() if stream is None else stream):
            output = _print_all(llm.stream(asked, params, use_tqdm=True), params.n)
        else:
            [output] = llm.generate(asked, params)
            if not json:
                _print_all([output], params.n)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(_document(output)))
    else:
        Console(stderr=True).print(summary(output))


@_command
def serve(*, config: EngineConfig, server: ServerConfig) -> None:
    """Serve MODEL over HTTP, as OpenAI's API does.

    On one node this is all there is to start. Of several, node 0 serves, and the others lend it
    their ranks: they need --nnodes, --node-rank (1 or more), --master-addr and, as node 0 does, the
    secret in LONGSPAN_SECRET; they load their own MODEL, take all other options from node 0, and
    end with it.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if config.node_rank == 0:
        from longspan.server.serve import serve

        serve(config, server, lambda line: typer.echo(line, err=True))
    else:
        from longspan.worker.node_agent import lend

        lend(config, lambda line: typer.echo(f"node {config.node_rank}: {line}", err=True))


def _terminate(*_: object) -> None:
    typer.echo("terminated", err=True)
    raise SystemExit(_TERMINATED)


_command(chat)
_command(plan)
_command(calibrate)
_command(needle, evaluations)
app.add_typer(evaluations, name="eval")


@_command
def demo(
    context_parallel_size: Annotated[int, typer.Option(min=2, help="Ranks, one process each.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the text.")] = 40_000,
    compare: Annotated[
        bool, typer.Option(help="Check the tokens against transformers in one process.")
    ] = True,
) -> None:
    """Find facts in a text that no rank could hold alone.

    Hides a few facts in a long text, asks a packaged model for them, and compares every token of
    its answers with what transformers generates in one process. Needs no network.
    """
    from longspan.demo.demo import run

    if not run(context_parallel_size, tokens, compare=compare):
        raise typer.Exit(1)


def _prompt(prompt: str | None, file: str | None) -> str:
    """The prompt's text. Raises InvalidRequestError if it can't be read or is not UTF-8."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give one of --prompt and --prompt-file")
    name = "--prompt" if file is None else f"--prompt-file {file}"
    try:
        if prompt is not None:
            data = os.fsencode(prompt)
        else:
            data = sys.stdin.buffer.read() if file == "-" else Path(str(file)).read_bytes()
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except OSError as error:
        raise InvalidRequestError(f"{name} can't be read: {error.strerror}") from None


def _print_all(increments: Iterable["RequestOutput"], n: int) -> "RequestOutput":
    """Print a prompt's `n` completions as they come; returns the whole of them."""
    printer = _Printer(n)
    whole = None
    try:
        for increment in increments:
            if whole is None:
                whole = increment
            else:
                whole.add(increment)
            printer.show(increment.outputs)
    finally:
        if whole is not None and sys.stdout.isatty():
            typer.echo()
    assert whole is not None
    return whole


class _Printer:
    """Prints completions one after the other, each as far as it has come."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._current = 0
        self._texts: defaultdict[int, str] = defaultdict(str)
        self._ended: set[int] = set()

    def show(self, completions: Iterable["CompletionOutput"]) -> None:
        for completion in completions:
            self._texts[completion.index] += completion.text
            if completion.finish_reason:
                self._ended.add(completion.index)
        text = self._texts.pop(self._current, "")
        while self._current in self._ended and self._current + 1 < self._n:
            self._current += 1
            text += "\n---\n" + self._texts.pop(self._current, "")
        if text:
            typer.echo(text.encode(), nl=False)


def _document(output: "RequestOutput") -> dict[str, Any]:
    """What --json prints: the first completion, the others, and the metrics.

    Counts are of tokens, times in seconds; None is a time that so few tokens don't tell.
    """
    first, *others = (dataclasses.asdict(completion) for completion in output.outputs)
    metrics = output.metrics
    assert metrics is not None
    return first | {
        "alternatives": others,
        "metrics": {
            "prompt_tokens": len(output.prompt_token_ids),
            "output_tokens": sum(len(completion.token_ids) for completion in output.outputs),
            "time_to_first_token": metrics.time_to_first_token,
            "time_per_output_token": metrics.time_per_output_token,
            "kv_tokens_per_rank": metrics.kv_tokens,
            "num_preemptions": metrics.num_preemptions,
        },
    }
