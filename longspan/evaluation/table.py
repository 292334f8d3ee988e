"""What a person reads of a sweep in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longspan.capacity_table import show_seconds
from longspan.evaluation.sweep import Question, Report
from longspan.token_count import show_tokens

__all__ = ["line", "print_report"]


def line(length: int, questions: Sequence[Question]) -> str:
    """One length in a line: how much was right, and what it took."""
    right = sum(question.right for question in questions)
    first = max(question.answer.time_to_first_token for question in questions)
    longest = max(question.answer.prompt_tokens for question in questions)
    return (
        f"{show_tokens(length)}: {right} of {len(questions)} right; prompts of up to {longest:,} "
        f"tokens, first token after {show_seconds(first)} at most"
    )


def print_report(report: Report, console: Console) -> None:
    """Percent of right answers by depth and length, and the first wrong answers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("depth", justify="right")
    for length in report.sweep.lengths:
        table.add_column(show_tokens(length), justify="right")
    for depth in report.sweep.depths:
        parts = [report.accuracy(length, depth) for length in report.sweep.lengths]
        table.add_row(f"{depth:g} %", *map(_percent, parts))
    table.add_section()
    table.add_row("all", *(_percent(report.accuracy(length)) for length in report.sweep.lengths))
    console.print(table)
    wrong = [question for question in report.questions if not question.right]
    for question in wrong[:3]:
        console.print(
            f"wrong at {show_tokens(question.length)}, {question.depth:g} %: {question.name} has "
            f"{question.code}, answered {question.answer.text!r}",
            highlight=False,
            markup=False,
        )
    if wrong[3:]:
        console.print(f"... and {len(wrong) - 3} more; --json has all", highlight=False)


def _percent(part: float) -> Text:
    style = "green" if part == 1 else "yellow" if part >= 0.9 else "red"
    return Text(f"{100 * part:.0f}", style=style)
