"""Every kernel is the reference, and the reference is attention as float64 has it."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longspan.attention import cpu, reference
from longspan.attention.state import AttentionState
from longspan.attention.tiled import Attention

torch.set_num_threads(1)

HEADS = [(32, 8), (16, 8), (14, 2), (6, 6), (8, 1)]
HEAD_DIMS = [64, 80, 128]
SHAPES = [(1, 1), (1, 7), (1, 1000), (3, 2), (7, 130), (64, 64), (130, 517)]
SQUARES = [1, 2, 7, 64, 127, 300]

each_heads = pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}_{heads[1]}")
each_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
each_kernel = pytest.mark.parametrize("kernel", [cpu.attention, reference.attention])


def inputs(
    tokens: int,
    keys: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D] and k, v [S, G, D], standard normal."""
    generator = torch.Generator().manual_seed(tokens * 10_007 + keys * 101 + head_dim)
    (num_heads, kv_heads) = heads
    q = torch.randn(tokens, num_heads, head_dim, generator=generator)
    k, v = torch.randn(2, keys, kv_heads, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attention_in_float64(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False
) -> AttentionState:
    """One query of one head after the other, by the textbook's formula."""
    tokens, heads, head_dim = q.shape
    out = torch.zeros(tokens, heads, head_dim, dtype=torch.float64)
    lse = torch.full((tokens, heads), -math.inf, dtype=torch.float64)
    for t, h in itertools.product(range(tokens), range(heads)):
        seen = t + 1 if causal else len(k)
        if seen:
            shared = h // (heads // k.shape[1])
            scores = k[:seen, shared].double() @ q[t, h].double() * scale
            exponentials = torch.exp(scores - scores.max())
            out[t, h] = exponentials @ v[:seen, shared].double() / exponentials.sum()
            lse[t, h] = scores.max() + exponentials.sum().log()
    return AttentionState(out, lse)


def assert_close(actual: AttentionState, expected: AttentionState) -> None:
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    for ours, theirs in ((actual.out, expected.out), (actual.lse, expected.lse)):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-6, rtol=1e-5)


def assert_equal(actual: AttentionState, expected: AttentionState) -> None:
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    assert torch.equal(actual.out, expected.out)
    assert torch.equal(actual.lse, expected.lse)


@each_head_dim
@each_heads
def test_reference_is_attention_in_float64(heads: tuple[int, int], head_dim: int) -> None:
    for tokens, keys, causal in ((3, 40, False), (1, 1000, False), (23, 23, True)):
        q, k, v = inputs(tokens, keys, heads, head_dim)
        scale = head_dim**-0.5
        assert_close(
            reference.attention(q, k, v, scale=scale, causal=causal),
            attention_in_float64(q, k, v, scale=scale, causal=causal),
        )


def test_reference_shows_each_query_the_keys_of_its_mask() -> None:
    q, k, v = inputs(4, 9, (4, 2), 16)
    visible = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[2] = False
    state = reference.masked_attention(q, k, v, visible, scale=0.25)
    for t in range(4):
        seen = visible[t]
        row = slice(t, t + 1)
        assert_close(state[row], attention_in_float64(q[row], k[seen], v[seen], scale=0.25))


@each_head_dim
@each_heads
def test_cpu_is_the_reference(heads: tuple[int, int], head_dim: int) -> None:
    for tokens, keys in SHAPES:
        q, k, v = inputs(tokens, keys, heads, head_dim)
        scale = head_dim**-0.5
        assert_close(cpu.attention(q, k, v, scale=scale), reference.attention(q, k, v, scale=scale))


@each_head_dim
@each_heads
def test_cpu_is_the_reference_on_causal_squares(heads: tuple[int, int], head_dim: int) -> None:
    for size in SQUARES:
        q, k, v = inputs(size, size, heads, head_dim)
        scale = head_dim**-0.5
        assert_close(
            cpu.attention(q, k, v, scale=scale, causal=True),
            reference.attention(q, k, v, scale=scale, causal=True),
        )


