"""The asynchronous front over simulated ranks: the same tokens, whoever comes and goes."""

import asyncio
import random
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
from simulated import Plans, simulated_engine

from longspan.engine.async_engine import AsyncEngine
from longspan.engine.engine import Engine
from longspan.engine.stream import Stream
from longspan.errors import (
    EngineStoppedError,
    InvalidRequestError,
    OverloadedError,
    RankFailedError,
)
from longspan.outputs import RequestOutput
from longspan.sampling_params import SamplingParams

FOREVER = SamplingParams(max_tokens=100_000, ignore_eos=True)


def params(tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1, **options)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def front_of(engine: Engine, max_waiting: int = 1000) -> AsyncEngine:
    front = AsyncEngine(engine, max_waiting)
    front.start()
    return front


async def wholes(stream: Stream) -> dict[int, RequestOutput]:
    """The outputs of a stream's prompts, put together from its increments."""
    made: dict[int, RequestOutput] = {}
    async for outputs in stream:
        for output in outputs:
            if output.prompt_index in made:
                made[output.prompt_index].add(output)
            else:
                made[output.prompt_index] = output
    return made


def tokens(outputs: dict[int, RequestOutput]) -> list[list[int]]:
    return [one.token_ids for index in sorted(outputs) for one in outputs[index].outputs]


def plainly(prompts: list[list[int]], asked: SamplingParams) -> list[list[int]]:
    """What the engine gives when it is stepped by hand."""
    engine, _ = simulated_engine([100, 100])
    groups = [engine.add_request(prompt, asked) for prompt in prompts]
    while engine.has_requests:
        engine.step()
    return [one.token_ids for group in groups for one in group.output().outputs]


def assert_all_free(engine: Engine) -> None:
    assert not engine.has_requests
    assert [usage.used for usage in engine.kv_usage] == [0] * engine.ledger.num_ranks


def test_streams_are_what_the_engine_gives() -> None:
    prompts = [[3, 4, 5], [6] * 50, [7]]

    async def work() -> None:
        engine, _ = simulated_engine([100, 100])
        front = front_of(engine)
        many = front.submit(prompts, params(20, n=2), request_id="many")
        one = front.submit([[9] * 9], params(7), request_id="one")
        both = await asyncio.gather(wholes(many), wholes(one))
        assert tokens(both[0]) == plainly(prompts, params(20, n=2))
        assert tokens(both[1]) == plainly([[9] * 9], params(7))
        assert all(output.finished for outputs in both for output in outputs.values())
        with pytest.raises(StopAsyncIteration):
            await anext(one)
        await front.close()
        assert_all_free(engine)

    run(work())


def test_crowds_that_come_and_go_leave_nothing_and_harm_nobody() -> None:
    """Ranks take their time, so that aborts fall between a step's start and its end."""
    chance = random.Random(5)

    async def guest(front: AsyncEngine, number: int) -> None:
        await asyncio.sleep(chance.random() / 5)
        prompts = [[number % 60 + 1] * chance.randrange(1, 60) for _ in range(2)]
        asked = params(chance.randrange(1, 30), n=chance.randrange(1, 3))
        stream = front.submit(prompts, asked, request_id=f"guest/{number}")
        if number % 2:
            outputs = await wholes(stream)
            assert tokens(outputs) == plainly(prompts, asked)
            return
        for _ in range(chance.randrange(5)):
            if await anext(stream, None) is None:
                return
        stream.abort()
        stream.abort()
        rest = await wholes(stream)
        for output in rest.values():
            assert {one.finish_reason for one in output.outputs} <= {"abort", "length"}

    async def work() -> None:
        engine, _ = simulated_engine(
            [40, 30, 50],
            order=lambda ranks: [rank for rank in ranks if chance.random() < 0.4],
            min_tokens_per_rank=10,
        )
        front = front_of(engine)
        await asyncio.gather(*(guest(front, number) for number in range(60)))
        while engine.has_requests:
            await asyncio.sleep(0.01)
        await front.close()
        assert_all_free(engine)
        assert not front._by_group
        assert not front._open

    run(work())


def test_too_many_are_refused_until_there_is_room() -> None:
    async def work() -> None:
        engine, _ = simulated_engine([100], max_num_seqs=1)
        front = front_of(engine, max_waiting=3)
        first = front.submit([[1]], FOREVER, request_id="first")
        await anext(first)
        front.submit([[1], [2]], FOREVER, request_id="second")
        with pytest.raises(InvalidRequestError, match="'second' is already running"):
            front.submit([[1]], FOREVER, request_id="second")
        with pytest.raises(OverloadedError, match="2 requests are waiting") as told:
            front.submit([[1]], SamplingParams(n=2, max_tokens=3), request_id="third")
        assert 1 <= told.value.retry_after <= 60
        with pytest.raises(InvalidRequestError, match="has 4 sequences"):
            front.submit([[1], [2]], SamplingParams(n=2), request_id="third")
        third = front.submit([[1]], params(3), request_id="third")
        with pytest.raises(OverloadedError):
            front.check_room(1)
        first.abort()
        front._open["second"].abort()
        assert tokens(await wholes(third)) == plainly([[1]], params(3))
        await front.close()

    run(work())


