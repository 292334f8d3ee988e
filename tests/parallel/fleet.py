"""A fleet of threads, and requests with their keys spread over it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from longspan.attention.kernel import Kernel, kernel_for
from longspan.attention.reference import masked_attention
from longspan.attention.state import AttentionState
from longspan.parallel.exchange import Exchange, LayerExchange
from longspan.parallel.strategies import STRATEGIES, finish
from longspan.parallel.transport import ThreadTransport, Transport
from longspan.plan import Run, Segment, Shard, Strategy
from longspan.topology import Topology

torch.set_num_threads(1)

CPU_KERNEL = kernel_for(torch.device("cpu"))

SHARED: tuple[Strategy, ...] = ("pass_kv", "gather_kv", "pass_q", "tree")
"""The strategies for keys on several ranks."""

TOPOLOGIES = [(1, 1), (2, 2), (3, 1), (2, 1, 2), (1, 4), (2, 2, 2, 2)]
"""Ranks on each of several hosts."""

Result = TypeVar("Result")
Runs = tuple[Run, ...]


def run_fleet(fleet: int | Topology, work: Callable[[Transport], Result]) -> list[Result]:
    """What `work` returns on each rank, which run at once; or the first error.

    `fleet` is a topology, or the number of ranks of one host.
    """
    topology = Topology.of_hosts([fleet]) if isinstance(fleet, int) else fleet
    transports = ThreadTransport.connect(topology)
    errors: list[BaseException] = []

    def guarded(transport: Transport) -> Result:
        try:
            return work(transport)
        except BaseException as error:
            errors.append(error)
            for each in transports:
                each.stop()
            raise

    with ThreadPoolExecutor(topology.num_ranks) as threads:
        futures = [threads.submit(guarded, transport) for transport in transports]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


@dataclass(frozen=True)
class Shape:
    """Query heads, key/value heads, head size and type of a layer."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Request:
    """New tokens 0 .. new - 1 after `sum(cached)` cached ones, spread over some ranks.

    `cached[i]` tokens lie on `ranks[i]`, which computes the new tokens `queries[i]` and holds the
    keys of the new tokens `keys[i]`.
    """

    ranks: tuple[int, ...]
    cached: tuple[int, ...]
    queries: tuple[Runs, ...]
    keys: tuple[Runs, ...]

    @property
    def num_cached(self) -> int:
        return sum(self.cached)

    @property
    def num_new(self) -> int:
        return sum(run.length for runs in self.queries for run in runs)

    def segment(self, strategy: Strategy) -> Segment:
        shards = zip(self.ranks, self.queries, self.cached, self.keys, strict=True)
        return Segment(
            "request",
            strategy,
            tuple(
                Shard(rank, self._absolute(queries), cached, self._absolute(keys))
                for rank, queries, cached, keys in shards
            ),
        )

    def _absolute(self, runs: Runs) -> Runs:
        return tuple(Run(self.num_cached + run.start, run.length) for run in runs)


