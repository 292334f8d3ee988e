"""What a person sees of long work on standard error: how far it is, and figures at its end."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Timer
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from longspan.engine.engine import Engine, KVUsage
from longspan.engine.request import Request
from longspan.outputs import RequestOutput

__all__ = ["Progress", "summary"]

PATIENCE_SECONDS = 0.5
"""Work that is done sooner shows nothing."""

LINE_SECONDS = 5.0
"""Where there is no terminal, lines are at least so far apart."""

MOST_CELLS = 8
"""So many ranks are shown each; more are summarised."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far some requests are, in tokens of all of them together, and the KV pools' pages.

    `output_limit` is what they may generate at most; they may stop earlier.
    """

    prompt_done: int
    prompt_total: int
    output_done: int
    output_limit: int
    kv: tuple[KVUsage, ...]

    @classmethod
    def of(cls, engine: Engine, requests: Iterable[Request]) -> Self:
        done, total, drawn, limit = 0, 0, 0, 0
        for request in requests:
            prompt, output = len(request.prompt_token_ids), len(request.output_token_ids)
            done += prompt if request.finish_reason else min(request.num_computed, prompt)
            total += prompt
            drawn += output
            limit += output if request.finish_reason else request.max_tokens
        return cls(done, total, drawn, limit, tuple(engine.kv_usage))

    @property
    def prompt(self) -> str:
        return f"{self.prompt_done:,} of {self.prompt_total:,} tokens"

    @property
    def output(self) -> str:
        at_most = "at most " if self.output_done < self.output_limit else ""
        return f"{self.output_done:,} of {at_most}{self.output_limit:,} tokens"

    @property
    def line(self) -> str:
        """All of it on one line, for logs."""
        return f"prompt {self.prompt}; output {self.output}; KV {', '.join(kv_cells(self.kv))}"


class Progress:
    """Shows how far the engine's present requests are, if that takes more than a moment.

    On a terminal or in a notebook: a bar of the prompts' tokens with the time left, a bar of the
    generated tokens, and the pages of each rank's KV pool. Elsewhere: a plain line now and then.
    """

    def __init__(self, engine: Engine, *, enabled: bool = True) -> None:
        self._engine = engine
        self._requests = [*engine.scheduler.running, *engine.scheduler.waiting]
        self._console = Console(stderr=True)
        self._display: _Display | None = None
        self._timer: Timer | None = None
        self._next_line: float | None = None
        if not enabled:
            return
        if _can_redraw(self._console):
            # A first step may take long, so that the display can't wait for its end.
            self._display = _Display(self._console, Snapshot.of(engine, self._requests))
            self._timer = Timer(PATIENCE_SECONDS, self._display.start)
            self._timer.daemon = True
        else:
            self._next_line = time.monotonic() + LINE_SECONDS

    def __enter__(self) -> Self:
        if self._timer:
            self._timer.start()
        return self

    def update(self) -> None:
        """Look at the engine after a step."""
        if self._display:
            self._display.show(Snapshot.of(self._engine, self._requests))
        elif self._next_line is not None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            line = Snapshot.of(self._engine, self._requests).line
            self._console.file.write(f"longspan: {line}\n")
            self._console.file.flush()

    def hide(self) -> None:
        """Take the bars off the terminal for good, where others will write. Lines go on."""
        if self._display:
            self._display.live.transient = True
            self._end_display()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_display()

    def _end_display(self) -> None:
        if self._timer and self._display:
            self._timer.cancel()
            self._timer.join()
            self._display.stop()
            self._display = None


def summary(output: RequestOutput) -> Table:
    """The figures of a finished request: times, speeds, and where its tokens' KV was."""
    metrics, prompt = output.metrics, len(output.prompt_token_ids)
    assert metrics is not None
    generated = sum(len(completion.token_ids) for completion in output.outputs)
    reasons = ", ".join(str(completion.finish_reason) for completion in output.outputs)
    kv = (f"rank{rank} {tokens:,}" for rank, tokens in enumerate(metrics.kv_tokens))
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("prompt", f"{prompt:,} tokens"),
        ("output", f"{generated:,} tokens, finish reason: {reasons}"),
        ("time to first token", _time(metrics.time_to_first_token, prompt)),
        ("time per output token", _time(metrics.time_per_output_token, 1)),
        ("KV tokens", ", ".join(kv)),
    ):
        table.add_row(Text(name, style="dim"), Text(value))
    return table


