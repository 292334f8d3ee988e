"""A rank measures what it does, while all others do the same: steps, attention, messages."""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch

from longspan.attention.kv_format import encode
from longspan.attention.state import AttentionState
from longspan.attention.work import Share, Tile, Work
from longspan.cost.samples import (
    AttentionSample,
    MessageKind,
    MessageSample,
    OverlapSample,
    Samples,
    StepSample,
)
from longspan.plan import Extent, Part, RankPlan, Run, Sampling, Segment, Shard
from longspan.topology import Link
from longspan.worker.model_runner import ModelRunner

STEP_TOKENS = (1, 32, 256)
READ_KEYS = (16, 1024, 16_384)
"""Keys that one query sees."""
COMPUTED = ((128, 1024), (512, 4096))
"""Queries, and keys that all of them see."""
MESSAGE_BYTES = (1024, 64 * 2**10, 2**20, 8 * 2**20)
"""To each rank."""
FEW_MESSAGE_BYTES = (1024, 256 * 2**10)
"""At the start of an engine, which shall not wait for this."""
REPEATS, REPEATS_OF_SMALL = 7, 31
"""The latency of messages scatters most."""
MAX_SECONDS = 1.0
"""What takes longer without other ranks is measured less often."""


@torch.inference_mode()
def measure(runner: ModelRunner) -> Samples:
    """Measure a rank's device and links; every rank of the fleet must do so at the same time.

    The pool's first pages are written: nothing may be in them.
    """
    return _Measurement(runner).run()


@torch.inference_mode()
def measure_links(runner: ModelRunner) -> tuple[MessageSample, ...]:
    """Measure a rank's links only, in a few dozen messages; every rank at the same time."""
    return tuple(_Measurement(runner).messages(FEW_MESSAGE_BYTES, REPEATS))


