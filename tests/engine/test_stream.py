"""What a stream gives to those who read fast, slowly, or wait in vain."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from longspan.engine.stream import Stream
from longspan.errors import EngineStoppedError
from longspan.outputs import RequestOutput


def output(name: str, *, finished: bool = False) -> RequestOutput:
    return RequestOutput(name, None, [], [], finished)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def stream(num_prompts: int = 1) -> Stream:
    return Stream("stream", [[1]] * num_prompts, lambda _: None)


def test_who_falls_behind_gets_all_at_once() -> None:
    async def work() -> None:
        both = stream(2)
        news = [output("a"), output("b", finished=True), output("a", finished=True)]
        assert [both.put(one) for one in news] == [False, False, True]
        assert await both.read() == news
        assert both.over
        assert [_ async for _ in both] == []

    run(work())


def test_silence_is_told_after_some_time_and_what_comes_then_is_not_lost() -> None:
    async def work() -> None:
        one = stream()
        assert await one.read(0.01) == []
        assert not one.over
        last = output("a", finished=True)
        asyncio.get_running_loop().call_later(0.01, one.put, last)
        assert [_ async for _ in one] == [[last]]

    run(work())


def test_what_came_before_an_error_is_read_first() -> None:
    async def work() -> None:
        one = stream()
        one.put(output("a"))
        assert one.put(EngineStoppedError("no more"))
        assert await one.read() == [output("a")]
        with pytest.raises(EngineStoppedError, match="no more"):
            await one.read()
        assert one.over

    run(work())
