"""`longspan calibrate`: measures a fleet as it is started, and keeps what it does in a file."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.config import EngineConfig

if TYPE_CHECKING:
    from longspan.cost.rates import Rates

__all__ = ["calibrate"]


def calibrate(
    output: Annotated[
        str, typer.Option(help="The file to write, for the option --calibration.")
    ] = "calibration.json",
    *,
    config: EngineConfig,
) -> None:
    """Measure what devices and links do, for the choices that the engine makes.

    Starts all ranks with the model as serving does, measures steps, attention and messages on all
    of them at once, and writes the rates that come nearest. Serve with the same number of ranks.
    """
    from longspan.calibrate import measured

    calibration = measured(config)
    calibration.save(output)
    for line in summary(calibration.rates):
        typer.echo(line, err=True)
    typer.echo(output)


def summary(rates: "Rates") -> Iterator[str]:
    """What was measured, in a few lines."""
    yield f"a step            {1e3 * rates.step_seconds:10.2f} ms"
    yield f"linear layers     {rates.linear_flops / 1e9:10.1f} Gflop/s"
    yield f"attention         {rates.attention_flops / 1e9:10.1f} Gflop/s"
    yield f"one more part     {1e6 * rates.attend_seconds:10.1f} us"
    yield f"memory            {rates.memory_bytes / 1e9:10.2f} GB/s"
    for name, links in (("to one", rates.links), ("to several", rates.all_to_all)):
        for kind, link in links.items():
            yield (
                f"{kind:7} {name:10}{1e6 * link.seconds:10.1f} us, {link.bytes / 1e9:.2f} GB/s, "
                f"{100 * link.overlap:.0f} % beside attention"
            )
