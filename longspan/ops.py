"""Attention states and context-parallel attention for your own model, without the engine.

    state = context_parallel_attention(q, k, v, group=group, strategy="pass_kv")
    out = state.out.to(q.dtype)

Layouts are token-first: queries [T, H, D] of T tokens, H heads and head size D; keys and values
[S, G, D] of S tokens and G heads, H a multiple of G. For inference: no gradient crosses ranks.
On CUDA the kernel is written in Triton; elsewhere off the CPU it is the reference, which keeps all
T x H x S scores in memory.
"""

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.kernel import kernel_for
from longspan.attention.state import AttentionState, merge
from longspan.attention.work import Share, Work
from longspan.parallel.exchange import Exchange, LayerExchange
from longspan.parallel.strategies import STRATEGIES, finish
from longspan.parallel.tiles import tiles
from longspan.parallel.transport import TorchTransport
from longspan.plan import Run, Segment, Shard

Strategy = Literal["pass_kv", "gather_kv", "pass_q"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["AttentionState", "attention", "context_parallel_attention", "merge"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
) -> AttentionState:
    """Attention of q [T, H, D] over k, v [S, G, D] on one device, as a float32 state.

    With `causal`, a query sees the keys whose position is at most its own; positions are integer
    tensors [T] and [S], by default the keys are 0 .. S-1 and the queries the last T of them.
    Without, they don't matter. Meant for contiguous or zigzag positions: the work grows with the
    number of runs of consecutive ones. `scale` is `D ** -0.5` by default.

    Raises:
        ValueError: shapes, types or positions don't fit together; the message names them.
    """
    _check(q, k, v, q_positions, kv_positions)
    if q_positions is None:
        q_positions = torch.arange(len(k) - len(q), len(k))
    if kv_positions is None:
        kv_positions = torch.arange(len(k))
    kv, kv_positions = _ascending(k, v, kv_positions)
    _check_once(kv_positions)
    shard = _shard(0, q_positions.tolist(), kv_positions.tolist(), causal)
    state = AttentionState.empty(len(q), q.shape[1], q.shape[2], q.device)
    work = Work([Share(0, tiles(shard, shard), [slice(0, len(k))])])
    kernel_for(q.device)(state, q, kv, work, scale=_scale(scale, q))
    return state


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    strategy: Strategy = "pass_kv",
    causal: bool = True,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    scale: float | None = None,
) -> AttentionState:
    """Attention of this rank's q [T, H, D] over the keys of all ranks of a process group.

    Every rank calls it with its own share of the sequence, k and v [S, G, D]; any of T and S may
    differ from rank to rank and be 0. Positions say where in the sequence the share lies; by
    default the keys follow each other in rank order, and so do the queries, which are the last
    tokens of all. Returns this rank's queries' state over
    all keys, in float32; cast `.out` to your model's type.

    `strategy` says what travels: `pass_kv` keys and values round a ring, `gather_kv` the same all
    at once, `pass_q` queries there and partial states back (arXiv 2310.01889, 2411.01783).
    Two small collectives come first in which the ranks tell each other sizes and positions.

    Raises:
        ValueError: shapes, types, positions or strategy don't fit, on this rank or another, or
            ranks differ in them; the message names them. Every rank of the group raises.
    """
    sizes = _agree(q, k, v, q_positions, kv_positions, strategy, causal, group)
    transport = TorchTransport(group)
    before_q, before_k = sizes[: transport.rank].sum(0).tolist()
    total_q, total_k = sizes.sum(0).tolist()
    if q_positions is None:
        q_positions = torch.arange(len(q)) + total_k - total_q + before_q
    if kv_positions is None:
        kv_positions = torch.arange(len(k)) + before_k
    kv, kv_positions = _ascending(k, v, kv_positions)
    shards = _gather_shards(q_positions, kv_positions, sizes, causal, q.device, group)
    layer = LayerExchange(
        Exchange([Segment("", strategy, shards)], transport, [[slice(0, len(k))]]),
        queries=[q],
        kv=kv,
        kernel=kernel_for(q.device),
        scale=_scale(scale, q),
    )
    (state,) = finish(STRATEGIES[strategy](layer))
    return state