class _Measurement:
    """All ranks go through the same exchanges in the same order, each with its own partners."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.transport = runner.transport
        self.rank, topology = runner.transport.rank, runner.transport.topology
        everyone = range(topology.num_ranks)
        host = topology.hosts[self.rank]
        self.others = [rank for rank in everyone if rank != self.rank]
        self.beside = [rank for rank in everyone if topology.hosts[rank] == host]
        """The ranks of this host."""
        self.scattered = sorted(
            everyone, key=lambda rank: (rank - topology.hosts.index(topology.hosts[rank]), rank)
        )
        """All ranks, the next one on another host as often as can be."""

    def run(self) -> Samples:
        steps = [self._step(tokens) for tokens in STEP_TOKENS if self._fits(tokens)]
        shapes = [*((1, keys) for keys in READ_KEYS), *COMPUTED]
        attention = [self._attention(queries, keys) for queries, keys in shapes]
        messages = self.messages(MESSAGE_BYTES, REPEATS_OF_SMALL)
        overlaps = [one for links in self._kinds_of_links() for one in self._overlap(links)]
        self.transport.take_traffic()
        return Samples(tuple(steps), tuple(attention), tuple(messages), tuple(overlaps))

    def messages(self, sizes: Sequence[int], repeats_of_small: int) -> list[MessageSample]:
        """Messages of so many bytes to the next rank and to all, over each kind of link."""
        found: list[MessageSample] = []
        for links in self._kinds_of_links():
            sending, receiving = self._next(links)
            peers = [rank for rank in self.others if self._link(rank) in links]
            for size in sizes:
                repeats = repeats_of_small if size <= 2**16 else REPEATS
                found += self._messages("hop", size, sending, receiving, repeats)
                found += self._messages("all_to_all", size, peers, peers, repeats)
        self.transport.take_traffic()
        return found

    def _kinds_of_links(self) -> Iterator[tuple[Link, ...]]:
        """Those inside hosts and those between them, if there are any in the fleet."""
        topology = self.transport.topology
        if topology.num_ranks > topology.num_hosts:
            yield "device", "host"
        if topology.num_hosts > 1:
            yield ("network",)

    def _link(self, rank: int) -> Link:
        return self.transport.topology.link(self.rank, rank)

    def _next(self, links: Sequence[Link]) -> tuple[list[int], list[int]]:
        """Whom this rank sends to in a ring and whom it receives from, over such links only."""
        ring = self.scattered if "network" in links else self.beside
        place = ring.index(self.rank)
        after, before = ring[(place + 1) % len(ring)], ring[place - 1]
        sending, receiving = (
            [peer] if peer != self.rank and self._link(peer) in links else []
            for peer in (after, before)
        )
        return sending, receiving

    def _fits(self, tokens: int) -> bool:
        pool = self.runner.pool
        return tokens <= min(pool.num_pages * pool.page_size, self.runner.spec.max_model_len - 1)

    def _step(self, tokens: int) -> StepSample:
        """A step of a request on this rank alone, whose last token draws one."""
        runs = (Run(0, tokens),)
        segment = Segment("measure", "local", (Shard(self.rank, runs, 0, runs),))
        pages = Extent(0, -(-tokens // self.runner.pool.page_size))
        sampling = Sampling("measure", tokens - 1, seed=0, position=tokens, temperature=0.0)
        plan = RankPlan((0,) * tokens, (Part(segment, (pages,)),), (sampling,))
        return StepSample(tokens, self._seconds(lambda: self.runner.execute(plan)))

    def _attention(self, queries: int, keys: int) -> AttentionSample:
        return AttentionSample(queries, keys, self._seconds(self._attending(queries, keys)))

    def _attending(self, queries: int, keys: int) -> Callable[[], None]:
        """Work that attends with random queries to random keys, as a step does."""
        runner, spec = self.runner, self.runner.spec
        like = torch.empty(0, dtype=runner.dtype, device=runner.device)
        q = like.new_empty(queries, spec.num_heads, spec.head_dim).normal_()
        block = like.new_empty(2, spec.num_kv_heads, keys, spec.head_dim).normal_()
        block = encode(block, runner.pool.data.dtype)
        tile = Tile(slice(0, queries), slice(0, keys), causal=False)
        work = Work([Share(0, [tile], [slice(0, keys)])])
        state = AttentionState.empty(queries, spec.num_heads, spec.head_dim, runner.device)
        return lambda: runner.kernel(state, q, block, work, scale=runner.scale[0])

    def _messages(
        self,
        kind: MessageKind,
        size: int,
        sending: Sequence[int],
        receiving: Sequence[int],
        repeats: int,
    ) -> list[MessageSample]:
        """So many bytes to each of some ranks and from each of some; nothing if it sends none."""
        seconds = self._together(self._exchanging(size, sending, receiving), repeats=repeats)
        if not sending or (kind == "all_to_all" and len(sending) == 1):  # which is a hop
            return []
        return [MessageSample(kind, self._link(sending[0]), size * len(sending), seconds)]

    def _exchanging(
        self, size: int, sending: Sequence[int], receiving: Sequence[int]
    ) -> Callable[[], Callable[[], None]]:
        """Work that starts an exchange and returns what waits for it."""
        sent = torch.zeros(size, dtype=torch.uint8, device=self.runner.device)
        sends = [(peer, sent) for peer in sending]
        receives = [(peer, torch.empty_like(sent)) for peer in receiving]
        return lambda: self.transport.exchange("measure", sends, receives)

    def _overlap(self, links: Sequence[Link]) -> list[OverlapSample]:
        """The largest message, attention that takes about as long, and both at once."""
        sending, receiving = self._next(links)
        exchanging = self._exchanging(MESSAGE_BYTES[-1], sending, receiving)
        attending = self._attending(*COMPUTED[0])
        message = self._together(exchanging)
        alone = self._together(lambda: lambda: None, attending)
        times = max(round(message / alone), 1)

        def attend_so_long() -> None:
            for _ in range(times):
                attending()

        attention = self._together(lambda: lambda: None, attend_so_long)
        both = self._together(exchanging, attend_so_long)
        if not sending:
            return []
        return [OverlapSample(self._link(sending[0]), message, attention, both)]

    def _together(
        self,
        exchanging: Callable[[], Callable[[], None]],
        meanwhile: Callable[[], None] = lambda: None,
        repeats: int = REPEATS,
    ) -> float:
        """Median seconds of an exchange that all ranks begin at once, with work beside it."""
        seconds = []
        for _ in range(repeats):
            self._meet()
            begun = time.perf_counter()
            wait = exchanging()
            meanwhile()
            wait()
            self._synchronize()
            seconds.append(time.perf_counter() - begun)
        return median(seconds[1:])

    def _seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of work that needs no other rank; all begin about the same time."""
        seconds: list[float] = []
        work()
        while len(seconds) < REPEATS and sum(seconds) < MAX_SECONDS:
            self._synchronize()
            begun = time.perf_counter()
            work()
            self._synchronize()
            seconds.append(time.perf_counter() - begun)
        return median(seconds)

    def _meet(self) -> None:
        """Wait until all ranks are here."""
        self._exchanging(1, self.others, self.others)()()
        self._synchronize()

    def _synchronize(self) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
