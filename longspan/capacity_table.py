"""What a person reads of a capacity plan: lines and tables, no wider than 80 columns."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from longspan.cost.capacity_plan import CapacityPlan, Fewest, Row
from longspan.cost.explain import Choice
from longspan.token_count import show_tokens

__all__ = ["print_plan", "show_seconds"]


_LEGEND = (
    "needs: fewest devices that hold it; ranks: those that one request is given;\n"
    "prefill: strategy of its first and last chunk; limit: what takes most time"
)


def show_seconds(seconds: float) -> str:
    """Three digits, in the unit that a person would take."""
    for most, unit, size in ((1, "ms", 1e-3), (600, "s", 1.0), (7200, "min", 60.0)):
        if seconds < most:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 3600)} h"


def print_plan(plan: CapacityPlan, console: Console, explained: bool) -> None:
    """Print a plan, and if wanted the choices at its longest context."""
    for line in _lines(plan):
        console.print(line, highlight=False)
    console.print()
    console.print(_rows(plan.rows))
    console.print(_LEGEND, highlight=False, style="dim")
    console.print()
    console.print(_fewest(plan), highlight=False)
    if explained:
        _print_choices(plan, console)
    console.print()
    for note in plan.notes:
        console.print(note, highlight=False, style="dim")


def _lines(plan: CapacityPlan) -> Iterable[str]:
    device, each = plan.device, "in each of" if plan.batch > 1 else "in"
    requests = "1 request" if plan.batch == 1 else f"{plan.batch:,} requests"
    hosts = "" if plan.nodes == 1 else f"{plan.nodes} x "
    yield (
        f"[bold]{plan.model}[/bold]: {plan.parameters / 1e9:,.2f} billion parameters in "
        f"{plan.dtype}; {hosts}{plan.devices_per_node} {device.name}, {requests} at once"
    )
    yield (
        f"A rank   {plan.weights_bytes / 1e9:.1f} GB of weights, {plan.kv_pool_bytes / 1e9:.1f} GB "
        f"of KV, of {device.memory_bytes / 1e9:g} GB"
    )
    yield (
        f"KV       {plan.kv_bytes_per_token:,} bytes a token: {plan.tokens_per_rank:,} tokens a "
        f"rank, {plan.tokens_in_all:,} in all"
    )
    yield f"Longest  {plan.max_context:,} tokens {each} {requests}"


def _rows(rows: Iterable[Row]) -> Table:
    names = "context", "needs", "ranks", "TTFT", "limit", "prefill", "TPOT", "limit", "decode"
    table = _table(*names)
    for row in rows:
        length = show_tokens(row.context), f"{row.devices:,}"
        if row.ttft is None or row.tpot is None or row.ttft_limit is None:
            table.add_row(*length, "", "[red]too long[/red]")
        else:
            table.add_row(
                *length,
                str(row.degree),
                show_seconds(row.ttft),
                row.ttft_limit,
                ", ".join(row.prefill_strategies),
                show_seconds(row.tpot),
                row.tpot_limit,
                row.decode_strategy,
            )
    return table


def _fewest(plan: CapacityPlan) -> str:
    fewest, name = plan.fewest, plan.device.name
    batch = "" if plan.batch == 1 else f"{plan.batch:,} x "
    length = f"{batch}{show_tokens(plan.context)} ({plan.rows[-1].kv_bytes / 1e9:,.1f} GB of KV)"
    text = f"Fewest {name} for {length}: {fewest.for_memory:,} by memory"
    if fewest.nearest is None or fewest.ttft is None or fewest.tpot is None:
        return f"{text}."
    reached = (
        f"TTFT {show_seconds(fewest.ttft)}, limited by {fewest.ttft_limit}; "
        f"TPOT {show_seconds(fewest.tpot)}, by {fewest.tpot_limit}"
    )
    if fewest.for_targets is not None:
        return f"{text}, {fewest.for_targets:,} for {_targets(fewest)} ({reached})."
    return (
        f"{text}; none up to {fewest.searched:,} for {_targets(fewest)}, nearest are "
        f"{fewest.nearest:,} ({reached})."
    )


def _targets(fewest: Fewest) -> str:
    pairs = (("TTFT", fewest.ttft_target), ("TPOT", fewest.tpot_target))
    return " and ".join(f"{name} <= {target:g} s" for name, target in pairs if target is not None)


def _print_choices(plan: CapacityPlan, console: Console) -> None:
    length = show_tokens(plan.context)
    if not plan.choices:
        console.print(f"\nNothing to explain: {length} does not fit.", highlight=False)
        return
    ttft = {one.degree: show_seconds(one.ttft) for one in plan.choices if one.ttft is not None}
    taken = next(one.degree for one in plan.choices if one.chosen)
    text = ", ".join(f"{ranks}{'*' * (ranks == taken)}: {time}" for ranks, time in ttft.items())
    console.print(
        f"\nTTFT of one request of {length} by its ranks, * is taken: {text}. Twice the ranks are "
        "taken where it comes 1.5 times sooner by them, up to a request's part of them in a batch.",
        highlight=False,
    )
    for phase in ("prefill", "decode"):
        choices = [choice for choice in plan.choices if choice.phase == phase]
        step = f"Its last {phase} step" if phase == "decode" else "Its last full prefill step"
        console.print(f"\n[bold]{step}: ms of the busiest rank[/bold]", highlight=False)
        console.print(_choices(choices))
    console.print(
        "fixed (launches, reading weights) + linear + attend + send - hidden = total;\n"
        "near and far: what the rank sends inside its host and to others",
        highlight=False,
        style="dim",
    )


def _choices(choices: Sequence[Choice]) -> Table:
    names = "ranks", "strategy", "tokens", "fixed", "linear", "attend", "send", "hidden", "total"
    table = _table(*names, "near", "far")
    for choice in choices:
        parts = (
            choice.launches + choice.weights,
            choice.linear,
            choice.attention,
            choice.exchange,
            choice.hidden,
            choice.total,
        )
        table.add_row(
            str(choice.degree),
            f"{choice.strategy}{'*' if choice.chosen else ''}",
            f"{choice.new_tokens}",
            *(_three_digits(part * 1e3) for part in parts),
            _show_bytes(choice.near_bytes),
            _show_bytes(choice.far_bytes),
            style="bold" if choice.chosen else "",
        )
    return table


def _show_bytes(number: int) -> str:
    for unit, size in (("KB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if number < 1000 * size:
            return f"{_three_digits(number / size)} {unit}" if number else "0"
    return f"{_three_digits(number / 1e12)} TB"


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in names:
        left = name in ("limit", "prefill", "decode", "strategy")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _three_digits(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"