@each_kernel
@each_heads
def test_scale_multiplies_the_scores(kernel: Attention, heads: tuple[int, int]) -> None:
    q, k, v = inputs(3, 40, heads, 64)
    for scale in (0.0, 0.05, 1.0):
        expected = attention_in_float64(q * scale, k, v, scale=1.0)
        torch.testing.assert_close(
            kernel(q, k, v, scale=scale).lse.double(), expected.lse, atol=1e-5, rtol=1e-5
        )


@each_kernel
@each_heads
@pytest.mark.parametrize(("tokens", "keys"), [(0, 0), (0, 5), (5, 0), (1, 0)])
def test_no_queries_and_no_keys_are_normal(
    kernel: Attention, heads: tuple[int, int], tokens: int, keys: int
) -> None:
    q, k, v = inputs(tokens, keys, heads, 64)
    nothing = AttentionState.empty(tokens, heads[0], 64, q.device)
    assert_equal(kernel(q, k, v, scale=0.125), nothing)
    if tokens == keys:
        assert_equal(kernel(q, k, v, scale=0.125, causal=True), nothing)


@each_kernel
@pytest.mark.parametrize("causal", [False, True])
def test_one_token_over_itself_is_its_value(kernel: Attention, causal: bool) -> None:
    q, k, v = inputs(1, 1, (4, 2), 64)
    state = kernel(q, k, v, scale=0.125, causal=causal)
    shared = [0, 0, 1, 1]
    torch.testing.assert_close(state.out, v[:, shared], atol=0, rtol=0)
    torch.testing.assert_close(state.lse, (q * k[:, shared]).sum(-1) * 0.125)


@each_kernel
@each_heads
def test_shards_of_any_size_merge_to_the_whole(kernel: Attention, heads: tuple[int, int]) -> None:
    sizes = [0, 1, 130, 0, 7, 62]
    q, k, v = inputs(9, sum(sizes), heads, 64)
    state = AttentionState.empty(9, heads[0], 64, q.device)
    for keys, values in zip(torch.split(k, sizes), torch.split(v, sizes), strict=True):
        state.absorb(kernel(q, keys, values, scale=0.125))
    assert_close(state, reference.attention(q, k, v, scale=0.125))


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as they lie in a page, [S, 2, G, D]; queries as one of three in a row."""
    kv = torch.stack((k, v), dim=1)
    return torch.stack((q, q, q), dim=1)[:, 1], kv[:, 0], kv[:, 1]


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [H, T, D] and [G, S, D], as models make them."""
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    return q, k, v


def every_other_token(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.repeat_interleave(2, dim=0)[::2] for x in (q, k, v))
    return q, k, v


@each_kernel
@each_heads
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("view", [interleaved, heads_first, every_other_token])
def test_strides_change_nothing(
    kernel: Attention,
    heads: tuple[int, int],
    causal: bool,
    view: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> None:
    packed = inputs(70, 70, heads, 64)
    strided = view(*packed)
    assert not strided[0].is_contiguous()
    assert_close(
        kernel(*strided, scale=0.125, causal=causal),
        reference.attention(*packed, scale=0.125, causal=causal),
    )


@each_kernel
@each_heads
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_gives_the_float32_state_of_the_widened_inputs(
    kernel: Attention, heads: tuple[int, int], dtype: torch.dtype, causal: bool
) -> None:
    q, k, v = inputs(70, 70, heads, 64, dtype)
    state = kernel(q, k, v, scale=0.125, causal=causal)
    assert_equal(state, kernel(q.float(), k.float(), v.float(), scale=0.125, causal=causal))
    assert_close(
        state,
        reference.attention(q.float(), k.float(), v.float(), scale=0.125, causal=causal),
    )


def test_inputs_stay_as_they_are() -> None:
    before = inputs(5, 5, (4, 2), 64)
    for kernel, causal in itertools.product((cpu.attention, reference.attention), (False, True)):
        after = inputs(5, 5, (4, 2), 64)
        kernel(*after, scale=0.125, causal=causal)
        assert all(map(torch.equal, before, after))
