"""A move copies whole pages into another rank's pool bit for bit, while the ranks compute."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import zoo
from msgspec.structs import replace
from torch import Tensor

from longspan.config import EngineConfig
from longspan.cost.kv_shape import KVShape
from longspan.engine.executor import Executor
from longspan.models import load_spec
from longspan.plan import (
    Extent,
    Move,
    Part,
    RankPlan,
    RankResult,
    Run,
    Sampling,
    Segment,
    Shard,
    Strategy,
    Traffic,
)
from longspan.worker.in_process import InProcessExecutor
from longspan.worker.processes import ProcessExecutor

PAGE = 4
NUM_PAGES = 40
RANKS = (0, 1, 2)

Plans = dict[int, RankPlan]


def pages(*runs: tuple[int, int]) -> tuple[Extent, ...]:
    return tuple(Extent(start, length) for start, length in runs)


# Pages 0 .. 5 of each rank belong to the step's request.
MOVES: dict[str, list[Move]] = {
    "one page": [Move(0, 1, pages((6, 1)), pages((39, 1)))],
    "there and back at once": [
        Move(0, 1, pages((8, 8)), pages((24, 8))),
        Move(1, 0, pages((8, 5)), pages((30, 5))),
    ],
    "several between two": [
        Move(2, 1, pages((10, 1)), pages((20, 1))),
        Move(2, 1, pages((11, 3)), pages((31, 3))),
        Move(2, 1, pages((9, 1)), pages((21, 1))),
    ],
    "in a circle": [
        Move(0, 1, pages((6, 4)), pages((20, 4))),
        Move(1, 2, pages((6, 3)), pages((20, 3))),
        Move(2, 0, pages((6, 2)), pages((20, 2))),
    ],
    "one page to all": [
        Move(1, 0, pages((7, 1)), pages((7, 1))),
        Move(1, 2, pages((7, 1)), pages((8, 1))),
    ],
    "what the step reads": [Move(0, 2, pages((0, 2)), pages((12, 2)))],
    "scattered": [
        Move(0, 1, pages((9, 1), (30, 2), (12, 3)), pages((15, 2), (38, 1), (6, 2), (10, 1))),
        Move(2, 1, pages((39, 1), (7, 1)), pages((8, 2))),
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("llama"))


def config_of(model: Path, num_pages: int, dtype: str = "float32") -> EngineConfig:
    return EngineConfig(
        model=str(model),
        context_parallel_size=len(RANKS),
        kv_cache_tokens=num_pages * PAGE,
        page_size=PAGE,
        dtype=dtype,
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def threads(request: pytest.FixtureRequest, model: Path) -> Iterator[InProcessExecutor]:
    config = config_of(model, NUM_PAGES, request.param)
    executor = InProcessExecutor(config, load_spec(config))
    yield executor
    executor.close()


def run(executor: Executor, plans: Mapping[int, RankPlan]) -> dict[int, RankResult]:
    executor.start(plans)
    results: dict[int, RankResult] = {}
    while len(results) < len(plans):
        results |= executor.wait()
    return results


def with_moves(plans: Plans, moves: Sequence[Move]) -> Plans:
    """The plans with their moves, and one for each rank that only moves."""
    complete = {}
    for rank in RANKS:
        own = tuple(move for move in moves if rank in (move.source, move.target))
        if own or rank in plans:
            complete[rank] = replace(plans.get(rank, RankPlan((), (), ())), moves=own)
    return complete


def shared_step(strategy: Strategy, cached: tuple[int, int, int] = (12, 8, 4)) -> Plans:
    """A step of all ranks: two compute new tokens over the keys of three, one draws."""
    first = sum(cached)
    new = ((Run(first, 8),), (Run(first + 8, 3),), ())
    shards = tuple(Shard(rank, new[rank], cached[rank], new[rank]) for rank in RANKS)
    sampling = Sampling("shared", 2, seed=0, position=first + 11, temperature=0, logprobs=5)
    extents = (pages((0, 5)), pages((0, 1), (2, 2)), pages((3, 1)))
    return {
        rank: RankPlan(
            tuple(range(1, 1 + shards[rank].num_queries)),
            (Part(Segment("shared", strategy, shards), extents[rank]),),
            (sampling,) if rank == 1 else (),
        )
        for rank in RANKS
    }


def pools(executor: InProcessExecutor) -> list[Tensor]:
    return [runner.pool.data for runner in executor._runners]


def fill(executor: InProcessExecutor) -> None:
    generator = torch.Generator().manual_seed(0)
    for pool in pools(executor):
        pool.copy_(torch.randn(pool.shape, generator=generator))


def slots(extents: Sequence[Extent]) -> list[int]:
    return [slot for e in extents for slot in range(e.start * PAGE, e.end * PAGE)]


def moved(before: list[Tensor], moves: Sequence[Move]) -> list[Tensor]:
    """All pools after some moves, token by token."""
    after = [pool.clone() for pool in before]
    for move in moves:
        for source, target in zip(slots(move.sources), slots(move.targets), strict=True):
            after[move.target][..., target, :] = before[move.source][..., source, :]
    return after


def sent(executor: InProcessExecutor, moves: Sequence[Move], rank: int) -> Traffic:
    shape = KVShape.of(executor._runners[0].spec)
    own = [move for move in moves if move.source == rank]
    tokens = sum(len(slots(move.sources)) for move in own)
    return Traffic(calls=1, messages=len(own), bytes=tokens * shape.token_bytes)


each_moves = pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)


@each_moves
def test_a_plan_of_moves_alone_changes_the_targets_alone(
    threads: InProcessExecutor, moves: list[Move]
) -> None:
    fill(threads)
    expected = moved(pools(threads), moves)
    results = run(threads, with_moves({}, moves))
    for pool, right in zip(pools(threads), expected, strict=True):
        assert torch.equal(pool, right)
    for rank, result in results.items():
        assert result == RankResult((), {"move": sent(threads, moves, rank)})


@pytest.mark.parametrize("strategy", ["pass_kv", "gather_kv", "pass_q", "tree"])
@each_moves
def test_moves_beside_a_step_change_nothing_of_it(
    threads: InProcessExecutor, moves: list[Move], strategy: Strategy
) -> None:
    fill(threads)
    without = run(threads, shared_step(strategy))
    expected = moved(pools(threads), moves)
    fill(threads)
    results = run(threads, with_moves(shared_step(strategy), moves))
    for pool, right in zip(pools(threads), expected, strict=True):
        assert torch.equal(pool, right)
    for rank, result in results.items():
        assert result.sampled == without[rank].sampled
        traffic = dict(result.traffic)
        if any(rank in (move.source, move.target) for move in moves):
            assert traffic.pop("move") == sent(threads, moves, rank)
        assert traffic == without[rank].traffic


PROMPT = [5 + 7 * i % 400 for i in range(4000)]
PROMPT_PAGES = len(PROMPT) // PAGE
FILLER = 10_000
"""Pages that move in front of a prompt's: 30 MB, more than any socket takes at once."""
MOVED = pages((10, FILLER + PROMPT_PAGES))
ARRIVED = pages((MOVED[0].end + 10, MOVED[0].length))


