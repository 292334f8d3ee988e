"""What a server's request waits for: outputs of its prompts, in the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from longspan.engine.completion import Group
from longspan.errors import LongspanError
from longspan.outputs import RequestOutput


class Stream:
    """What is drawn for prompts that were submitted together; iterate over it once.

    Each output is an increment (see `Group.increment`) of one of them, and has its
    `prompt_index`. The stream is over when all have ended.

    Raises, while it is iterated over:
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
        self._news: asyncio.Queue[RequestOutput | LongspanError] = asyncio.Queue()
        self._to_come = self._to_read = len(prompts)

    def abort(self) -> None:
        """End what still runs; outputs with finish reason "abort" follow. Safe to call twice."""
        self._abort(self)

    def put(self, news: RequestOutput | LongspanError) -> bool:
        """Give the one who reads what is new; whether that was the last there is."""
        self._news.put_nowait(news)
        self._to_come -= self._to_come if isinstance(news, LongspanError) else news.finished
        return not self._to_come

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._to_read:
            raise StopAsyncIteration
        news = await self._news.get()
        if isinstance(news, LongspanError):
            self._to_read = 0
            raise news
        self._to_read -= news.finished
        return news