@lru_cache(maxsize=64)
def whole(cached: int, new: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """A request on one device: q [new, H, D] and keys with values [cached + new, 2, G, D]."""
    generator = torch.Generator().manual_seed(cached * 10_007 + new)
    q = torch.randn(new, shape.heads, shape.head_dim, generator=generator)
    kv = torch.randn(cached + new, 2, shape.kv_heads, shape.head_dim, generator=generator)
    return q.to(shape.dtype), kv.to(shape.dtype)


@lru_cache(maxsize=64)
def expected(cached: int, new: int, shape: Shape) -> AttentionState:
    """The reference's attention of the new tokens, causal, in float32."""
    q, kv = whole(cached, new, shape)
    visible = torch.arange(cached + new) <= torch.arange(cached, cached + new).unsqueeze(1)
    return masked_attention(q, kv[:, 0], kv[:, 1], visible, scale=shape.scale)


def tokens(runs: Runs) -> list[int]:
    return [token for run in runs for token in range(run.start, run.end)]


def share(request: Request, rank: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """One rank's queries and keys [2, G, S, D] of a request, cached tokens in any order."""
    q, kv = whole(request.num_cached, request.num_new, shape)
    if rank not in request.ranks:
        return q[:0], kv[:0].permute(1, 2, 0, 3)
    place = request.ranks.index(rank)
    generator = torch.Generator().manual_seed(request.num_cached)
    shuffled = torch.randperm(request.num_cached, generator=generator)
    cached = torch.split(shuffled, list(request.cached))[place].tolist()
    new = [request.num_cached + token for token in tokens(request.keys[place])]
    return q[tokens(request.queries[place])], kv[cached + new].permute(1, 2, 0, 3)


def pool_of(shares: Sequence[Tensor], shape: Shape) -> tuple[Tensor, list[list[slice]]]:
    """Shares of several requests in one pool [2, G, N, D], each in two parts, out of order."""
    parts = [part for keys in shares for part in keys.tensor_split([keys.shape[2] // 3], dim=2)]
    places: list[slice] = []
    end = 0
    for part in reversed(parts):
        places.append(slice(end, end + part.shape[2]))
        end = places[-1].stop
    places.reverse()
    nothing = torch.empty(2, shape.kv_heads, 0, shape.head_dim, dtype=shape.dtype)
    pool = torch.cat([*reversed(parts), nothing], dim=2)
    return pool, [places[2 * i : 2 * i + 2] for i in range(len(shares))]


def layer_of(
    requests: Sequence[Request],
    strategy: Strategy,
    transport: Transport,
    shape: Shape,
    kernel: Kernel = CPU_KERNEL,
) -> LayerExchange:
    """The requests as one exchange, seen from one rank."""
    shares = [share(request, transport.rank, shape) for request in requests]
    pool, ranges = pool_of([keys for _, keys in shares], shape)
    segments = [request.segment(strategy) for request in requests]
    return LayerExchange(
        Exchange(segments, transport, ranges),
        queries=[q for q, _ in shares],
        kv=pool,
        kernel=kernel,
        scale=shape.scale,
    )


def attend(
    requests: Sequence[Request],
    strategy: Strategy,
    transport: Transport,
    shape: Shape,
    kernel: Kernel = CPU_KERNEL,
) -> list[AttentionState]:
    """Attention of one rank's queries of each request; a rank without a share stays away."""
    layer = layer_of(requests, strategy, transport, shape, kernel)
    if transport.rank not in layer.exchange.ranks:
        return layer.own_states()[1] if layer.queries else []
    return finish(STRATEGIES[strategy](layer))


def assert_close(
    actual: AttentionState, expected: AttentionState, dtype: torch.dtype = torch.float32
) -> None:
    """States of inputs of a dtype are the same in float32. But for this: where the CPU multiplies
    pairs of bfloat16, weights are rounded to it, half a unit in the last place (`test_native.py`);
    values are about 1."""
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    atol = 2e-6
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        atol += 2**-8 * max(float(expected.out.abs().max()), 1.0) if len(expected.out) else 0.0
    torch.testing.assert_close(actual.out, expected.out, atol=atol, rtol=1e-5)
    torch.testing.assert_close(actual.lse, expected.lse, atol=2e-6, rtol=1e-5)


def assert_expected(request: Request, states: Sequence[AttentionState], shape: Shape) -> None:
    """Every rank's state of its queries (`states[rank]`) is what one device would compute."""
    one_device = expected(request.num_cached, request.num_new, shape)
    for rank, queries in zip(request.ranks, request.queries, strict=True):
        rows = tokens(queries)
        of_rank = AttentionState(one_device.out[rows], one_device.lse[rows])
        assert_close(states[rank], of_rank, shape.dtype)


topologies = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(Topology.of_hosts)


def rank_sets(size: int) -> st.SearchStrategy[list[int]]:
    """Some of so many ranks, in any order."""
    return st.lists(st.integers(0, size - 1), unique=True, min_size=1)


@st.composite
def cuts(draw: st.DrawFn, new: int, parts: int) -> tuple[Runs, ...]:
    """Tokens 0 .. new - 1 in pieces of any size, each given to any of the parts."""
    runs: list[list[Run]] = [[] for _ in range(parts)]
    start = 0
    while start < new:
        piece = Run(start, draw(st.integers(1, new - start)))
        runs[draw(st.integers(0, parts - 1))].append(piece)
        start = piece.end
    return tuple(map(tuple, runs))


@st.composite
def requests(draw: st.DrawFn, rank_sets: st.SearchStrategy[list[int]]) -> Request:
    """Cached tokens and new ones on some of the ranks, cut in any way."""
    ranks = draw(rank_sets)
    lengths = st.one_of(st.just(0), st.integers(0, 12))
    cached = draw(st.lists(lengths, min_size=len(ranks), max_size=len(ranks)))
    new = draw(st.integers(1, 20))
    queries = draw(cuts(new, len(ranks)))
    keys = draw(st.one_of(st.just(queries), cuts(new, len(ranks))))
    return Request(tuple(ranks), tuple(cached), queries, keys)
