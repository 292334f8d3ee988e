"""Command-line options that are derived from the fields of dataclasses."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin, get_type_hints

import typer

__all__ = ["SAMPLING_HELP", "with_options"]

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
"""What the sampling parameters do; the engine's options have their help in their fields."""


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a function an option for each field of its parameters that are dataclasses.

    A field without default becomes an argument. Fields of one name share an option. Typer reads
    the options from the signature, and the parameters are made from their values.
    """
    parameters = inspect.signature(function).parameters.values()
    options: dict[str, inspect.Parameter] = {}
    for parameter in parameters:
        noun = parameter.annotation
        for option in _options(noun) if _is_dataclass(noun) else [parameter]:
            options.setdefault(option.name, option.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        function(**{p.name: _argument(p, values) for p in parameters})

    signature = inspect.Signature(list(options.values()))
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _options(noun: type[Any]) -> Iterator[inspect.Parameter]:
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


def _argument(parameter: inspect.Parameter, values: dict[str, Any]) -> Any:
    noun = parameter.annotation
    if not _is_dataclass(noun):
        return values[parameter.name]
    return noun(**{field.name: values[field.name] for field in dataclasses.fields(noun)})


def _is_dataclass(annotation: Any) -> TypeGuard[type[Any]]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
