"""How long a step takes: sums of a few rates of a rank's device and its links. Pure Python.

Nothing is assumed to overlap, and nothing to wait for other ranks: a rank's part of a step is its
fixed cost, its tokens through the layers, its attention, and what it sends, one after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple, Self

from longspan.cost.strategy import KVShape, choose, num_calls, seen_keys, sent_bytes
from longspan.plan import Segment, Shard, Strategy
from longspan.topology import Topology

if TYPE_CHECKING:
    from longspan.models import ModelSpec


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank's device and its links do.

    `step_seconds` is a step's fixed cost (plan, launches), `link_seconds` the latency of one
    exchange. All others are per second: floating point operations in linear layers and in
    attention, bytes of weights or KV that are read, bytes that are sent to other ranks.
    """

    step_seconds: float
    linear_flops: float
    attention_flops: float
    memory_bytes: float
    link_seconds: float
    link_bytes: float

    def of_threads(self, threads: int) -> Self:
        """A device that computes and reads with so many threads; its links stay what they are."""
        return replace(
            self,
            linear_flops=self.linear_flops * threads,
            attention_flops=self.attention_flops * threads,
            memory_bytes=self.memory_bytes * threads,
        )


CPU_THREAD = Rates(
    step_seconds=2e-3,
    linear_flops=90e9,
    attention_flops=90e9,
    memory_bytes=12e9,
    link_seconds=110e-6,
    link_bytes=2.4e9,
)
"""One thread of a server CPU, measured in float32 on 2 cores of an AMD EPYC (AVX-512).

Linear layers of 512 to 1536 numbers: 93e9 flops/s for 512 tokens, 77e9 for 64. Attention (8 query
heads, 2 KV heads, size 64) of 512 tokens over 8192 cached ones: 90e9; among 512 new ones, of which
half is masked: 44e9. One token's attention reads 32768 tokens' KV at 11e9 bytes/s, its linear
layers weights at 15e9 to 21e9. An exchange between two processes over gloo takes 100 to 160 us,
and 1 MiB or more each way 2.0e9 to 2.6e9 bytes/s. A step of one token through a model of tiny
layers takes 0.85 ms with 3 of them and 2.7 ms with 12.
"""

CUDA = Rates(
    step_seconds=5e-3,
    linear_flops=500e12,
    attention_flops=500e12,
    memory_bytes=2.8e12,
    link_seconds=20e-6,
    link_bytes=300e9,
)
"""One datacentre GPU of NVIDIA's Hopper generation in bfloat16, its links NVLink. Guesses.

Flops are those that arXiv 2411.01783 reports for an H100 in long prefills, 502e12 a second of all
and 540e12 of attention alone. Memory and links reach 80 % and 65 % of the vendor's 3.35e12 and
450e9 bytes/s; latency is that of a small NCCL collective in one server. A step of an uncompiled
model of some 30 layers is a thousand launches of about 5 us.
"""


class _Curve(NamedTuple):
    """Seconds `(square * n + slope) * n + start` for n tokens; no coefficient is negative."""

    square: float
    slope: float
    start: float

    def at(self, tokens: float) -> float:
        return (self.square * tokens + self.slope) * tokens + self.start

    def inverse(self, seconds: float) -> float:
        """Tokens that take so long; less than 0 if `start` alone takes longer."""
        rest = seconds - self.start
        if rest <= 0:
            return rest
        # This form of the root is exact too where `square` is 0 or almost.
        return 2 * rest / (self.slope + sqrt(self.slope * self.slope + 4 * self.square * rest))