def _scale(scale: float | None, q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor | None, kv_positions: Tensor | None
) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"q {list(q.shape)} must be [T, H, D], k {list(k.shape)} and v {list(v.shape)} alike "
            "[S, G, D]"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)} does not fit k {list(k.shape)}: query heads must be a multiple of "
            "key heads, and head sizes alike"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _TYPES:
        raise ValueError(
            f"q ({q.dtype}), k ({k.dtype}) and v ({v.dtype}) must be of one type of {_TYPES}"
        )
    for name, positions, tensor in (("q", q_positions, q), ("kv", kv_positions, k)):
        if positions is not None and positions.shape != (len(tensor),):
            raise ValueError(
                f"{name}_positions {list(positions.shape)} must be [{len(tensor)}], one for each"
                " token"
            )
        if positions is not None and (positions.is_floating_point() or positions.is_complex()):
            raise ValueError(f"{name}_positions ({positions.dtype}) must be integers")


def _agree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    strategy: Strategy,
    causal: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Every rank's T and S [R, 2], after all ranks have seen that all their arguments fit."""
    fault, own = None, [0] * 9
    try:
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy={strategy!r} must be one of {sorted(get_args(Strategy))}")
        _check(q, k, v, q_positions, kv_positions)
        kind, way = _TYPES.index(q.dtype), get_args(Strategy).index(strategy)
        own = [1, *q.shape[1:], k.shape[1], kind, way, int(causal), len(q), len(k)]
    except ValueError as error:
        fault = error
    everyone = torch.stack(_all_gather(torch.tensor(own, device=q.device), group)).cpu()
    if fault is not None:
        raise fault
    if refused := (everyone[:, 0] == 0).nonzero().flatten().tolist():
        raise ValueError(f"the arguments of rank {refused[0]} of the group don't fit; see there")
    if bool((everyone[:, :7] != everyone[0, :7]).any()):
        raise ValueError("heads, head size, type, strategy and causal must be alike on all ranks")
    return everyone[:, 7:]


def _ascending(k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as one block [2, G, S, D], in the order of their positions."""
    order = torch.argsort(positions)
    kv = torch.stack((k, v)).transpose(1, 2)
    in_order = bool((order.diff() > 0).all())
    return (kv if in_order else kv[:, :, order.to(kv.device)]), positions[order]


def _runs(positions: list[int]) -> tuple[Run, ...]:
    """Positions as runs of consecutive ones, in their order."""
    starts = [i for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1]
    stops = [*starts[1:], len(positions)]
    return tuple(
        Run(positions[start], stop - start)
        for start, stop in zip(starts, stops, strict=False)
        if stop > start
    )


def _shard(rank: int, q_positions: list[int], kv_positions: list[int], causal: bool) -> Shard:
    if not causal:
        return Shard(rank, _runs(q_positions), len(kv_positions), ())
    return Shard(rank, _runs(q_positions), 0, _runs(kv_positions))


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group)
    return gathered


def _gather_shards(
    q_positions: Tensor,
    kv_positions: Tensor,
    sizes: Tensor,
    causal: bool,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> tuple[Shard, ...]:
    own = torch.zeros(int(sizes.sum(1).max()), dtype=torch.int64, device=device)
    own[: len(q_positions) + len(kv_positions)] = torch.cat((q_positions, kv_positions))
    shards = []
    kv_of_all = []
    for rank, positions in enumerate(_all_gather(own, group)):
        num_q, num_k = sizes[rank].tolist()
        listed = positions.tolist()
        kv_of_all.append(positions[num_q : num_q + num_k])
        shards.append(_shard(rank, listed[:num_q], listed[num_q : num_q + num_k], causal))
    _check_once(torch.cat(kv_of_all))
    return tuple(shards)


def _check_once(kv_positions: Tensor) -> None:
    values, counts = torch.unique(kv_positions, return_counts=True)
    if len(values) != len(kv_positions):
        raise ValueError(
            f"kv_positions must not name a position twice, as they do {values[counts > 1][0]}"
        )
