"""Ranks without tensors: an executor whose tokens show where every key was written and read.

The model has two layers, and its attention is a sum over keys. A token's first key is a hash of
its id and position; its second is a hash of all first keys up to its own; the token that follows
is drawn from a hash of all second keys. So each token depends on every earlier one twice, and a
key that is missing, doubled, stale or out of place changes all tokens after it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from zlib import crc32

import msgspec

from longspan.config import EngineConfig
from longspan.cost.rates import CPU_THREAD, Rates
from longspan.engine.engine import Engine
from longspan.models import ModelSpec
from longspan.plan import UNKNOWN, Extent, RankPlan, RankResult, Sampled, Sampling
from longspan.topology import Topology

VOCAB_SIZE = 64

Plans = Mapping[int, RankPlan]


Order = Callable[[Sequence[int]], Sequence[int]]
"""Which of the ranks at work, in the order in which they began, are done at the next look."""


@dataclass
class _Work:
    """A step under way, and those of its ranks that are not done."""

    plans: dict[int, RankPlan]
    busy: set[int]
    results: dict[int, RankResult] = field(default_factory=dict)


@dataclass(frozen=True)
class _Token:
    """A new token: where it is in its request, in its rank's batch and in its rank's pool."""

    position: int
    token_id: int
    rank: int
    row: int
    slot: int


class SimulatedExecutor:
    """Runs plans in no time, unless `order` lets ranks take theirs.

    `before_step` sees the plans of each step before they are run, `after_step` when their last
    rank is done. A step is run as late as can be, when its first rank is done, and its moves
    arrive when its last is: whoever takes pages from it too early is found out.
    """

    def __init__(
        self, num_pages: Sequence[int], page_size: int, order: Order = lambda ranks: ranks
    ) -> None:
        self.num_pages = tuple(num_pages)
        self.page_size = page_size
        self.rates = CPU_THREAD
        self.topology = Topology.of_hosts([len(num_pages)])
        self.joins = False
        self.queues = True
        self._last_joint = 0
        self.order = order
        self.before_step: Callable[[Plans], None] = lambda plans: None
        self.after_step: Callable[[Plans], None] = lambda plans: None
        self._at_work: dict[int, list[_Work]] = {}
        self._drawn: list[dict[str, int]] = [{} for _ in num_pages]
        """What the last step drew on each rank, by request."""
        self._pools: list[list[list[int | None]]] = [
            [[None] * (pages * page_size) for _layer in range(2)] for pages in num_pages
        ]

    def start(self, plans: Plans) -> None:
        assert plans
        assert all(len(self._at_work.get(rank, ())) < 2 for rank in plans), (
            "a rank has enough to do"
        )
        self._check_joint(plans)
        self.before_step(plans)
        work = _Work(dict(plans), set(plans))
        for rank in plans:
            self._at_work.setdefault(rank, []).append(work)

    def _check_joint(self, plans: Plans) -> None:
        """Those who compute a step jointly are told alike, and know a new number for it."""
        told = {(plan.joint, plan.joint and plan.token_ids) for plan in plans.values()}
        assert len(told) == 1, told
        joint, token_ids = told.pop()
        if joint is not None:
            assert joint.ranks == tuple(sorted(plans))
            assert joint.number > self._last_joint
            self._last_joint = joint.number
            for plan in plans.values():
                assert len(plan.parts) == len(token_ids or ()), "one token of each part"

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        results = {}
        for rank in self.order(list(self._at_work)):
            work = self._at_work[rank].pop(0)
            if not self._at_work[rank]:
                del self._at_work[rank]
            if not work.results:
                work.results = self._execute(work.plans)
            work.busy.remove(rank)
            if not work.busy:
                self._move(work.plans)
                self.after_step(work.plans)
            results[rank] = work.results[rank]
        return results

    def _execute(self, plans: Plans) -> dict[int, RankResult]:
        cached: dict[str, list[int]] = {}
        new: dict[str, list[_Token]] = {}
        for rank, plan in plans.items():
            self._read(rank, plan, self._tokens(rank, plan), cached, new)
        states: dict[tuple[int, int], int] = {}
        for request_id, tokens in new.items():
            self._forward(tokens, cached[request_id], states)
        results = {
            rank: RankResult(tuple(draw(states[rank, s.row], s) for s in plan.samplings), {})
            for rank, plan in plans.items()
        }
        for rank, result in results.items():
            self._drawn[rank] = {one.request_id: one.token_id for one in result.sampled}
        return results

    def _tokens(self, rank: int, plan: RankPlan) -> Sequence[int]:
        """A plan's tokens, also those that were not drawn when it was made.

        A rank knows what it drew itself; those who compute jointly tell each other.
        """
        if UNKNOWN not in plan.token_ids:
            return plan.token_ids
        knowing = self._drawn if plan.joint else [self._drawn[rank]]
        known = {name: token for drawn in knowing for name, token in drawn.items()}
        asked = (part.segment for part in plan.parts)
        names = [s.request_id for s in asked if plan.joint or s.shard(rank).num_queries]
        assert plan.token_ids == (UNKNOWN,) * len(names), "all are unknown, one of each request"
        return [known[name] for name in names]

    def _move(self, plans: Plans) -> None:
        for rank, plan in plans.items():
            for move in plan.moves:
                assert rank in (move.source, move.target)
                assert move in plans[move.source].moves, "the source has to know"
                assert move in plans[move.target].moves, "the target has to know"
                if rank == move.source:
                    slots = zip(self._slots(move.sources), self._slots(move.targets), strict=True)
                    for source, target in slots:
                        for layer, pool in enumerate(self._pools[move.source]):
                            self._pools[move.target][layer][target] = pool[source]

    def close(self) -> None:
        pass

    def damage(self, rank: int, slot: int) -> None:
        """Change the keys of one token."""
        for pool in self._pools[rank]:
            pool[slot] = 0

    def _read(
        self,
        rank: int,
        plan: RankPlan,
        token_ids: Sequence[int],
        cached: dict[str, list[int]],
        new: dict[str, list[_Token]],
    ) -> None:
        """One rank's part: the sums of its cached keys in each layer, and its new tokens."""
        row = 0
        for index, part in enumerate(plan.parts, 1):
            segment, shard = part.segment, part.segment.shard(rank)
            slots = self._slots(part.extents)
            sums = cached.setdefault(segment.request_id, [0, 0])
            for layer, pool in enumerate(self._pools[rank]):
                keys = [pool[slot] for slot in slots[: shard.cached]]
                assert None not in keys, "a key is read that was never written"
                sums[layer] += sum(key for key in keys if key is not None)
            tokens = new.setdefault(segment.request_id, [])
            positions = [p for run in shard.queries for p in range(run.start, run.end)]
            for place, position in enumerate(positions, shard.cached):
                tokens.append(_Token(position, token_ids[row], rank, row, slots[place]))
                row += 1
            if plan.joint:  # a token of each part, whoever writes its key
                row = index

    def _slots(self, extents: Sequence[Extent]) -> list[int]:
        size = self.page_size
        return [slot for e in extents for slot in range(e.start * size, e.end * size)]

    def _forward(
        self, tokens: list[_Token], sums: Sequence[int], states: dict[tuple[int, int], int]
    ) -> None:
        first_sum, second_sum = sums
        for token in sorted(tokens, key=lambda token: token.position):
            first = hash((token.position, token.token_id))
            first_sum += first
            second = hash((first, first_sum))
            second_sum += second
            states[token.rank, token.row] = second_sum
            for pool, key in zip(self._pools[token.rank], (first, second), strict=True):
                pool[token.slot] = key