class _Part:
    """What a rank has to do in a step, as far as it has been counted."""

    __slots__ = ("calls", "seconds", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.calls: dict[tuple[Strategy, tuple[int, ...]], int] = {}


class CostModel:
    """Seconds of steps, chunks, decode tokens and moves of one model on equal ranks.

    For H query heads of size D, L layers and W active parameters: a token takes
    `2 W / linear_flops`; attention whichever is longer of `4 H D L / attention_flops` for each
    query that sees a key and `L key_bytes / memory_bytes` for each key that is read.
    """

    def __init__(self, shape: KVShape, num_active_parameters: int, rates: Rates) -> None:
        self.shape = shape
        self.rates = rates
        layers = shape.num_layers
        weights = num_active_parameters * shape.itemsize / rates.memory_bytes
        self._base = rates.step_seconds + weights
        self._token = 2 * num_active_parameters / rates.linear_flops
        self._pair = 4 * shape.num_heads * shape.head_dim * layers / rates.attention_flops
        self._key = layers * shape.key_bytes / rates.memory_bytes
        self._seen = max(self._pair, self._key)  # one query's attention over one key
        self._call = layers * rates.link_seconds
        self._sent_byte = layers / rates.link_bytes
        self._sent_key = shape.key_bytes * self._sent_byte
        self._sent_query = shape.query_bytes * self._sent_byte

    @classmethod
    def of(cls, spec: "ModelSpec", rates: Rates) -> Self:
        return cls(KVShape.of(spec), spec.num_active_parameters, rates)

    @property
    def base_seconds(self) -> float:
        """What a step takes before its first token: its fixed cost, and all weights read once."""
        return self._base

    def step_seconds(self, segments: Iterable[Segment]) -> dict[int, float]:
        """Each rank's part of a step: everything in which it has a share.

        Segments of one strategy travel together, so their latency is counted once, for pass-KV
        once for each ring. A rank that only holds keys of others' queries reads no weights. Shards
        are as the engine plans them: see `sent_bytes` and `seen_keys`.
        """
        parts: dict[int, _Part] = {}
        for segment in segments:
            shards = segment.shards
            if len(shards) == 1 and shards[0].num_queries == 1:  # most by far
                part = parts.get(shards[0].rank) or parts.setdefault(shards[0].rank, _Part())
                part.tokens += 1
                part.seconds += self._seen * (shards[0].cached + 1)
            else:
                self._count(segment, parts)
        return {
            rank: (self._base if part.tokens else self.rates.step_seconds)
            + self._token * part.tokens
            + part.seconds
            + self._call * sum(part.calls.values())
            for rank, part in parts.items()
        }

    def _count(self, segment: Segment, parts: dict[int, _Part]) -> None:
        shards, strategy = segment.shards, segment.strategy
        ring = tuple(shard.rank for shard in shards)
        key = strategy, ring if strategy == "pass_kv" else ()
        one_host = Topology.of_hosts([1 + ring[-1]])
        calls = num_calls(strategy, ring, one_host).near
        seen = seen_keys(strategy, shards)
        sent = sent_bytes(strategy, shards, self.shape, one_host)
        for shard, (pairs, keys), out in zip(shards, seen, sent, strict=True):
            part = parts.get(shard.rank) or parts.setdefault(shard.rank, _Part())
            part.tokens += shard.num_queries
            part.seconds += max(self._pair * pairs, self._key * keys) + self._sent_byte * out.near
            if calls:
                part.calls[key] = calls

    def prefill_seconds(self, new: int, cached: int, degree: int) -> float:
        """What a chunk balanced over `degree` ranks adds to the step of each, in seconds.

        `new` tokens after `cached` ones: `new / degree` of the linear layers,
        `new * cached + new * (new + 1) / 2` pairs shared alike, and the exchange of pass-KV or
        pass-Q, whichever is faster: so more tokens never take less time.
        """
        if new < 1:
            return 0.0
        return min(
            max(curve.at(new) for curve in curves) for curves in self._curves(cached, degree)
        )

    def tokens_within(self, seconds: float, cached: int, degree: int) -> int:
        """The most new tokens whose `prefill_seconds` are no more than `seconds`."""
        most = max(
            min(curve.inverse(seconds) for curve in curves)
            for curves in self._curves(cached, degree)
        )
        tokens = max(int(most), 0)
        # The root is rounded.
        if tokens and self.prefill_seconds(tokens, cached, degree) > seconds:
            return tokens - 1
        if self.prefill_seconds(tokens + 1, cached, degree) <= seconds:
            return tokens + 1
        return tokens

    def _curves(self, cached: int, degree: int) -> list[tuple[_Curve, _Curve]]:
        """Seconds of a chunk with each strategy: the higher of computing and of reading keys."""
        token, key = self._token / degree, self._key
        square = self._pair / (2 * degree)
        pairs = token + square * (2 * cached + 1)
        if degree == 1:
            return [(_Curve(square, pairs, 0.0), _Curve(0.0, token + key, key * cached))]
        one_host = Topology.of_hosts([degree])
        calls = self._call * num_calls("pass_kv", range(degree), one_host).near
        sent = self._sent_key * (degree - 1) / degree
        pass_kv = (
            _Curve(square, pairs + sent, calls + sent * cached),
            _Curve(0.0, token + key + sent, calls + (key + sent) * cached),
        )
        calls = self._call * num_calls("pass_q", range(degree), one_host).near
        sent, key = self._sent_query * (degree - 1) / degree, key / degree
        pass_q = (
            _Curve(square, pairs + sent, calls),
            _Curve(0.0, token + key + sent, calls + key * cached),
        )
        return [pass_kv, pass_q]

    def decode_seconds(self, keys: Sequence[int]) -> float:
        """What one decode token adds, with so many keys of its request on each holder.

        On one holder that is all; else the slowest holder's attention, and in every layer a pass-Q
        exchange with each of the others.
        """
        seconds = self._token + self._seen * max(keys)
        if len(keys) == 1:
            return seconds
        return seconds + 2 * self._call + self._sent_query * (len(keys) - 1)

    def move_seconds(self, tokens: int) -> float:
        """Copying so many tokens' keys and values of all layers to another rank, in one message."""
        if tokens < 1:
            return 0.0
        return self.rates.link_seconds + self.shape.token_bytes * tokens / self.rates.link_bytes

    def strategy(self, shards: Sequence[Shard]) -> Strategy:
        return choose(shards, self.shape)
