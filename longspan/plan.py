"""The nouns that travel between the engine and its ranks. Plain data, no tensors.

A *step* runs a few new tokens of several requests, each request's tokens on one or more ranks.
A plan tells one rank what it computes in one step, and which shares the other ranks hold of the
requests that it has a part in, so that every rank takes every branch alike.
"""

from typing import Literal

import msgspec

Strategy = Literal["local", "pass_kv", "gather_kv", "pass_q", "tree"]


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Consecutive positions `start .. start + length - 1` of one request."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Extent(Run, frozen=True, array_like=True, gc=False):
    """Consecutive pages `start .. start + length - 1` of one rank's pool."""


class Shard(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rank's share of one request in one step.

    `queries` are the positions whose queries the rank computes. The rank's keys and values are
    `cached` tokens that precede every query of the step, followed by `keys`; positions ascend.
    """

    rank: int
    queries: tuple[Run, ...]
    cached: int
    keys: tuple[Run, ...]

    @property
    def num_queries(self) -> int:
        return sum(run.length for run in self.queries)

    @property
    def num_keys(self) -> int:
        return self.cached + sum(run.length for run in self.keys)


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request in one step: how its attention is shared, and every rank's share of it.

    If it `draws`, the output of its last query is used; of all others only the keys are.
    """

    request_id: str
    strategy: Strategy
    shards: tuple[Shard, ...]
    draws: bool = True

    def shard(self, rank: int) -> Shard:
        """The share of one rank; an empty one if it has none."""
        for shard in self.shards:
            if shard.rank == rank:
                return shard
        return Shard(rank, (), 0, ())

    def in_last_layer(self) -> "Segment":
        """The same without the queries whose output in the model's last layer nobody uses."""
        runs = [run for shard in self.shards for run in shard.queries]
        last = max(run.end for run in runs) - 1
        if self.draws and len(runs) == runs[0].length == 1:
            return self
        drawn = (Run(last, 1),) if self.draws else ()
        shards = tuple(
            Shard(
                shard.rank,
                drawn if any(run.start <= last < run.end for run in shard.queries) else (),
                shard.cached,
                shard.keys,
            )
            for shard in self.shards
        )
        return Segment(self.request_id, self.strategy, shards, self.draws)


class Sampling(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """How to draw the token that follows one row of a rank's packed batch.

    `position` is the position that the drawn token will have; with `seed` it fixes the random
    draw. `output_counts` and `prompt_ids` are filled only where penalties are asked for,
    `banned_ids` only while `min_tokens` forbids the end.
    """

    request_id: str
    row: int
    seed: int
    position: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_ids: tuple[int, ...] = ()
    output_counts: dict[int, int] = {}
    banned_ids: tuple[int, ...] = ()


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A segment as one rank sees it: with the pages that hold the rank's own keys, in order.

    The rank's queries of all its parts, in the parts' order, are its packed batch.
    """

    segment: Segment
    extents: tuple[Extent, ...]


class Move(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Full pages of one request whose keys and values one rank copies into another's pool.

    Page by page, `sources` on rank `source` become `targets` on rank `target`, in all layers. They
    travel while the step computes: nothing reads `targets` or writes `sources` in the same step.
    """

    source: int
    target: int
    sources: tuple[Extent, ...]
    targets: tuple[Extent, ...]


UNKNOWN = -1
"""In a plan's `token_ids`: what is drawn for that request in the step before."""

MOST_JOINT_ROWS = 32
"""More rows of a step are not computed jointly."""


class Joint(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Ranks that compute all tokens of a step together, each a part of every linear layer.

    Each of them has all of the step's tokens in its packed batch, one of each part, whoever has
    the key. `number` is larger than that of any joint step before.
    """

    ranks: tuple[int, ...]
    number: int


class RankPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one rank does in one step. `token_ids` are its packed batch, in its parts' order.

    They are all known, or all `UNKNOWN` in a plan that was made before the last one was done.
    `moves` are those that it sends or receives; every rank has them in the same order.
    """

    token_ids: tuple[int, ...]
    parts: tuple[Part, ...]
    samplings: tuple[Sampling, ...]
    moves: tuple[Move, ...] = ()
    joint: Joint | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    token_id: int
    logprob: float
    rank: int


class Sampled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The token drawn for one request, the drawn token's logprob first if they were asked for."""

    request_id: str
    token_id: int
    logprobs: tuple[TokenLogprob, ...] = ()


class Traffic(msgspec.Struct, array_like=True, gc=False):
    """Messages sent to other ranks and their bytes; `far_bytes` are those to other hosts."""

    calls: int = 0
    messages: int = 0
    bytes: int = 0
    far_bytes: int = 0


class RankResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one rank gives back: drawn tokens, and what it sent for each strategy."""

    sampled: tuple[Sampled, ...]
    traffic: dict[str, Traffic]
