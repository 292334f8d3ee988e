"""Ranks without tensors: an executor whose tokens show where every key was written and read.

The model has two layers, and its attention is a sum over keys. A token's first key is a hash of
its id and position; its second is a hash of all first keys up to its own; the token that follows
is drawn from a hash of all second keys. So each token depends on every earlier one twice, and a
key that is missing, doubled, stale or out of place changes all tokens after it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from zlib import crc32

import msgspec

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.models import ModelSpec
from longspan.plan import Extent, RankPlan, RankResult, Sampled, Sampling

VOCAB_SIZE = 64

Plans = Mapping[int, RankPlan]


@dataclass(frozen=True)
class _Token:
    """A new token: where it is in its request, in its rank's batch and in its rank's pool."""

    position: int
    token_id: int
    rank: int
    row: int
    slot: int


class SimulatedExecutor:
    """Runs plans in no time. `before_step` sees the plans of each step before they are run."""

    def __init__(self, num_pages: Sequence[int], page_size: int) -> None:
        self.num_pages = tuple(num_pages)
        self.page_size = page_size
        self.before_step: Callable[[Plans], None] = lambda plans: None
        self._pools: list[list[list[int | None]]] = [
            [[None] * (pages * page_size) for _layer in range(2)] for pages in num_pages
        ]

    def execute(self, plans: Plans) -> dict[int, RankResult]:
        self.before_step(plans)
        cached: dict[str, list[int]] = {}
        new: dict[str, list[_Token]] = {}
        for rank, plan in plans.items():
            self._read(rank, plan, cached, new)
        states: dict[tuple[int, int], int] = {}
        for request_id, tokens in new.items():
            self._forward(tokens, cached[request_id], states)
        return {
            rank: RankResult(tuple(draw(states[rank, s.row], s) for s in plan.samplings), {})
            for rank, plan in plans.items()
        }

    def close(self) -> None:
        pass

    def damage(self, rank: int, slot: int) -> None:
        """Change the keys of one token."""
        for pool in self._pools[rank]:
            pool[slot] = 0

    def _read(
        self, rank: int, plan: RankPlan, cached: dict[str, list[int]], new: dict[str, list[_Token]]
    ) -> None:
        """One rank's part: the sums of its cached keys in each layer, and its new tokens."""
        row = 0
        for part in plan.parts:
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
                tokens.append(_Token(position, plan.token_ids[row], rank, row, slots[place]))
                row += 1

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
    )
    executor = SimulatedExecutor(num_pages, page_size)
    return Engine(config, spec, executor, tokenizer), executor
