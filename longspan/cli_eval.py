"""The commands `longspan eval ...`: how well a model finds what is far back in its context."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.server.config import API_KEY
from longspan.token_count import parse_tokens

if TYPE_CHECKING:
    from longspan.evaluation.subject import Subject
    from longspan.evaluation.sweep import Question

__all__ = ["needle"]


def needle(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the contexts, with commas: 4096, 4K (x 1024), 4k.")
    ] = "1K,4K,16K",
    depths: Annotated[
        str, typer.Option(help="Where the needles are, in percent of the context, with commas.")
    ] = "0,10,20,30,40,50,60,70,80,90,100",
    samples: Annotated[int, typer.Option(help="Questions for each length and depth.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of texts, names and codes.")] = 0,
    base_url: Annotated[
        str | None,
        typer.Option(help="Ask the MODEL of this server by OpenAI's API, and start no ranks."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"The server's key; better given as {API_KEY} in the environment."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document with all answers.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map into this PNG file.")] = None,
    *,
    config: EngineConfig,
) -> None:
    """Ask for facts that are hidden in long texts, by length and depth.

    "The code of harbor 417 is 930521." stands somewhere in endless prose; the question is for the
    code. Texts are made here, the same for the same seed. Questions of one text share its prefill
    by the prefix cache. Options are those of the evaluation, then of the engine.
    """
    from rich.console import Console

    from longspan.evaluation.sweep import Sweep, evaluate
    from longspan.evaluation.table import line, print_report
    from longspan.plot import check_plot

    sweep = Sweep(_lengths(lengths), _depths(depths), samples, seed)
    if plot is not None:
        check_plot(plot)

    def show(length: int, questions: "list[Question]") -> None:
        typer.echo(line(length, questions), err=True)

    with _subject(config, base_url, api_key) as subject:
        ranks = None if base_url else config.context_parallel_size
        report = evaluate(subject, sweep, ranks, show)
    if plot is not None:
        from longspan.evaluation.heat_map import save_heat_map

        save_heat_map(report, plot)
    if json:
        typer.echo(report.to_json())
    else:
        print_report(report, Console())


@contextmanager
def _subject(
    config: EngineConfig, base_url: str | None, api_key: str | None
) -> "Iterator[Subject]":
    from longspan.evaluation.subject import EngineSubject, ServerSubject

    if base_url is not None:
        yield ServerSubject(base_url, api_key or os.environ.get(API_KEY), config.model)
        return
    from longspan.llm import LLM

    with LLM(**dataclasses.asdict(config)) as llm:
        yield EngineSubject(llm)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(parse_tokens("lengths", part.strip()) for part in text.split(","))


def _depths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part.strip().removesuffix("%")) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"depths={text!r} must be numbers with commas, as in 0,50,100") from None
