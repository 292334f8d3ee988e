"""What a server's request waits for: outputs of its prompts, in the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

from longspan.engine.completion import Group
from longspan.errors import LongspanError
from longspan.outputs import RequestOutput


class Stream:
    """What is drawn for prompts that were submitted together, to be read once.

    Each output is an increment (see `Group.increment`) of one of them, and has its
    `prompt_index`. The stream is over when all have ended. Iteration gives lists of what has come
    meanwhile, so that a reader who falls behind does more at a time.

    Raises, while it is read:
        RankFailedError, EngineStoppedError: the engine has stopped, and with it this request.
    """

    def __init__(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        abort: Callable[["Stream"], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = sum(map(len, prompts))
        self.groups: list[Group] = []
        """One for each prompt, once the engine has them. Only the engine's thread changes them."""
        self._abort = abort
        self._news: deque[RequestOutput | LongspanError] = deque()
        self._come = asyncio.Event()
        self._to_come = self._to_read = len(prompts)

    def abort(self) -> None:
        """End what still runs; outputs with finish reason "abort" follow. Safe to call twice."""
        self._abort(self)

    def put(self, news: RequestOutput | LongspanError) -> bool:
        """Give the one who reads what is new; whether that was the last there is."""
        self._news.append(news)
        self._come.set()
        self._to_come -= self._to_come if isinstance(news, LongspanError) else news.finished
        return not self._to_come

    @property
    def over(self) -> bool:
        """Whether there is nothing to read any more."""
        return not self._to_read

    async def read(self, patience: float | None = None) -> list[RequestOutput]:
        """All that has come; waits for it, and is empty if nothing comes in `patience` seconds."""
        if not self._news:
            self._come.clear()
            loop = asyncio.get_running_loop()
            timer = None if patience is None else loop.call_later(patience, self._come.set)
            try:
                await self._come.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        return self._take()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[RequestOutput]:
        if self.over:
            raise StopAsyncIteration
        return await self.read()

    def _take(self) -> list[RequestOutput]:
        taken: list[RequestOutput] = []
        while self._news:
            news = self._news[0]
            if isinstance(news, LongspanError):
                if taken:
                    break  # what came before it is read first
                self._to_read = 0
                raise news
            self._news.popleft()
            self._to_read -= news.finished
            taken.append(news)
        return taken
