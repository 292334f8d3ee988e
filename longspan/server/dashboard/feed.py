"""What the dashboard is told."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from longspan.engine.async_engine import AsyncEngine, first_line
from longspan.engine.snapshot import Snapshot
from longspan.server.dashboard.recent import Recent
from longspan.server.events import event

TICK_SECONDS = 0.5


class Feed:
    """What one watcher is told: at first also of the requests that have ended before."""

    def __init__(self, engine: AsyncEngine, recent: Recent, model: str) -> None:
        self._engine = engine
        self._recent = recent
        self._model = model
        self._told = 0
        """How many of the requests that have ended."""

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A picture of the engine at each tick, until the server has nothing to do any more."""
        engine = self._engine
        while not engine.draining or engine.num_running or engine.num_waiting:
            yield event(self._picture())
            await asyncio.sleep(TICK_SECONDS)

    def _picture(self) -> dict[str, Any]:
        engine, first = self._engine, self._told
        self._told = self._recent.count
        return {
            "engine": Snapshot.of(engine.engine),
            "model": self._model,
            "waiting": engine.num_waiting,
            "error": None if engine.error is None else first_line(engine.error),
            "ended": [*self._recent.since(first)][::-1],
        }
