"""The kernels of `cuda`, in Triton's language: a block of rows over some keys, and the merge.

Scores are kept in units of log 2, since GPUs have exp2; what is stored is in natural logarithms.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(1 / LOG2_E)


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_token, q_head, q_dim, k_token, k_head, k_dim, v_token, v_head, v_dim,
    tokens, keys, split_keys, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The state of one block of rows over one part of the keys of one key/value head."""
    # With CAUSAL those that see most begin first, so that none of them is left at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = (rows // GROUP).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_DIM)
    real = (token < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    q_at = token[:, None] * q_token + head.to(tl.int64)[:, None] * q_head + dims[None, :] * q_dim
    q = tl.load(q_ptr + q_at, mask=real, other=0.0)

    start = split * split_keys
    stop = tl.minimum(start + split_keys, keys)
    seen_by_all = stop
    if CAUSAL:
        stop = tl.minimum((block * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP + 1, stop)
        seen_by_all = block * BLOCK_ROWS // GROUP + 1
    unmasked = start + (seen_by_all - start) // BLOCK_KEYS * BLOCK_KEYS

    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head
    top = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)

    acc, total, top = _absorb(
        acc, total, top, q, token, k_ptr, v_ptr, k_token, k_dim, v_token, v_dim,
        start, unmasked, stop, scale, HEAD_DIM, CAUSAL, False, BLOCK_KEYS, BLOCK_DIM,
    )  # fmt: skip
    acc, total, top = _absorb(
        acc, total, top, q, token, k_ptr, v_ptr, k_token, k_dim, v_token, v_dim,
        unmasked, stop, stop, scale, HEAD_DIM, CAUSAL, True, BLOCK_KEYS, BLOCK_DIM,
    )  # fmt: skip
    state = (split * tokens + token) * (tl.num_programs(1) * GROUP) + head
    tl.store(out_ptr + state[:, None] * HEAD_DIM + dims[None, :], acc / total[:, None], mask=real)
    tl.store(lse_ptr + state, (top + tl.log2(total)) * _LN_2, mask=token < tokens)


@triton.jit
def _absorb(
    acc, total, top, q, token, k_ptr, v_ptr, k_token, k_dim, v_token, v_dim,
    start, stop, end, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Keys start .. stop - 1, block by block; without MASKED, whole blocks that all rows see.

    Every row sees a key of the first block of all, so that `top` is finite ever after.
    """
    columns = tl.arange(0, BLOCK_KEYS).to(tl.int64)
    for first in tl.range(start, stop, BLOCK_KEYS):
        at = first + columns
        k = _block(k_ptr, at, end, k_token, k_dim, HEAD_DIM, MASKED, BLOCK_DIM)
        scores = _product(q, tl.trans(k)) * scale
        if MASKED:
            seen = (at < end)[None, :]
            if CAUSAL:
                seen = seen & (at[None, :] <= token[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = _block(v_ptr, at, end, v_token, v_dim, HEAD_DIM, MASKED, BLOCK_DIM)
        acc = acc * shrink[:, None] + _product(weights, v)
        top = higher
    return acc, total, top


@triton.jit
def _block(
    ptr, at, end, token_stride, dim_stride,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Keys or values of some tokens, [len(at), BLOCK_DIM]; zeros where there are none."""
    dims = tl.arange(0, BLOCK_DIM)
    places = ptr + at[:, None] * token_stride + dims[None, :] * dim_stride
    if MASKED:
        return tl.load(places, mask=(at < end)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM < BLOCK_DIM:
        return tl.load(places, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(places)


@triton.jit
def _product(a, b):
    """a b in b's type, summed in float32. Triton's interpreter, which has no bfloat16, widens."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def merge(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, rows, splits,
    HEAD_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One row's state from those over the parts of its keys."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    state = part.to(tl.int64) * rows + row
    lse = tl.load(lses_ptr + state, mask=part < splits, other=-float("inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2((lse - top) * _LOG2_E)
    real = (part < splits)[:, None] & (dims < HEAD_DIM)[None, :]
    out = tl.load(outs_ptr + state[:, None] * HEAD_DIM + dims[None, :], mask=real, other=0.0)
    total = tl.sum(weights, 0)
    merged = tl.sum(out * weights[:, None], 0) / total
    tl.store(out_ptr + row * HEAD_DIM + dims, merged, mask=dims < HEAD_DIM)
    tl.store(lse_ptr + row, top + tl.log2(total) * _LN_2)
