"""A plot of a capacity plan. The only file that needs matplotlib (extra `longspan[plot]`)."""

from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cost.capacity_plan import CapacityPlan
from longspan.errors import ConfigError
from longspan.token_count import show_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plot", "save_plot"]

_TTFT, _TPOT, _TOO_LONG, _MODEL = "tab:blue", "tab:orange", "tab:red", "tab:gray"


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn and written there, before any work.

    Raises:
        ConfigError: matplotlib is not installed, or there is no such folder.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            f"plot={str(path)!r} needs matplotlib; run pip install 'longspan[plot]'"
        ) from None
    if path.suffix.lower() != ".png":
        raise ConfigError(f"plot={str(path)!r} must be the name of a .png file")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"plot={str(path)!r} can't be written: its folder does not exist")


def save_plot(plan: CapacityPlan, path: Path) -> None:
    """Draw TTFT (on a logarithmic axis) and TPOT against context length, and save it as a PNG.

    Dashed lines are targets. Shaded is what does not fit; a dotted line is the model's own limit.

    Raises:
        ConfigError: the file can't be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    served = [row for row in plan.rows if row.fits]
    lengths = [row.context for row in served]
    for axes, name, color, values, target in (
        (upper, "TTFT", _TTFT, [row.ttft for row in served], plan.fewest.ttft_target),
        (lower, "TPOT", _TPOT, [row.tpot for row in served], plan.fewest.tpot_target),
    ):
        axes.set_xscale("log", base=2)
        axes.plot(lengths, values, "o-", color=color, label=name)
        axes.set_ylabel(name)
        if target is not None:
            axes.axhline(target, color=color, linestyle="--", label=f"target {_short(target)}")
        _mark_limits(plan, axes)
        axes.grid(True, which="major", alpha=0.3)
    if served:
        upper.set_yscale("log")
        upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        upper.yaxis.set_minor_formatter(NullFormatter())
    lower.set_ylim(0, 1.05 * lower.get_ylim()[1])
    upper.legend(loc="upper left")
    lower.legend(loc="lower right")
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _short(seconds)))
    contexts = _labelled([row.context for row in plan.rows])
    lower.set_xticks(contexts, [show_tokens(length) for length in contexts])
    lower.xaxis.set_minor_locator(NullLocator())
    lower.xaxis.set_minor_formatter(NullFormatter())
    lower.set_xlabel("context (tokens of each request)")
    figure.suptitle(_title(plan))
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"plot={str(path)!r} can't be written: {error.strerror}") from None


def _short(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 or not seconds else f"{seconds * 1000:g} ms"


def _labelled(contexts: list[int]) -> list[int]:
    """All lengths but the last one of the ladder, if its label would meet that of the end."""
    *ladder, longest = contexts
    return [length for length in ladder if 1.6 * length < longest] + [longest]


def _mark_limits(plan: CapacityPlan, axes: "Axes") -> None:
    longest = plan.rows[-1].context
    if plan.tokens_per_request < longest:
        axes.axvspan(
            plan.tokens_per_request,
            longest,
            color=_TOO_LONG,
            alpha=0.15,
            label=f"above {plan.tokens_per_request:,}: does not fit",
        )
    if plan.max_model_len <= longest:
        axes.axvline(
            plan.max_model_len,
            color=_MODEL,
            linestyle=":",
            label=f"the model's limit, {show_tokens(plan.max_model_len)}",
        )


def _title(plan: CapacityPlan) -> str:
    nodes = "" if plan.nodes == 1 else f"{plan.nodes} x "
    source = "measured rates" if plan.device.calibration else "assumed rates"
    return (
        f"{Path(plan.model).name} in {plan.dtype} on {nodes}{plan.devices_per_node} "
        f"{plan.device.name}, {plan.batch} at once: predicted from {source}"
    )
