"""Server-sent events, and what happens when nobody listens any more."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still at work\n\n"
"""A comment: clients pass over it, and proxies see that the connection is in use."""

_encoder = msgspec.json.Encoder()


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + _encoder.encode(data) + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events as they come; `finish` is called at their end, or when the client has gone.

    `finish` is also called where not even the first event has been asked for.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        finish: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Proxies of nginx's kind hold answers back unless they are told not to.
        kept = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers={**kept, **(headers or {})})
        self._events = events
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._finish()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of some work; None if the client goes away before, which cancels the work."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
                with suppress(asyncio.CancelledError):
                    await future


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
