"""A step that several ranks compute together: all of its tokens, each rank over its own keys."""

import torch
from torch import Tensor

from longspan.attention.kernel import Kernel
from longspan.attention.state import AttentionState
from longspan.attention.work import Share, Tile, Work
from longspan.plan import RankPlan
from longspan.worker.kv_pool import KVPool
from longspan.worker.meeting import Meeting


class JointStep:
    """Like `Step`, of one token of each part; but its attention is not merged with the others'.

    That, and all else of a layer after attention, is done where the ranks meet.
    """

    def __init__(
        self,
        plan: RankPlan,
        pool: KVPool,
        kernel: Kernel,
        scale: list[float],
        rank: int,
        meeting: Meeting,
    ) -> None:
        self.meeting = meeting
        self.pool = pool
        self.kernel = kernel
        self.scale = scale
        self.token_ids = torch.tensor(plan.token_ids, dtype=torch.int64)
        positions: list[int] = []
        slots: list[Tensor] = []
        shares: list[Share] = []
        self._own: list[int] = []
        for row, part in enumerate(plan.parts):
            positions += (run.start for s in part.segment.shards for run in s.queries)
            shard = part.segment.shard(rank)
            if shard.num_queries:
                self._own.append(row)
                slots.append(pool.slots(part.extents, shard.cached, shard.num_keys))
            if keys := shard.num_keys:
                tile = Tile(slice(0, 1), slice(0, keys), causal=False)
                shares.append(Share(row, [tile], pool.ranges(part.extents, 0, keys)))
        self.positions = torch.tensor(positions, dtype=torch.int64)
        self._slots = torch.cat(slots) if slots else None
        self._work = Work(shares)

    def rows(self, layer: int) -> None:
        """A token is drawn after every row."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
        """Attention of all tokens q [T, H, D] over this rank's keys.

        Of k, v [T, G, D] it first writes those into the pool that belong here.
        """
        if self._slots is not None:
            if len(self._own) < len(k):
                k, v = k[self._own], v[self._own]
            self.pool.write(layer, self._slots, k, v)
        state = AttentionState.empty(q.shape[0], q.shape[1], q.shape[2], q.device)
        self.kernel(state, q, self.pool.data[layer], self._work, scale=self.scale[layer])
        return state