class _Display(Bars):
    """The bars and the ranks' cells. A thread of rich's redraws them, so that clocks go on."""

    def __init__(self, console: Console, snapshot: Snapshot) -> None:
        self._screen, self._snapshot = console, snapshot  # the base draws once while it is made
        columns = (
            TextColumn("{task.description:<6}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[amount]}"),
            _Clock(),
        )
        # What goes to a pipe on standard output must stay there.
        to_terminal = sys.stdout.isatty()
        super().__init__(*columns, console=console, expand=True, redirect_stdout=to_terminal)
        self._prompt = self.add_task("prompt", total=None, amount="")
        self._output = self.add_task("output", total=None, amount="", start=False, visible=False)
        self.show(snapshot)

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.output_done == snapshot.output_limit:  # all pages have just been given back
            snapshot = replace(snapshot, kv=self._snapshot.kv)
        self._snapshot = snapshot
        self.update(
            self._prompt,
            completed=snapshot.prompt_done,
            total=snapshot.prompt_total,
            amount=snapshot.prompt,
        )
        if snapshot.output_done:
            self.start_task(self._output)
            self.update(
                self._output,
                completed=snapshot.output_done,
                total=snapshot.output_limit,
                amount=snapshot.output,
                visible=True,
            )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self._ranks()

    def _ranks(self) -> Text:
        # Lines are not padded to the terminal's width, where the "^C" of Ctrl-C would wrap.
        label, cells = "KV     ", kv_cells(self._snapshot.kv)
        columns = max((self._screen.width - len(label)) // (max(map(len, cells)) + 1), 1)
        rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        lines = f"\n{' ' * len(label)}".join(" ".join(row) for row in rows)
        return Text.assemble(label, (lines, "cyan"))


class _Clock(ProgressColumn):
    """Time so far, and time left at the speed of the last half minute."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        clock = Text(_clock(elapsed or 0.0), style="progress.elapsed")
        if not task.finished and task.time_remaining is not None:
            clock.append(f", {_clock(task.time_remaining)} left", style="progress.remaining")
        return clock


def kv_cells(kv: Sequence[KVUsage]) -> list[str]:
    """A few words for each rank's pool, as `rank0 [512/800 pages]`; a summary of many ranks."""
    cells = [f"rank{rank} {_pages(usage)}" for rank, usage in enumerate(kv)]
    if len(cells) <= MOST_CELLS:
        return cells
    by_use = sorted(range(len(kv)), key=lambda rank: kv[rank].used / max(kv[rank].total, 1))
    together = KVUsage(sum(usage.used for usage in kv), sum(usage.total for usage in kv))
    return [
        f"{len(kv)} ranks {_pages(together)}",
        f"fullest {cells[by_use[-1]]}",
        f"emptiest {cells[by_use[0]]}",
    ]


def _can_redraw(console: Console) -> bool:
    # Not console.is_terminal alone: FORCE_COLOR sets it for files and pipes too.
    return console.is_jupyter or (console.is_interactive and console.file.isatty())


def _pages(usage: KVUsage) -> str:
    return f"[{usage.used:,}/{usage.total:,} pages]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )


def _time(seconds: float | None, tokens: int) -> str:
    if seconds is None:
        return "-"
    shown = f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:,.1f} ms"
    return f"{shown} ({tokens / seconds:,.1f} tokens/s)" if seconds else shown
