"""Traces go in and figures come out; times are sums of what the cost model predicts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from longspan.config import EngineConfig
from longspan.cost.model import CostModel
from longspan.cost.rates import CPU_THREAD, CUDA
from longspan.cost.simulate import SimulationResult, percentile, simulate
from longspan.cost.trace import Arrival, Trace
from longspan.cost.virtual import VirtualExecutor
from longspan.errors import ConfigError, InvalidRequestError
from longspan.models import ModelSpec
from longspan.outputs import CompletionOutput, RequestMetrics, RequestOutput
from longspan.plan import (
    Extent,
    Move,
    Part,
    RankPlan,
    RankResult,
    Run,
    Sampled,
    Sampling,
    Segment,
    Shard,
)

SPEC = ModelSpec(
    name="simulated",
    architecture="Simulated",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=1000,
    max_model_len=2_000_000,
    eos_token_ids=(0,),
    dtype="bfloat16",
    kv_cache_dtype="bfloat16",
    num_active_parameters=7_000_000_000,
)
COST = CostModel.of(SPEC, CUDA)


def run(
    *arrivals: Arrival, num_pages: Sequence[int] = (1000,), page_size: int = 16, **options: object
) -> SimulationResult:
    config = EngineConfig(
        model="simulated",
        context_parallel_size=len(num_pages),
        page_size=page_size,
        **options,
    )
    return simulate(Trace(arrivals), config, SPEC, num_pages)


def arrival(
    time: float = 0.0, prompt: int = 100, output_tokens: int = 5, **more: object
) -> Arrival:
    return Arrival(time=time, prompt=prompt, output_tokens=output_tokens, **more)


def local(request_id: str, rank: int, cached: int, new: int) -> Segment:
    runs = (Run(cached, new),)
    return Segment(request_id, "local", (Shard(rank, runs, cached, runs),))


def plan(segment: Segment, rank: int = 0, moves: tuple[Move, ...] = ()) -> RankPlan:
    sampling = Sampling(segment.request_id, row=0, seed=0, position=1)
    return RankPlan((7,), (Part(segment, (Extent(0, 1),)),), (sampling,), moves)


def seconds(cached: int, new: int) -> float:
    return COST.step_seconds([local("r", 0, cached, new)])[0]


# Traces


def test_a_trace_is_saved_and_loaded(tmp_path: Path) -> None:
    arrivals = [
        Arrival(time=1.5, prompt=30, output_tokens=3, prefix="a", prefix_tokens=20, n=2),
        Arrival(time=0.25, prompt=(1, 2, 3), output_tokens=1, max_tokens=9, priority=-1),
    ]
    Trace(arrivals).save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl").arrivals == arrivals[::-1], "in order of time"
    first = (tmp_path / "trace.jsonl").read_text().splitlines()[0]
    assert first == '{"time":0.25,"prompt":[1,2,3],"output_tokens":1,"max_tokens":9,"priority":-1}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"time": 1, "prompt": 5}', "missing required field `output_tokens`"),
        ('{"time": -1, "prompt": 5, "output_tokens": 1}', "`float` >= 0.0 - at `$.time`"),
        ('{"time": 1, "prompt": 0, "output_tokens": 1}', "`int` >= 1 - at `$.prompt`"),
        ('{"time": 1, "prompt": [-1], "output_tokens": 1}', "`int` >= 0 - at `$.prompt[0]`"),
        ('{"time": 1, "prompt": "x", "output_tokens": 1}', "got `str` - at `$.prompt`"),
        ('{"time": 1, "prompt": 5, "output_tokens": 2, "max_tokens": 1}', "max_tokens=1 is less"),
        ('{"time": 1, "prompt": 5, "output_tokens": 2, "tokens": 1}', "unknown field `tokens`"),
        ('{"time": 1, "prompt": 5, "output_tokens": 2, "prefix_tokens": 3}', "needs a prefix"),
        (
            '{"time": 1, "prompt": 5, "output_tokens": 2, "prefix": "a", "prefix_tokens": 6}',
            "prefix_tokens=6 is more than the prompt's 5 tokens",
        ),
        ('{"time": 1, "prompt": [5], "output_tokens": 2, "prefix": "a"}', "a number of tokens"),
        ("not JSON", "JSON is malformed"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time": 1, "prompt": 5, "output_tokens": 2}\n\n' + line + "\n")
    with pytest.raises(InvalidRequestError) as raised:
        Trace.load(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 3: ")
    assert complaint in message
    assert "\n" not in message


def test_prompts_are_alike_in_their_prefix_and_nowhere_else() -> None:
    shared = [arrival(prompt=50, prefix=name, prefix_tokens=20) for name in "aab"]
    trace = Trace([*shared, arrival(prompt=50), Arrival(time=0, prompt=(3, 1), output_tokens=1)])
    first, second, other, own, given = (trace.prompt(index, 30) for index in range(5))
    assert [len(one) for one in (first, second, other, own)] == [50] * 4
    assert first[:20] == second[:20]
    assert len({tuple(one[:2]) for one in (first, other, own)}) == 3
    assert first[20:22] != second[20:22]
    assert given == [3, 1]
    assert trace.prompt(0, 30) == first
    assert all(0 <= token < 30 for token in first + second + other + own)


def test_what_has_been_served_makes_a_trace() -> None:
    def served(time: float, prompt: list[int], *lengths: int) -> RequestOutput:
        completions = [CompletionOutput(i, "", [7] * n) for i, n in enumerate(lengths)]
        metrics = RequestMetrics(arrival_time=time)
        return RequestOutput("x", None, prompt, completions, True, metrics=metrics)

    refused = RequestOutput("x", None, [], [CompletionOutput(0, "", [])], True, error="no")
    outputs = [served(12.5, [1, 2], 4), refused, served(10.0, [5], 3, 6)]
    assert Trace.of(outputs).arrivals == [
        Arrival(time=0.0, prompt=(5,), output_tokens=6, n=2),
        Arrival(time=2.5, prompt=(1, 2), output_tokens=4),
    ]
    assert [one.prompt for one in Trace.of(outputs, token_ids=False).arrivals] == [1, 2]


# Times


def test_steps_of_different_ranks_overlap() -> None:
    executor = VirtualExecutor((10, 10, 10), 16, COST)
    executor.start({0: plan(local("a", 0, 0, 1000))})
    executor.start({2: plan(local("b", 2, 0, 100), 2), 1: plan(local("c", 1, 0, 100), 1)})
    short, long = seconds(0, 100), seconds(0, 1000)
    assert executor.wait(short / 2) == {}
    assert executor.clock() == short / 2
    results = executor.wait(1.0)
    assert list(results) == [1, 2], "at the same time, in the order of ranks"
    assert results[2].sampled == (Sampled("b", 0),)
    assert executor.clock() == pytest.approx(short)
    executor.start({1: plan(local("c", 1, 100, 1), 1)})
    assert list(executor.wait()) == [1]
    assert list(executor.wait()) == [0]
    assert executor.clock() == pytest.approx(long)
    assert executor.wait() == executor.wait(1.0) == {}
    assert executor.busy_seconds == pytest.approx([long, short + seconds(100, 1), short])


def test_a_step_takes_as_long_as_its_slowest_rank_or_its_moves() -> None:
    pages = (Extent(0, 100_000),)
    moves = (Move(1, 0, pages, pages),)
    slow = {0: plan(local("a", 0, 0, 500)), 1: plan(local("b", 1, 0, 100), 1)}
    executor = VirtualExecutor((10, 10), 16, COST)
    executor.start(slow)
    assert list(executor.wait()) == [0, 1]
    assert executor.clock() == pytest.approx(seconds(0, 500))
    executor = VirtualExecutor((10, 10), 16, COST)
    executor.start({rank: msgspec.structs.replace(one, moves=moves) for rank, one in slow.items()})
    executor.wait()
    assert executor.clock() == COST.move_seconds(1_600_000) > seconds(0, 500)


def test_a_caller_may_say_when_ranks_are_done_and_what_they_draw() -> None:
    ends = {0: 5.0, 1: 3.0}
    seen = []
    executor = VirtualExecutor(
        (10, 10),
        16,
        COST,
        token_of=lambda sampling: sampling.position + 1,
        done_at=lambda time, plans: {rank: time + ends[rank] for rank in plans},
        on_start=lambda plans: seen.append(sorted(plans)),
    )
    executor.start({0: plan(local("a", 0, 0, 1)), 1: plan(local("b", 1, 0, 1), 1)})
    assert executor.wait() == {1: RankResult((Sampled("b", 2),), {})}
    assert executor.time == 3.0
    assert executor.at_work
    executor.close()
    assert executor.wait() == {}
    assert seen == [[0, 1]]


def test_one_request_takes_the_sum_of_its_steps() -> None:
    result = run(arrival(time=2.0, prompt=100, output_tokens=5))
    [one] = result.requests
    decode = [seconds(cached, 1) for cached in range(100, 104)]
    assert one.ttft == pytest.approx(seconds(0, 100))
    assert one.tpot == pytest.approx(sum(decode) / 4)
    assert one.finish == result.seconds == pytest.approx(2.0 + seconds(0, 100) + sum(decode))
    assert (one.output_tokens, one.degree, one.cached_tokens, one.preemptions) == (5, 1, 0, 0)
    assert result.num_steps == 5
    assert result.tokens_per_second == pytest.approx(105 / result.seconds)
    [rank] = result.ranks
    assert rank.busy_seconds == pytest.approx(result.seconds - 2.0)
    assert rank.use == pytest.approx(rank.busy_seconds / result.seconds)
    assert (rank.peak_pages, rank.num_pages) == (7, 1000)


def test_a_request_that_comes_during_a_step_begins_at_once_on_an_idle_rank() -> None:
    alone = run(arrival(prompt=1500))
    both = run(arrival(prompt=1500), arrival(time=0.001, prompt=100), num_pages=(1000, 1000))
    first, second = both.requests
    assert first.degree == 1
    assert first.ttft == alone.requests[0].ttft
    assert second.ttft == pytest.approx(seconds(0, 100))
    queued = run(arrival(prompt=1500), arrival(time=0.001, prompt=100)).requests[1]
    assert queued.ttft == pytest.approx(alone.requests[0].ttft - 0.001 + queued_step(1500, 100))


def queued_step(decoding: int, new: int) -> float:
    """A step of a decode token and a new prompt."""
    return COST.step_seconds([local("a", 0, decoding, 1), local("b", 0, 0, new)])[0]


def test_priority_goes_first() -> None:
    busy = arrival(prompt=2000, output_tokens=1)
    later = [arrival(time=0.001, prompt=1900, priority=p, output_tokens=1) for p in (5, -5)]
    _, last, first = run(busy, *later, num_pages=(140,)).requests
    assert first.ttft < last.ttft


def test_an_output_may_end_before_its_limit() -> None:
    early = run(arrival(output_tokens=5, max_tokens=900)).requests[0]
    assert early == run(arrival(output_tokens=5)).requests[0]


def test_a_shared_prefix_is_computed_once() -> None:
    shared = {"prefix": "a", "prefix_tokens": 1600}
    first, second = run(
        arrival(prompt=2000, **shared), arrival(time=10, prompt=2000, **shared)
    ).requests
    assert (first.cached_tokens, second.cached_tokens) == (0, 1600)
    assert second.ttft == pytest.approx(seconds(1600, 400))


def test_sequences_of_one_prompt_share_its_pages() -> None:
    result = run(arrival(prompt=161, output_tokens=5, n=3))
    assert result.requests[0].output_tokens == 15
    assert result.ranks[0].peak_pages == 10 + 3


def test_long_prompts_are_spread_and_full_pools_preempt() -> None:
    [long] = run(arrival(prompt=100_000), num_pages=(3000, 3000, 3000)).requests
    assert long.degree == 3
    crowd = [arrival(prompt=32, output_tokens=200, max_tokens=900) for _ in range(6)]
    result = run(*crowd, num_pages=(20, 20))
    assert sum(one.preemptions for one in result.requests) > 0
    assert all(one.output_tokens == 200 for one in result.requests)
    assert max(one.degree for one in result.requests) == 2, "contexts grow from rank to rank"
    assert all(0 < rank.peak_pages <= 20 for rank in result.ranks)


def test_what_can_not_be_served_is_told_and_the_rest_goes_on() -> None:
    result = run(
        arrival(prompt=161),
        arrival(prompt=100),
        Arrival(time=1, prompt=(5, 1000), output_tokens=1),
        num_pages=(10,),
    )
    too_long, served, unknown = result.requests
    assert "the KV pools" in too_long.error
    assert too_long.ttft is None
    assert "prompt_token_ids[1]=1000" in unknown.error
    assert (served.error, served.output_tokens) == (None, 5)
    assert result.prompt_tokens == 100


def test_an_empty_trace_takes_no_time() -> None:
    result = run()
    assert (result.seconds, result.num_steps, result.requests) == (0.0, 0, [])
    assert result.ranks[0].use == 0.0


def test_the_same_trace_gives_the_same_figures_and_they_are_json() -> None:
    trace = [
        arrival(time=i / 50, prompt=37 * i % 3000 + 1, output_tokens=i % 40 + 1) for i in range(200)
    ]
    first = run(*trace, num_pages=(200, 300, 100, 250))
    again = run(*trace, num_pages=(200, 300, 100, 250))
    assert first.to_json() == again.to_json()
    assert msgspec.json.decode(first.to_json(), type=SimulationResult) == first
    assert first != run(*trace, num_pages=(200, 300, 100, 249))


def test_pools_must_be_as_many_as_ranks() -> None:
    config = EngineConfig(model="simulated", context_parallel_size=2)
    with pytest.raises(ConfigError, match="num_pages names 3 ranks; context_parallel_size=2"):
        simulate(Trace([]), config, SPEC, (1, 2, 3))


def test_slower_ranks_take_longer() -> None:
    config = EngineConfig(model="simulated")
    trace = Trace([arrival()])
    slow = simulate(trace, config, replace(SPEC, dtype="float32"), (100,), CPU_THREAD)
    assert slow.seconds > 10 * simulate(trace, config, SPEC, (100,)).seconds


def test_percentiles_are_interpolated_and_skip_what_is_unknown() -> None:
    values = [4.0, None, 1.0, 3.0, 2.0, 5.0]
    assert [percentile(values, p) for p in (0, 50, 100)] == [1.0, 3.0, 5.0]
    assert percentile(values, 90) == pytest.approx(4.6)
    assert percentile([None], 50) is None
