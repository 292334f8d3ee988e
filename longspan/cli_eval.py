"""The commands `longspan eval ...`: how well a model finds what is far back in its context."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.config import EngineConfig, option
from longspan.errors import ConfigError
from longspan.evaluation.sweep import Sweep
from longspan.server.config import API_KEY
from longspan.token_count import parse_tokens

if TYPE_CHECKING:
    from longspan.evaluation.subject import Subject
    from longspan.evaluation.sweep import Question

__all__ = ["needle"]


@dataclass(frozen=True, kw_only=True)
class NeedleOptions:
    """What is asked, and of whom."""

    lengths: str = option(
        "1K,4K,16K", "Tokens of the contexts, with commas: 4096, 4K (x 1024) or 4k (x 1000)."
    )
    depths: str = option(
        "0,10,20,30,40,50,60,70,80,90,100",
        "Where the needles are, in percent of the context, with commas.",
    )
    samples: int = option(3, "Questions for each length and depth.")
    seed: int = option(0, "Seed of texts, names and codes.")
    base_url: str | None = option(
        None, "Ask the MODEL of this server by OpenAI's API, and start no ranks."
    )
    api_key: str | None = option(
        None, f"The server's key; better given as {API_KEY} in the environment."
    )

    @property
    def sweep(self) -> Sweep:
        """Raises ConfigError if a value is not what it must be."""
        lengths = tuple(parse_tokens("lengths", part.strip()) for part in self.lengths.split(","))
        try:
            depths = tuple(float(part.strip().removesuffix("%")) for part in self.depths.split(","))
        except ValueError:
            raise ConfigError(
                f"depths={self.depths!r} must be numbers with commas, as in 0,50,100"
            ) from None
        return Sweep(lengths, depths, self.samples, self.seed)


def needle(
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document with all answers.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map into this PNG file.")] = None,
    *,
    options: NeedleOptions,
    config: EngineConfig,
) -> None:
    """Ask for facts that are hidden in long texts, by length and depth.

    "The code of harbor 417 is 930521." stands somewhere in endless prose; the question is for the
    code. Texts are made here, the same for the same seed. Questions of one text share its prefill
    by the prefix cache. Options are those of the evaluation, then of the engine.
    """
    from rich.console import Console

    from longspan.evaluation.sweep import evaluate
    from longspan.evaluation.table import line, print_report
    from longspan.plot import check_plot

    sweep = options.sweep
    if plot is not None:
        check_plot(plot)

    def show(length: int, questions: "list[Question]") -> None:
        typer.echo(line(length, questions), err=True)

    with _subject(config, options) as subject:
        ranks = None if options.base_url else config.context_parallel_size
        report = evaluate(subject, sweep, ranks, show)
    if plot is not None:
        from longspan.evaluation.heat_map import save_heat_map

        save_heat_map(report, plot)
    if json:
        typer.echo(report.to_json())
    else:
        print_report(report, Console())


@contextmanager
def _subject(config: EngineConfig, options: NeedleOptions) -> "Iterator[Subject]":
    from longspan.evaluation.subject import EngineSubject, ServerSubject

    if options.base_url is not None:
        key = options.api_key or os.environ.get(API_KEY)
        yield ServerSubject(options.base_url, key, config.model)
        return
    from longspan.llm import LLM

    with LLM(**dataclasses.asdict(config)) as llm:
        yield EngineSubject(llm)
