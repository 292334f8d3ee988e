"""The command line. Options are the fields of dataclasses; each command is one function here.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

import dataclasses
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeGuard,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

import longspan
from longspan.config import EngineConfig
from longspan.errors import InvalidRequestError, LongspanError, RankFailedError
from longspan.sampling_params import SamplingParams

if TYPE_CHECKING:
    from longspan.outputs import RequestOutput

__all__ = ["main"]

SAMPLING_HELP = {
    "n": "Completions of the prompt; lines of '---' stand between them.",
    "temperature": "Divides the logits before a token is drawn; 0 is greedy.",
    "top_p": "Draw from the likeliest tokens that have so much probability together.",
    "top_k": "Draw from so many of the likeliest tokens; 0 or -1: from all.",
    "min_p": "Draw from tokens with at least so much of the likeliest one's probability.",
    "seed": "Seed of the random draws.",
    "max_tokens": "Most tokens to generate; the context's end is a limit too.",
    "min_tokens": "Go on for at least so many tokens.",
    "stop": "End before this text; give it again for more than one.",
    "stop_token_ids": "End at this token; give it again for more than one.",
    "ignore_eos": "Go on after an end-of-sequence token.",
    "logprobs": "Report so many of the likeliest tokens at each position (with --json); -1: all.",
    "repetition_penalty": "Above 1, tokens of prompt and output become less likely.",
    "presence_penalty": "Above 0, tokens of the output become less likely.",
    "frequency_penalty": "Above 0, tokens become less likely with each time they were generated.",
    "skip_special_tokens": "Leave special tokens out of the text.",
}

_INTERRUPTED = 130

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


def _options(noun: type[Any]) -> Iterator[inspect.Parameter]:
    """One option for each field of a dataclass, an argument for one without default."""
    hints = get_type_hints(noun)
    for field in dataclasses.fields(noun):
        help = field.metadata.get("help") or SAMPLING_HELP[field.name]
        kind, parsing = _type(hints[field.name])
        required = field.default is dataclasses.MISSING
        info = typer.Argument(help=help) if required else typer.Option(help=help, **parsing)
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else field.default,
            annotation=Annotated[kind, info],
        )


def _type(hint: Any) -> tuple[Any, dict[str, Any]]:
    """What typer is told of a field's type: `Sequence` repeats its option, `tuple` has commas."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for member in members:
        if get_origin(member) is Sequence:
            (item,) = get_args(member)
            return types.GenericAlias(list, item) | None, {"metavar": f"<{item.__name__}>"}
        if get_origin(member) is tuple:
            return str, {"parser": _whole_numbers, "metavar": "<int[,int...]>"}
    return hint, {}


def _whole_numbers(value: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{value!r} is not a whole number, or several with commas"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command of its name; what Longspan refuses ends it with one line.

    A parameter whose type is a dataclass is made from an option for each of its fields. Fields
    of one name share an option.
    """
    parameters = inspect.signature(function).parameters.values()
    options: dict[str, inspect.Parameter] = {}
    for parameter in parameters:
        noun = parameter.annotation
        for option in _options(noun) if _is_dataclass(noun) else [parameter]:
            options.setdefault(option.name, option.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        with _errors_on_one_line():
            function(**{p.name: _argument(p, values) for p in parameters})

    signature = inspect.Signature(list(options.values()))
    run.__signature__ = signature  # type: ignore[attr-defined]
    return app.command()(run)


def _argument(parameter: inspect.Parameter, values: dict[str, Any]) -> Any:
    noun = parameter.annotation
    if not _is_dataclass(noun):
        return values[parameter.name]
    return noun(**{field.name: values[field.name] for field in dataclasses.fields(noun)})


def _is_dataclass(annotation: Any) -> TypeGuard[type[Any]]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


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
    *,
    config: EngineConfig,
    params: SamplingParams,
) -> None:
    """Complete a prompt.

    The text goes to standard output, progress and figures go to standard error. Options are those
    of the prompt, then of the engine, then of sampling.
    """
    text = _prompt(prompt, prompt_file)
    from rich.console import Console

    from longspan.llm import LLM
    from longspan.progress import summary

    with LLM(**dataclasses.asdict(config)) as llm:
        if chat:
            [output] = llm.chat([{"role": "user", "content": text}], params)
        else:
            [output] = llm.generate(text, params)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(_document(output)))
        return
    completions = "\n---\n".join(completion.text for completion in output.outputs)
    typer.echo(completions.encode(), nl=sys.stdout.isatty())
    Console(stderr=True).print(summary(output))


@_command
def demo(
    context_parallel_size: Annotated[int, typer.Option(min=2, help="Ranks, one process each.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 24_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 48,
    compare: Annotated[
        bool, typer.Option(help="Check the tokens against transformers in one process.")
    ] = True,
) -> None:
    """Show a long context served exactly.

    Serves a prompt that no rank could hold alone with a packaged model, and compares every token
    with what transformers generates in one process. Needs no network.
    """
    from longspan.demo.demo import run

    if not run(context_parallel_size, tokens, max_tokens, compare=compare):
        raise typer.Exit(1)


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
