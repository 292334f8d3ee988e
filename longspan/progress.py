"""What a person sees while long work runs."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from longspan.engine.engine import Engine

PATIENCE_SECONDS = 0.5
"""Work that is done sooner shows no bar."""


class Progress:
    """A bar of tokens done of tokens to do, and each rank's KV pages, on standard error."""

    def __init__(self, engine: Engine, *, enabled: bool = True) -> None:
        self._engine = engine
        self._enabled = enabled
        self._begun = time.monotonic()
        self._bar: Bar | None = None
        scheduler = engine.scheduler
        self._requests = [*scheduler.running, *scheduler.waiting]

    def __enter__(self) -> Self:
        return self

    def update(self) -> None:
        """Look at the engine after a step."""
        if self._bar is None:
            if not self._enabled or time.monotonic() - self._begun < PATIENCE_SECONDS:
                return
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[kv]}"),
                console=Console(stderr=True),
            )
            self._bar.add_task("", kv="")
            self._bar.start()
        prefilled = sum(
            len(r.prompt_token_ids)
            if r.finish_reason
            else min(r.num_computed, len(r.prompt_token_ids))
            for r in self._requests
        )
        total = sum(len(r.prompt_token_ids) for r in self._requests)
        generated = sum(len(r.output_token_ids) for r in self._requests)
        self._bar.update(
            self._bar.task_ids[0],
            completed=prefilled,
            total=total,
            description=f"prompt {prefilled:,}/{total:,} tokens, {generated:,} generated",
            kv="KV pages "
            + " ".join(
                f"rank{rank} {usage.used}/{usage.total}"
                for rank, usage in enumerate(self._engine.kv_usage)
            ),
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
