"""One sequence on its way from a prompt to an end, and where its keys and values are."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from longspan.cost.choice import Choice
from longspan.engine.detokenizer import Detokenizer
from longspan.engine.prefix_cache import Place, chain
from longspan.outputs import RequestMetrics
from longspan.plan import UNKNOWN, Extent, Run, Sampled, Sampling, TokenLogprob
from longspan.sampling_params import SamplingParams

MIN_EXPECTED_TOKENS = 16


@dataclass(slots=True)
class Holding:
    """A request's keys on one rank: its pages, all full but the last of the request."""

    extents: tuple[Extent, ...] = ()
    tokens: int = 0

    @property
    def last_page(self) -> int | None:
        return self.extents[-1].end - 1 if self.extents else None

    def add_pages(self, extents: Sequence[Extent]) -> None:
        self.extents = joined((*self.extents, *extents))


def joined(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    """The same pages in as few extents as their order allows."""
    whole: list[Extent] = []
    for extent in extents:
        if whole and whole[-1].end == extent.start:
            whole[-1] = Extent(whole[-1].start, whole[-1].length + extent.length)
        else:
            whole.append(extent)
    return tuple(whole)


@dataclass(eq=False)
class Request:
    """One sequence: prompt, output, and two facts of progress.

    `num_computed` tokens have their keys in the ranks' pools, as `holdings` says; the rest of
    `num_tokens` (prompt and output so far) are still to be computed. There is no other state:
    a prefill chunk, a decode step and a recomputation after preemption are the same thing.
    `order` says who goes first: lower priority values, and earlier arrivals among equals.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    end_ids: frozenset[int]
    max_tokens: int
    detokenizer: Detokenizer
    order: tuple[int, int] = (0, 0)
    clock: Callable[[], float] = time.monotonic

    output_token_ids: list[int] = field(init=False, default_factory=list)
    logprobs: list[tuple[TokenLogprob, ...]] = field(init=False, default_factory=list)
    finish_reason: str | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)
    metrics: RequestMetrics = field(init=False)
    num_tokens: int = field(init=False)
    num_computed: int = field(init=False, default=0)
    num_cached_tokens: int = field(init=False, default=0)
    ranks: list[int] = field(init=False, default_factory=list)
    """The ranks that have its keys or will: those that must be idle for it to go on."""
    holdings: dict[int, Holding] = field(init=False, default_factory=dict)
    places: dict[int, Place] = field(init=False, default_factory=dict)
    """Where each of its pages is: page i holds positions i * P to i * P + P - 1."""
    home: int | None = field(init=False, default=None)
    """The rank with its last page, which computes its decode tokens."""
    to_gather: list[int] = field(init=False, default_factory=list)
    """Its pages on other ranks that are still to be moved to its home."""
    choice: Choice | None = field(init=False, default=None)
    """How its ranks shared attention in its last step, if it was on several."""
    in_flight: int = field(init=False, default=0)
    """How many steps with it are under way: meanwhile its pages can't be taken."""
    doomed: bool = field(init=False, default=False)
    """Whether its pages are to be taken when these steps are done."""
    leader: "Request | None" = field(init=False, default=None)
    """The sequence that computes the same prompt first, for this one to share its pages."""
    _page_hashes: list[bytes] = field(init=False, default_factory=list)
    _output_counts: Counter[int] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.metrics = RequestMetrics(arrival_time=self.clock())
        self.num_tokens = len(self.prompt_token_ids)

    @cached_property
    def _distinct_prompt_ids(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.prompt_token_ids)))

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not computed: 1 while decoding, more while prefilling."""
        return self.num_tokens - self.num_computed

    def follows(self, page_size: int) -> bool:
        """Whether it should wait for the full pages that its leader is still to compute."""
        leader = self.leader
        return (
            leader is not None
            and leader.finish_reason is None
            and leader.num_computed < len(self.prompt_token_ids) // page_size * page_size
        )

    @property
    def expected_tokens(self) -> int:
        """How long it is expected to become: its output as long again, or to its limit.

        What has gone on for so long is expected to go on for as long again, knowing nothing else.
        """
        output = len(self.output_token_ids)
        more = min(max(output, MIN_EXPECTED_TOKENS), self.max_tokens - output)
        return self.num_tokens + more

    def num_keys(self, rank: int) -> int:
        """How many of the request's tokens have their keys on a rank."""
        return self.holdings[rank].tokens if rank in self.holdings else 0

    def holding(self, rank: int) -> Holding:
        return self.holdings.setdefault(rank, Holding())

    def drop_keys(self, num_ranks: int) -> None:
        """Forget where the keys were, after their pages have been given back."""
        self.metrics.kv_tokens = [self.num_keys(rank) for rank in range(num_ranks)]
        self.holdings, self.places, self.home, self.num_computed = {}, {}, None, 0
        self.ranks, self.to_gather, self.doomed, self.choice = [], [], False, None

    def adopt(self, places: Sequence[Place], page_size: int) -> None:
        """Begin with full pages of the prefix cache instead of computing them."""
        for index, (rank, page) in enumerate(places):
            self.places[index] = Place(rank, page)
            self.holding(rank).add_pages([Extent(page, 1)])
            self.holding(rank).tokens += page_size
            self.home = rank
        self.num_computed = len(places) * page_size

    def page_hashes(self, pages: int, page_size: int) -> list[bytes]:
        """The hashes of its first pages, which must be full of known tokens."""
        hashes = self._page_hashes
        while len(hashes) < pages:
            run = Run(len(hashes) * page_size, page_size)
            hashes.append(chain(hashes[-1] if hashes else b"", self.tokens_of(run)))
        return hashes[:pages]

    def tokens_of(self, run: Run) -> list[int]:
        """The token ids at the positions of a run; of the one that is yet to be drawn, UNKNOWN."""
        if run.start == self.num_tokens - 1 and self.output_token_ids:
            return self.output_token_ids[-1:]
        if run.start == self.num_tokens:
            return [UNKNOWN]
        prompt = len(self.prompt_token_ids)
        if run.end <= prompt:
            return self.prompt_token_ids[run.start : run.end]
        return [
            *self.prompt_token_ids[run.start : prompt],
            *self.output_token_ids[max(run.start - prompt, 0) : run.end - prompt],
        ]

    @property
    def is_penalised(self) -> bool:
        """Whether a draw depends on which tokens were drawn before."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    @property
    def goes_on(self) -> bool:
        """Whether it may decode on after its next token, and how is known before that is drawn."""
        return (
            self.finish_reason is None
            and not self.doomed
            and len(self.output_token_ids) + 1 < self.max_tokens
            and not self.is_penalised
        )

    def sampling(self, row: int, position: int) -> Sampling:
        """How to draw the token of a position from one row of a rank's packed batch."""
        params, penalised = self.params, self.is_penalised
        early = position - len(self.prompt_token_ids) < params.min_tokens
        return Sampling(
            request_id=self.request_id,
            row=row,
            seed=self.seed,
            position=position,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            logprobs=params.logprobs,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            prompt_ids=self._distinct_prompt_ids if penalised else (),
            output_counts=dict(self._output_counts) if penalised else {},
            banned_ids=tuple(sorted(self.end_ids)) if early else (),
        )

    def append(self, sampled: Sampled) -> None:
        """Take a drawn token; sets `finish_reason` if it is the last."""
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = self.clock()
        early = len(self.output_token_ids) < self.params.min_tokens
        self.output_token_ids.append(sampled.token_id)
        self.num_tokens += 1
        self._output_counts[sampled.token_id] += 1
        self.metrics.num_generation_tokens += 1
        if sampled.logprobs:
            self.logprobs.append(sampled.logprobs)
        stop_string = self.detokenizer.append(sampled.token_id)
        if stop_string is not None:
            self.finish("stop", stop_string)
        elif sampled.token_id in self.end_ids and not early:
            named = sampled.token_id in (self.params.stop_token_ids or ())
            self.finish("stop", sampled.token_id if named else None)
        elif len(self.output_token_ids) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """End the sequence; text that was held back for a stop string becomes final."""
        if not isinstance(stop_reason, str):
            stop_string = self.detokenizer.finish()
            if stop_string is not None and reason == "length":
                reason, stop_reason = "stop", stop_string
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.metrics.finished_time = self.clock()
