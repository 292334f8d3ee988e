"""How long equal prompts that come at once will take: TTFT and TPOT, and what makes them so long.

The simulator serves such a batch step by step with the engine's own parts, but needs 2,600 steps
and 9 s for 10M tokens on 64 ranks. This uses the engine's own placement and cost model, adds up
the chunks that its scheduler would cut, and takes milliseconds; tests hold it to the simulator.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from longspan.config import EngineConfig
from longspan.cost.choice import decide
from longspan.cost.limits import Limit, ModelOf, limit_of
from longspan.cost.model import CostModel
from longspan.cost.rates import Rates
from longspan.engine.admission import fair_degree
from longspan.engine.draft import MAX_SHARES, lone_factor
from longspan.engine.placement import Fleet, Placer
from longspan.engine.scheduler import LOOKAHEAD
from longspan.engine.shard import fair_shares, zigzag
from longspan.plan import Run, Segment, Shard, Strategy

SAMPLES = 32
"""Of so many chunks in a row that differ little only the middle one is looked at."""


class Chunks(NamedTuple):
    """Equal chunks that follow each other: how many, of how many tokens, on how many ranks.

    `cached` are the tokens before the middle one; so many `shares` of prompts are in each step.
    """

    times: int
    new: int
    cached: int
    degree: int
    shares: int


class Forecast(NamedTuple):
    """What is predicted for each of some equal requests; times in seconds.

    The TTFT is the last one's, if all come at once; the TPOT is that of all together, with that
    many tokens each and keys where the prefill left them. `degree` is the most ranks of one.
    """

    degree: int
    ttft: float
    ttft_limit: Limit
    tpot: float
    tpot_limit: Limit
    prefill_strategies: list[Strategy]
    decode_strategy: Strategy


class Forecaster:
    """Predicts for ranks that are all alike, with room for so many pages each."""

    def __init__(
        self, model_of: ModelOf, rates: Rates, config: EngineConfig, pages_per_rank: int
    ) -> None:
        self.model_of = model_of
        self.rates = rates
        self.config = config
        self.cost = model_of(rates)
        self.pages_per_rank = pages_per_rank
        self._placer = Placer.of(config, self.cost)

    def forecast(self, tokens: int, batch: int) -> Forecast:
        """Predict for `batch` requests of so many tokens, which must fit the ranks together."""
        placed, chunks, decoding = self._work(tokens, batch)
        ttft, ttft_limit = self._limit(lambda cost: seconds_of(chunks, cost))
        tpot, tpot_limit = self._limit(lambda cost: max(cost.step_seconds(decoding).values()))
        ends = (self.prefill_segment(chunks[place], placed[0]).strategy for place in (0, -1))
        return Forecast(
            degree=max(len(ranks) for ranks in placed),
            ttft=ttft,
            ttft_limit=ttft_limit,
            tpot=tpot,
            tpot_limit=tpot_limit,
            prefill_strategies=list(dict.fromkeys(ends)),
            decode_strategy=decoding[0].strategy,
        )

    def seconds(self, tokens: int, batch: int) -> tuple[float, float]:
        """TTFT and TPOT of that forecast, for a fifth of its work."""
        _, chunks, decoding = self._work(tokens, batch)
        return seconds_of(chunks, self.cost), max(self.cost.step_seconds(decoding).values())

    def _work(self, tokens: int, batch: int) -> tuple[list[list[int]], list[Chunks], list[Segment]]:
        placed = self.place(tokens, batch)
        return placed, self._slowest(tokens, placed), self.decode_segments(tokens, placed)

    def _limit(self, seconds: Callable[[CostModel], float]) -> tuple[float, Limit]:
        return limit_of(self.model_of, self.rates, seconds)

    def place(self, tokens: int, batch: int) -> list[list[int]]:
        """The ranks that each of the requests gets, as in one round of the engine's admission."""
        size, num_ranks = self.config.page_size, self.config.num_ranks
        free, delays = [self.pages_per_rank] * num_ranks, [0.0] * num_ranks
        most = fair_degree(num_ranks, tokens, tokens * min(batch, LOOKAHEAD))
        placed = []
        for _ in range(batch):
            placement = self._placer.place(tokens, (), Fleet(free, delays), most)
            assert placement is not None, "the pages of all ranks together are enough"
            room = [free[rank] for rank in placement.ranks]
            shares = fair_shares(-(-tokens // size), room)
            for rank, share in zip(placement.ranks, shares, strict=True):
                free[rank] -= share
                delays[rank] = placement.seconds
            placed.append(placement.ranks)
        return placed

    def _slowest(self, tokens: int, placed: Sequence[Sequence[int]]) -> list[Chunks]:
        """The chunks of all prompts on the rank that is done last."""
        prompts: dict[int, list[int]] = {}
        for ranks in placed:
            for rank in ranks:
                prompts.setdefault(rank, []).append(len(ranks))
        kinds = {tuple(degrees) for degrees in prompts.values()}
        options = [
            [chunk for degree in degrees for chunk in self.chunks(tokens, degree, len(degrees))]
            for degrees in kinds
        ]
        if len(options) == 1:
            return options[0]
        return max(options, key=lambda chunks: seconds_of(chunks, self.cost))

    def chunks(self, tokens: int, degree: int, num_prompts: int = 1) -> Iterator[Chunks]:
        """The chunks of one prompt whose ranks have so many prompts in all, as they are cut."""
        done, shares = 0, min(num_prompts, MAX_SHARES)
        while done < tokens:
            new = self._chunk(done, tokens - done, degree, shares)
            middle, count = done, max((tokens - done) // new // SAMPLES, 1)
            if count > 1:
                middle += new * count // 2
                new = self._chunk(middle, tokens - middle, degree, shares)
                count = min(count, (tokens - done) // new)
            yield Chunks(count, new, middle, degree, shares)
            done += count * new

    def _chunk(self, cached: int, left: int, degree: int, shares: int) -> int:
        """How many tokens of one prompt a step takes: whole pages on each of its ranks."""
        config, base = self.config, self.cost.base_seconds
        each = config.max_num_batched_tokens // shares
        if config.max_step_time is not None:
            most = config.max_step_time * (lone_factor(degree) if shares == 1 else 1)
            seconds = max(most - base, base) / shares
            within = self.cost.tokens_within(seconds, cached, degree)
            each = min(each, -(-within // degree))
        pages = max(each // config.page_size, 1)
        return min(pages * config.page_size * degree, left)

    def prefill_segment(
        self, chunk: Chunks, ranks: Sequence[int], strategy: Strategy | None = None
    ) -> Segment:
        """One of these chunks on its ranks, by a strategy or by the one that would be chosen."""
        size = self.config.page_size
        pages, place = -(-chunk.new // size), sorted(ranks)
        cut = zigzag(fair_shares(pages, [pages] * len(place)))
        cached = fair_shares(chunk.cached, [chunk.cached] * len(place))
        end = chunk.cached + chunk.new
        shards = []
        for rank, runs, before in zip(place, cut, cached, strict=True):
            starts = ((chunk.cached + size * run.start, run.length) for run in runs)
            new = tuple(Run(start, min(size * length, end - start)) for start, length in starts)
            shards.append(Shard(rank, new, before, new))
        return self._segment("0", shards, strategy)

    def decode_segments(
        self,
        tokens: int,
        placed: Sequence[Sequence[int]],
        strategy: Strategy | None = None,
    ) -> list[Segment]:
        """A step in which each request computes its last token, its keys alike on its ranks.

        Homes are given to ranks in turn.
        """
        homes: Counter[int] = Counter()
        segments = []
        for number, ranks in enumerate(placed):
            home = min(ranks, key=lambda rank: homes[rank])
            homes[home] += 1
            new, cached = (Run(tokens - 1, 1),), tokens - 1
            shares = fair_shares(cached, [cached] * len(ranks))
            shards = [
                Shard(rank, new, share, new) if rank == home else Shard(rank, (), share, ())
                for rank, share in sorted(zip(ranks, shares, strict=True))
            ]
            segments.append(self._segment(str(number), shards, strategy))
        return segments

    def _segment(self, name: str, shards: Sequence[Shard], strategy: Strategy | None) -> Segment:
        if len(shards) == 1:
            return Segment(name, "local", tuple(shards))
        taken = strategy or decide(shards, self.cost, None, True).strategy
        return Segment(name, taken, tuple(shards))


def seconds_of(chunks: Iterable[Chunks], cost: CostModel) -> float:
    """How long chunks take, with their part of their steps' fixed cost."""
    return sum(
        times * (cost.base_seconds / shares + cost.prefill_seconds(new, cached, degree))
        for times, new, cached, degree, shares in chunks
    )
