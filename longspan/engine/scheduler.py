"""Decides what every rank computes in the next step. Pure Python: no tensors, no processes."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longspan.config import EngineConfig
from longspan.cost.strategy import KVShape, choose
from longspan.engine.ledger import Ledger
from longspan.engine.placement import choose_ranks, cut
from longspan.engine.prefix_cache import Place
from longspan.engine.request import Request
from longspan.engine.shard import fair_shares
from longspan.plan import (
    Part,
    RankPlan,
    RankResult,
    Run,
    Sampling,
    Segment,
    Shard,
    Strategy,
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The new tokens of one request in one step, those before position `end`."""

    request: Request
    end: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class Step:
    """The plans of the ranks that have a part in a step, and the chunks they were made from."""

    chunks: list[Chunk]
    plans: dict[int, RankPlan]


class Scheduler:
    """Requests in order of arrival, and the ledger of the pages that hold their keys.

    A step takes decode tokens first, then prefill chunks of running requests, then admits waiting
    ones, until every rank's `max_num_batched_tokens` are spent. A request is admitted when the
    free pages that no running one is expected to need can take it, as far as it is expected to go.
    """

    def __init__(self, config: EngineConfig, ledger: Ledger, shape: KVShape) -> None:
        self.config = config
        self.ledger = ledger
        self.shape = shape
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """End a request wherever it stands and free its pages."""
        request.finish("abort")
        if request in self.running:
            self._release(request)
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> Step:
        """Make the next step. Changes holdings and ledger; counters change in `update`."""
        budgets = [self.config.max_num_batched_tokens] * self.ledger.num_ranks
        chunks = self._decodes(budgets)
        chunks += self._prefills(budgets)
        chunks += self._admissions(budgets)
        if not chunks and self.running:
            # Claims keep this from happening as far as is known; if prompts should ever hold each
            # other's pages all the same, the youngest gives way rather than all stand still.
            self._preempt(self.running[-1])
            return self.schedule()
        return Step(chunks, self._plans(chunks))

    def update(self, step: Step, results: Iterable[RankResult]) -> list[Request]:
        """Take the step's tokens, free what ended; returns the requests that drew a token."""
        for chunk in step.chunks:
            self._computed(chunk.request, chunk.end)
        requests = {chunk.request.request_id: chunk.request for chunk in step.chunks}
        drawn = []
        for sampled in (sampled for result in results for sampled in result.sampled):
            request = requests[sampled.request_id]
            if request.finish_reason is None:
                request.append(sampled)
                drawn.append(request)
        for request in [r for r in drawn if r.finish_reason]:
            self._release(request)
            self.running.remove(request)
        return drawn

    def _computed(self, request: Request, end: int) -> None:
        """Count a request's tokens before `end` as computed; its full pages may be shared."""
        size, before = self.ledger.page_size, request.num_computed
        request.num_computed = end
        if self.config.enable_prefix_caching and request.finish_reason is None:
            hashes = request.page_hashes(end // size, size)
            for index in range(before // size, end // size):
                self.ledger.cache.add(hashes[index], request.places[index])

    def _decodes(self, budgets: list[int]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in [r for r in self.running if r.num_pending == 1]:
            if request not in self.running:
                continue  # preempted for an older one in this very loop
            while not (chunk := self._chunk(request, budgets)) and self._needs_page(request):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            if chunk:
                chunks.append(chunk)
        return chunks

    def _prefills(self, budgets: list[int]) -> list[Chunk]:
        prefilling = [r for r in self.running if r.num_pending > 1]
        return [chunk for r in prefilling if (chunk := self._chunk(r, budgets))]

    def _admissions(self, budgets: list[int]) -> list[Chunk]:
        chunks: list[Chunk] = []
        unclaimed = self._unclaimed_pages()
        for request in list(self.waiting):
            if len(self.running) >= self.config.max_num_seqs or not any(budgets):
                break
            if self.config.enable_prefix_caching and request.follows(self.ledger.page_size):
                continue
            places = self._cached_places(request)
            shared = sum(not self.ledger.is_idle(place) for place in places)
            pages = self.ledger.pages_of(request.expected_tokens) - shared
            if pages > sum(unclaimed):
                break
            chunk = self._admit(request, places, unclaimed, budgets)
            if chunk is None:
                break
            chunks.append(chunk)
            _claim(request.ranks, pages, unclaimed)
        return chunks

    def _admit(
        self,
        request: Request,
        places: Sequence[Place],
        unclaimed: Sequence[int],
        budgets: list[int],
    ) -> Chunk | None:
        """Start a waiting request on its cached pages; None if no rank has a budget for it."""
        cached = len(places) * self.ledger.page_size
        request.ranks = self._ranks_for(request.num_tokens - cached, places, unclaimed, budgets)
        for place in places:
            self.ledger.share(place)
        request.adopt(places, self.ledger.page_size)
        chunk = self._chunk(request, budgets)
        if chunk is None:
            self._release(request)
            return None
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = time.monotonic()
            request.num_cached_tokens = cached
        self.waiting.remove(request)
        self.running.append(request)
        return chunk

    def _ranks_for(
        self, tokens: int, places: Sequence[Place], unclaimed: Sequence[int], budgets: Sequence[int]
    ) -> list[int]:
        """Ranks with a budget in this step, unless others would hold the request on fewer."""
        config, holders = self.config, {place.rank for place in places}
        ready = [pages if budget else 0 for pages, budget in zip(unclaimed, budgets, strict=True)]
        now, later = (
            choose_ranks(tokens, free, config.page_size, config.min_tokens_per_rank, holders)
            for free in (ready, unclaimed)
        )
        fits = sum(ready[rank] for rank in now) >= self.ledger.pages_of(tokens)
        return now if fits and len(now) <= len(later) else later

    def _cached_places(self, request: Request) -> list[Place]:
        """Where its first pages already are; at least one token is left to compute."""
        if not self.config.enable_prefix_caching:
            return []
        page_size = self.ledger.page_size
        return self.ledger.cache.find(
            request.page_hashes((request.num_tokens - 1) // page_size, page_size)
        )

    def _unclaimed_pages(self) -> list[int]:
        """Each rank's free pages that no running request is expected to need."""
        ledger = self.ledger
        free = [ledger.num_free(rank) for rank in range(ledger.num_ranks)]
        for request in self.running:
            pages = ledger.pages_of(request.expected_tokens) - request.num_pages
            _claim(request.ranks, pages, free)
        return free

    def _needs_page(self, request: Request) -> bool:
        """Whether a decoding request waits for a page, rather than for its home's budget."""
        at_border = request.num_computed % self.ledger.page_size == 0
        return at_border and not any(
            self.ledger.num_free(rank) for rank in range(self.ledger.num_ranks)
        )

    def _chunk(self, request: Request, budgets: list[int]) -> Chunk | None:
        """Cut the request's next tokens over ranks, taking budget and pages; None if it can't."""
        free = [self.ledger.num_free(rank) for rank in range(self.ledger.num_ranks)]
        runs = cut(request, free, budgets, self.ledger.page_size)
        if not runs:
            return None
        cached = {rank: holding.tokens for rank, holding in request.holdings.items()}
        for rank, taken in runs.items():
            tokens = sum(run.length for run in taken)
            budgets[rank] -= tokens
            self._hold(request, rank, taken)
        end, request.home = max((taken[-1].end, rank) for rank, taken in runs.items())
        shards = tuple(
            Shard(rank, tuple(new), cached.get(rank, 0), tuple(new))
            for rank in sorted(request.holdings)
            for new in (runs.get(rank, []),)
        )
        return Chunk(request, end, Segment(request.request_id, self._strategy(shards), shards))

    def _hold(self, request: Request, rank: int, runs: Sequence[Run]) -> None:
        """Give the request the pages for new tokens on one rank."""
        holding, size = request.holding(rank), self.ledger.page_size
        begun = [page for run in runs for page in range(-(-run.start // size), -(-run.end // size))]
        if begun:
            extents = self.ledger.allocate(rank, len(begun), holding.last_page)
            holding.add_pages(extents)
            taken = (page for extent in extents for page in range(extent.start, extent.end))
            for index, page in zip(begun, taken, strict=True):
                request.places[index] = Place(rank, page)
        holding.tokens += sum(run.length for run in runs)

    def _strategy(self, shards: Sequence[Shard]) -> Strategy:
        forced = self.config.attention_strategy
        return choose(shards, self.shape) if forced == "auto" or len(shards) == 1 else forced

    def _plans(self, chunks: Sequence[Chunk]) -> dict[int, RankPlan]:
        token_ids: dict[int, list[int]] = {}
        parts: dict[int, list[Part]] = {}
        samplings: dict[int, list[Sampling]] = {}
        for chunk in chunks:
            request = chunk.request
            for shard in chunk.segment.shards:
                packed = token_ids.setdefault(shard.rank, [])
                extents = tuple(request.holdings[shard.rank].extents)
                parts.setdefault(shard.rank, []).append(Part(chunk.segment, extents))
                for run in shard.queries:
                    packed += request.tokens_of(run)
                if chunk.end == request.num_tokens and shard.rank == request.home:
                    row = request.sampling(len(packed) - 1)
                    samplings.setdefault(shard.rank, []).append(row)
        return {
            rank: RankPlan(
                tuple(token_ids[rank]), tuple(parts[rank]), tuple(samplings.get(rank, ()))
            )
            for rank in sorted(parts)
        }

    def _preempt(self, request: Request) -> None:
        """Take a running request's pages; it is computed again later, its output kept."""
        self._release(request)
        request.metrics.num_preemptions += 1
        self.running.remove(request)
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        for rank, holding in request.holdings.items():
            self.ledger.release(rank, holding.extents)
        request.drop_keys(self.ledger.num_ranks)


def _claim(ranks: Sequence[int], pages: int, free: list[int]) -> None:
    """Take so many pages from `free`, if they are there: from these ranks first, then from all."""
    for preferred in (ranks, range(len(free))):
        room = [free[rank] for rank in preferred]
        shares = fair_shares(min(max(pages, 0), sum(room)), room)
        for rank, share in zip(preferred, shares, strict=True):
            free[rank] -= share
        pages -= sum(shares)