def draw(state: int, sampling: Sampling) -> Sampled:
    """The token is a hash of the state and of all that the sampling says but name and row."""
    terms = msgspec.structs.astuple(msgspec.structs.replace(sampling, request_id="", row=0))
    for attempt in count():
        token_id = crc32(repr((state, attempt, terms)).encode()) % VOCAB_SIZE
        if token_id not in sampling.banned_ids:
            break
    return Sampled(sampling.request_id, token_id)


def simulated_engine(
    num_pages: Sequence[int],
    *,
    page_size: int = 4,
    max_model_len: int = 10**6,
    tokenizer: Any = None,
    enable_prefix_caching: bool = False,
    order: Order = lambda ranks: ranks,
    rates: Rates = CPU_THREAD,
    joins: bool = False,
    **options: Any,
) -> tuple[Engine, SimulatedExecutor]:
    """An engine over simulated ranks with so many pages each; `options` are EngineConfig's."""
    config = EngineConfig(
        model="simulated",
        context_parallel_size=len(num_pages),
        page_size=page_size,
        enable_prefix_caching=enable_prefix_caching,
        **options,
    )
    spec = ModelSpec(
        name="simulated",
        architecture="Simulated",
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        eos_token_ids=(0,),
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        num_active_parameters=10**7 if joins else 1000,
    )
    executor = SimulatedExecutor(num_pages, page_size, order)
    executor.rates, executor.joins = rates, joins
    return Engine(config, spec, executor, tokenizer), executor
