"""A sweep as a picture: accuracy over length and depth. Needs matplotlib (`longspan[plot]`)."""

from pathlib import Path

from longspan.errors import ConfigError
from longspan.evaluation.sweep import Report
from longspan.token_count import show_tokens

__all__ = ["save_heat_map"]


def save_heat_map(report: Report, path: Path) -> None:
    """Draw the percentage of right answers in each cell, red to green, and save it as a PNG.

    Raises:
        ConfigError: the file can't be written.
    """
    from matplotlib.figure import Figure

    lengths, depths = report.sweep.lengths, report.sweep.depths
    cells = [[100 * report.accuracy(length, depth) for length in lengths] for depth in depths]
    size = (3 + 1.1 * len(lengths), 1.6 + 0.36 * len(depths))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for row, percents in enumerate(cells):
        for column, percent in enumerate(percents):
            axes.text(column, row, f"{percent:.0f}", ha="center", va="center", fontsize=9)
    means = [f"{show_tokens(each)}\n{100 * report.accuracy(each):.1f} %" for each in lengths]
    axes.set_xticks(range(len(lengths)), means)
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("context (tokens), and right answers of all depths")
    axes.set_ylabel("depth of the needle")
    axes.set_title(_title(report), fontsize=10)
    figure.colorbar(image, label="right answers (%)")
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise ConfigError(f"plot={str(path)!r} can't be written: {error.strerror}") from None


def _title(report: Report) -> str:
    where = "" if report.ranks is None else f", {report.ranks} rank{'s' * (report.ranks > 1)}"
    return f"{Path(report.model).name}{where}: {report.sweep.samples} questions a cell"
