"""The engine as a server uses it: steps in a thread of their own, outputs in an event loop."""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.engine.request_progress import RequestProgress
from longspan.engine.stream import Stream
from longspan.errors import (
    EngineStoppedError,
    InvalidRequestError,
    LongspanError,
    OverloadedError,
    RankFailedError,
)
from longspan.outputs import RequestOutput
from longspan.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.25
"""An engine without requests looks so often for ranks that have died."""

POLL_SECONDS = 0.005
"""How long a request may wait for those who are at work, though its own ranks are idle."""

ABORT_SECONDS = 10.0
"""How long a step may take after which aborted requests end; then they are let go."""

_RECENT_SECONDS, _MOST_ENDS = 30.0, 1000
"""The pace of a server is that of so many last requests, as far as they are of late."""


class AsyncEngine:
    """Serves one event loop from an engine whose steps run in a thread of their own.

    All public methods are the event loop's. What they ask for reaches the engine through a queue
    that its thread reads between two steps. Counters of the engine are read from the loop as they
    are: they are whole numbers that one thread writes.

    At most `max_waiting_requests` sequences wait for their ranks; more are refused.
    """

    def __init__(self, engine: Engine, max_waiting_requests: int) -> None:
        self.engine = engine
        self.max_waiting_requests = max_waiting_requests
        self.error: LongspanError | None = None
        """Why the engine has stopped, if it has."""
        self.draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="longspan-engine", daemon=True)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._open: dict[str, Stream] = {}
        self._by_group: dict[str, tuple[Stream, int]] = {}
        """The engine thread's: to whom a group's outputs go, and as which prompt's."""
        self._num_coming = 0
        """Sequences that have been submitted, and that the engine has not taken in yet."""
        self._ends: deque[float] = deque(maxlen=_MOST_ENDS)
        """When the last streams have ended."""
        self._moved = time.monotonic()

    def start(self) -> None:
        """Begin to step; called in the event loop that will be served."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
    ) -> Stream:
        """Queue prompts of token ids, all or none of them.

        They should have passed `Engine.check`, which may be called in any thread.

        Raises:
            OverloadedError: too many requests wait; tells when to come again.
            InvalidRequestError: more prompts than may ever wait, or a `request_id` that is in use.
            EngineStoppedError: the engine has stopped, or is about to.
        """
        count = len(prompts) * params.n
        self.check_room(count)
        if request_id in self._open:
            raise InvalidRequestError(f"request_id={request_id!r} is already running")
        stream = Stream(request_id, len(prompts), self._ask_to_abort)
        self._open[request_id] = stream
        self._num_coming += count
        self._inbox.put(partial(self._add, stream, prompts, params, priority))
        return stream

    def check_room(self, count: int) -> None:
        """Whether so many sequences may be submitted; raises what `submit` would."""
        if self.error is not None:
            raise EngineStoppedError(f"the engine has stopped: {first_line(self.error)}")
        if self.draining or self._closing:
            raise EngineStoppedError("the server is shutting down and takes no more requests")
        limit, waiting = self.max_waiting_requests, self.num_waiting
        if count > limit:
            raise InvalidRequestError(
                f"the request has {count} sequences (prompts x n), more than may wait "
                f"(max_waiting_requests={limit}); send it in parts"
            )
        if waiting + count > limit:
            raise OverloadedError(
                f"{waiting} requests are waiting (max_waiting_requests={limit}); come again later",
                self._seconds_until_room(),
            )

    def progress(self, request_id: str) -> RequestProgress | None:
        """How far the prompts of a request are; None if it is not running."""
        stream = self._open.get(request_id)
        if stream is None:
            return None
        cost, now = self.engine.scheduler.cost, self.engine.clock()
        return RequestProgress.of(stream.groups, cost, now)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their ranks."""
        return len(self.engine.scheduler.waiting) + self._num_coming

    @property
    def num_running(self) -> int:
        """Sequences that have pages and take part in steps."""
        return len(self.engine.scheduler.running)

    @property
    def stalled_seconds(self) -> float:
        """For how long no rank has finished a step though there is work; 0 without work."""
        return time.monotonic() - self._moved if self.engine.has_requests else 0.0

    async def drain(self, timeout: float) -> None:
        """Accept no more; let running requests end for `timeout` seconds, then abort the rest."""
        self.draining = True
        await self._until_all_ended(timeout)
        for stream in self._open.values():
            stream.abort()
        await self._until_all_ended(ABORT_SECONDS)

    def stop(self) -> None:
        """End the thread and all ranks, when their present step is done. Safe to call twice.

        A step that hangs is not waited for longer than `ABORT_SECONDS`.
        """
        self._closing = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(ABORT_SECONDS)
        self.engine.executor.close()

    async def close(self) -> None:
        """Do so without blocking the event loop, and end all requests that are left."""
        await asyncio.to_thread(self.stop)
        self._end_all(EngineStoppedError("the server has been shut down"))

    # What follows runs in the event loop.

    def _seconds_until_room(self) -> int:
        """When half of those who wait will have been served, at the pace of the last ones."""
        now = time.monotonic()
        while self._ends and self._ends[0] < now - _RECENT_SECONDS:
            self._ends.popleft()
        if not self._ends:
            return 5
        pace = len(self._ends) / max(now - self._ends[0], 1.0)
        return min(max(round(self.num_waiting / 2 / pace), 1), 60)

    def _ask_to_abort(self, stream: Stream) -> None:
        if self._open.get(stream.request_id) is stream:
            self._inbox.put(partial(self._abort, stream))

    def _deliver(self, news: Iterable[tuple[Stream, RequestOutput | LongspanError]]) -> None:
        for stream, one in news:
            if stream.put(one) and self._open.get(stream.request_id) is stream:
                del self._open[stream.request_id]
                self._ends.append(time.monotonic())

    def _end_all(self, error: LongspanError) -> None:
        self._deliver([(stream, error) for stream in [*self._open.values()]])

    async def _until_all_ended(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        engine = self.engine
        try:
            while not self._closing:
                self._take_in()
                before = engine.num_done
                drawn = engine.step(POLL_SECONDS)
                if engine.num_done != before:
                    self._moved = time.monotonic()
                self._hand_out(drawn)
        except Exception as error:
            self.error = _told(error)
            self._in_loop(self._end_all, self.error)
            if isinstance(error, LongspanError):
                logger.error("the engine has stopped: %s", error)  # with a rank's last words
            else:
                logger.exception("the engine has stopped")
        finally:
            engine.executor.close()

    def _take_in(self) -> None:
        """Do what the event loop has asked for; wait for it a little if there is nothing to do."""
        idle = not self.engine.has_requests
        try:
            asked = self._inbox.get(timeout=IDLE_SECONDS if idle else 0.0)
            if idle:
                self._moved = time.monotonic()
            while True:
                asked()
                asked = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _add(
        self,
        stream: Stream,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        priority: int,
    ) -> None:
        try:
            for index, prompt in enumerate(prompts):
                name = f"{stream.request_id}:{index}"
                group = self.engine.add_request(prompt, params, request_id=name, priority=priority)
                self._by_group[name] = stream, index
                stream.groups.append(group)
        except LongspanError as error:
            for group in stream.groups:
                self.engine.abort(group.request_id)
                del self._by_group[group.request_id]
            self._in_loop(self._deliver, [(stream, error)])
        self._in_loop(self._taken_in, len(prompts) * params.n)

    def _taken_in(self, count: int) -> None:
        self._num_coming -= count

    def _abort(self, stream: Stream) -> None:
        aborted = (self.engine.abort(group.request_id) for group in stream.groups)
        self._hand_out([group for group in aborted if group is not None])

    def _hand_out(self, groups: Sequence[Group]) -> None:
        """Give the event loop what is new of these groups, all at once."""
        news: list[tuple[Stream, RequestOutput]] = []
        for group in groups:
            stream, index = self._by_group[group.request_id]
            output = group.increment()
            if output is not None:
                output.prompt_index = index
                news.append((stream, output))
            if group.finished:
                del self._by_group[group.request_id]
        if news:
            self._in_loop(self._deliver, news)

    def _in_loop(self, call: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)


def first_line(error: Exception) -> str:
    """What an error says without a rank's last words, which are for the log."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _told(error: Exception) -> LongspanError:
    """What requests are told when the engine stops."""
    if isinstance(error, LongspanError):
        return error
    return RankFailedError(f"the engine failed: {type(error).__name__}: {first_line(error)}")
