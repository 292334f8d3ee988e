"""One step on one rank: the attention of its packed tokens, layer by layer, over all ranks' KV."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.kernel import Kernel
from longspan.attention.state import AttentionState
from longspan.attention.work import Share, Work
from longspan.parallel.exchange import Exchange, LayerExchange
from longspan.parallel.strategies import STRATEGIES, finish
from longspan.parallel.tiles import tiles
from longspan.parallel.transport import Transport
from longspan.plan import RankPlan, Segment
from longspan.worker.kv_pool import KVPool


@dataclass(frozen=True)
class _Piece:
    """A segment with this rank's rows of the packed queries and ranges of the pool."""

    segment: Segment
    rows: slice
    ranges: list[slice]


class _Attention:
    """What there is to do for some pieces in a layer, worked out once.

    A strategy's segments travel together. pass-KV has a ring for each set of ranks; the others
    send each pair of ranks one message. All ranks start the exchanges in the same order, which
    comes from the plan alone.
    """

    def __init__(self, pieces: Sequence[_Piece], transport: Transport) -> None:
        local: list[Share] = []
        shared: dict[tuple[str, tuple[int, ...]], list[_Piece]] = {}
        for piece in pieces:
            segment = piece.segment
            if segment.strategy == "local":
                shard = segment.shard(transport.rank)
                local.append(Share(piece.rows.start, tiles(shard, shard), piece.ranges))
            else:
                ranks = tuple(shard.rank for shard in segment.shards)
                key = (segment.strategy, ranks if segment.strategy == "pass_kv" else ())
                shared.setdefault(key, []).append(piece)
        self.shared = [
            (strategy, _exchange(group, transport), group)
            for (strategy, _), group in sorted(shared.items(), key=lambda item: item[0])
        ]
        self.local = Work(local)


class Step:
    """Everything about one step that doesn't depend on the layer, worked out once.

    The last layer attends only for rows after which a token is drawn: nobody uses the output of
    the others, only their keys.
    """

    def __init__(
        self, plan: RankPlan, pool: KVPool, transport: Transport, kernel: Kernel, scale: list[float]
    ) -> None:
        self.pool = pool
        self.kernel = kernel
        self.scale = scale
        device = pool.data.device
        self.token_ids = torch.tensor(plan.token_ids, dtype=torch.int64, device=device)
        pieces, positions, slots = self._lay_out(plan, transport.rank)
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self.slots = torch.cat(slots) if slots else self.token_ids
        self._inner = self._last = _Attention(pieces, transport)
        self._drawn: Tensor | None = None
        drawing, rows = _in_last_layer(pieces, transport.rank)
        if [piece.segment for piece in drawing] != [piece.segment for piece in pieces]:
            self._last = _Attention(drawing, transport)
            self._drawn = torch.tensor(rows, dtype=torch.int64, device=device)

    def _lay_out(self, plan: RankPlan, rank: int) -> tuple[list[_Piece], list[int], list[Tensor]]:
        pieces: list[_Piece] = []
        positions: list[int] = []
        slots: list[Tensor] = []
        for part in plan.parts:
            segment, extents = part.segment, part.extents
            shard = segment.shard(rank)
            rows = slice(len(positions), len(positions) + shard.num_queries)
            pieces.append(_Piece(segment, rows, self.pool.ranges(extents, 0, shard.num_keys)))
            for run in shard.queries:
                positions += range(run.start, run.end)
            if shard.num_queries:
                slots.append(self.pool.slots(extents, shard.cached, shard.num_keys))
        return pieces, positions, slots

    def rows(self, layer: int) -> Tensor | None:
        """The rows of the packed batch, ascending, whose attention a layer needs; None for all."""
        return self._drawn if layer == len(self.pool.data) - 1 else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's new tokens over their requests' keys everywhere.

        q [U, H, D] is of the layer's `rows`, k and v [T, G, D] are of all, and first written into
        the pool. The first messages leave before local attention begins, so that it hides them.
        Returns [U, H, D] in float32. T may be 0: other ranks need this one's keys all the same.
        """
        self.pool.write(layer, self.slots, k, v)
        attention = self._inner if self.rows(layer) is None else self._last
        state = AttentionState.empty(q.shape[0], q.shape[1], q.shape[2], q.device)
        kv = self.pool.data[layer]
        jobs = []
        for strategy, exchange, pieces in attention.shared:
            job = STRATEGIES[strategy](
                LayerExchange(
                    exchange,
                    queries=[q[piece.rows] for piece in pieces],
                    kv=kv,
                    kernel=self.kernel,
                    scale=self.scale[layer],
                )
            )
            next(job)
            jobs.append((job, pieces))
        self.kernel(state, q, kv, attention.local, scale=self.scale[layer])
        for job, pieces in jobs:
            _place(state, pieces, finish(job))
        return state.out


def _in_last_layer(pieces: Sequence[_Piece], rank: int) -> tuple[list[_Piece], list[int]]:
    """The pieces that draw tokens, and the rows after which this rank draws them."""
    drawing: list[_Piece] = []
    drawn: list[int] = []
    for segment, rows, ranges in ((p.segment.in_last_layer(), p.rows, p.ranges) for p in pieces):
        first = len(drawn)
        if segment.shard(rank).num_queries:
            drawn.append(rows.stop - 1)
        if segment.draws:
            drawing.append(_Piece(segment, slice(first, len(drawn)), ranges))
    return drawing, drawn


def _exchange(pieces: Sequence[_Piece], transport: Transport) -> Exchange:
    return Exchange([p.segment for p in pieces], transport, [p.ranges for p in pieces])


def _place(
    state: AttentionState, pieces: Sequence[_Piece], states: Sequence[AttentionState]
) -> None:
    for piece, own in zip(pieces, states, strict=True):
        state.out[piece.rows] = own.out