def alone(rank: int, token_ids: Sequence[int], cached: int, first_page: int) -> RankPlan:
    """A step in which one rank computes tokens after its cached ones and draws the next."""
    new = (Run(cached, len(token_ids)),)
    segment = Segment("alone", "local", (Shard(rank, new, cached, new),))
    row = len(token_ids) - 1
    sampling = Sampling("alone", row, seed=0, position=new[0].end, temperature=0, logprobs=20)
    part = Part(segment, pages((first_page, PROMPT_PAGES + 1)))
    return RankPlan(tuple(token_ids), (part,), (sampling,))


def test_processes_move_megabytes_both_ways_beside_a_step(model: Path) -> None:
    """Small messages of the step travel behind large ones between the same ranks."""
    config = config_of(model, num_pages=ARRIVED[0].end + 10)
    spec = load_spec(config)
    executor = ProcessExecutor(config, spec)
    step = shared_step("pass_q", cached=(0, 0, 0))
    moves = [
        Move(0, 1, MOVED, ARRIVED),
        Move(2, 1, pages((11, 1)), pages((9, 1))),
        Move(1, 0, MOVED, ARRIVED),
    ]
    try:
        without = run(executor, step)
        here, there = (extents[0].start + FILLER for extents in (MOVED, ARRIVED))
        run(executor, {0: alone(0, PROMPT, 0, here), 1: alone(1, PROMPT[::-1], 0, here)})
        results = run(executor, with_moves(step, moves))
        after_here = run(executor, {r: alone(r, [9], len(PROMPT), here) for r in (0, 1)})
        after_there = run(executor, {r: alone(r, [9], len(PROMPT), there) for r in (0, 1)})
    finally:
        executor.close()
    for rank, pages_sent in enumerate((MOVED[0].length, MOVED[0].length, 1)):
        sent_bytes = pages_sent * PAGE * KVShape.of(spec).token_bytes
        assert results[rank].traffic.pop("move") == Traffic(1, 1, sent_bytes)
    assert results == without
    assert after_here[0].sampled != after_here[1].sampled
    assert after_there[0].sampled == after_here[1].sampled
    assert after_there[1].sampled == after_here[0].sampled