def test_a_prompt_that_cannot_be_served_ends_its_stream_alone() -> None:
    """It should have been checked before; if not, nothing of its request runs on."""

    async def work() -> None:
        engine, _ = simulated_engine([100])
        front = front_of(engine)
        other = front.submit([[5]], params(9), request_id="other")
        wrong = front.submit([[5], [64]], FOREVER, request_id="wrong")
        with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
            await wholes(wrong)
        assert tokens(await wholes(other)) == plainly([[5]], params(9))
        assert_all_free(engine)
        await front.close()

    run(work())


@pytest.mark.parametrize("kind", [RankFailedError, ValueError])
def test_a_failed_step_ends_all_requests(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        engine, executor = simulated_engine([50_000, 50_000])  # room for all of FOREVER
        front = front_of(engine)
        streams = [front.submit([[n]], FOREVER, request_id=str(n)) for n in range(3)]
        await anext(streams[0])
        assert front.stalled_seconds < 30

        def fail(plans: Plans) -> None:
            raise kind("rank 1 is broken\nits last words")

        executor.before_step = fail
        for stream in streams:
            with pytest.raises(RankFailedError, match="rank 1 is broken"):
                await wholes(stream)
        assert isinstance(front.error, RankFailedError)
        with pytest.raises(EngineStoppedError, match=r"has stopped: .*rank 1 is broken$"):
            front.submit([[1]], FOREVER, request_id="late")
        await front.close()
        assert "its last words" in caplog.text

    run(work())


def test_draining_lets_some_end_and_aborts_the_rest() -> None:
    async def work() -> None:
        engine, _ = simulated_engine([50_000])
        front = front_of(engine)
        short = front.submit([[1]], params(5), request_id="short")
        long = front.submit([[2]], FOREVER, request_id="long")
        drained = asyncio.create_task(front.drain(0.2))
        await asyncio.sleep(0)
        with pytest.raises(EngineStoppedError, match="is shutting down"):
            front.submit([[1]], FOREVER, request_id="late")
        ends = await asyncio.gather(wholes(short), wholes(long))
        await drained
        assert [one[0].outputs[0].finish_reason for one in ends] == ["length", "abort"]
        await front.close()
        assert_all_free(engine)

    run(work())


def test_closing_ends_the_thread_and_whoever_still_waits() -> None:
    async def work() -> None:
        engine, _ = simulated_engine([50_000])
        front = front_of(engine)
        stream = front.submit([[1]], FOREVER, request_id="1")
        await front.close()
        with pytest.raises(EngineStoppedError, match="has been shut down"):
            await wholes(stream)
        assert "longspan-engine" not in {thread.name for thread in threading.enumerate()}

    run(work())


def test_progress_goes_from_waiting_to_the_end() -> None:
    async def work() -> None:
        engine, executor = simulated_engine(
            [200, 200], max_num_batched_tokens=32, max_num_seqs=1, min_tokens_per_rank=100
        )
        front = front_of(engine)
        assert front.progress("long") is None
        blocker = front.submit([[1]], FOREVER, request_id="blocker")
        await anext(blocker)
        long = front.submit([[2] * 600], params(40), request_id="long")
        seen = [front.progress("long")]
        executor.before_step = lambda plans: seen.append(front.progress("long"))
        blocker.abort()
        outputs = await wholes(long)
        await front.close()
        told = [progress for progress in seen if progress is not None]
        states = [progress.state for progress in told]
        assert list(dict.fromkeys(states))[-3:] == ["waiting", "prefill", "decode"]
        done = [progress.prefilled_tokens for progress in told]
        assert done == sorted(done)
        middle = told[states.index("prefill") + 3]
        assert middle.prompt_tokens == 600
        assert middle.ranks == (0, 1)
        assert sum(middle.kv_tokens) > middle.prefilled_tokens, "with those of the step under way"
        assert middle.seconds_left is not None
        assert middle.seconds_left > 0
        assert told[-1].output_tokens < 40 == len(outputs[0].outputs[0].token_ids)

    run(work())


def test_a_request_that_the_engine_has_not_taken_in_yet_waits_with_all_its_tokens() -> None:
    async def work() -> None:
        engine, _ = simulated_engine([100, 100])
        front = AsyncEngine(engine, 10)
        front.submit([[3] * 40, [4] * 2], params(1), request_id="early")
        progress = front.progress("early")
        assert progress is not None
        assert (progress.state, progress.prompt_tokens, progress.ranks) == ("waiting", 42, ())
        front.start()
        await front.close()

    run(work())
