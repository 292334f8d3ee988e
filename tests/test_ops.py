"""`longspan.ops` on one process: attention by positions, states that merge, errors that name."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import longspan.ops
from longspan.attention.reference import masked_attention
from longspan.ops import AttentionState, attention, merge

torch.set_num_threads(1)


def inputs(
    tokens: int, keys: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D] and k, v [S, G, D], standard normal."""
    generator = torch.Generator().manual_seed(tokens * 1_009 + keys)
    q = torch.randn(tokens, heads, head_dim, generator=generator)
    k, v = torch.randn(2, keys, kv_heads, head_dim, generator=generator)
    return q, k, v


def assert_close(actual: AttentionState, expected: AttentionState) -> None:
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    torch.testing.assert_close(actual.out, expected.out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(actual.lse, expected.lse, atol=2e-6, rtol=1e-5)


def assert_sees(
    q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_kv: Tensor, **arguments: Any
) -> None:
    """Causal attention with these arguments shows every query the keys up to its position."""
    visible = at_kv <= at_q.unsqueeze(1)
    expected = masked_attention(q, k, v, visible, scale=q.shape[2] ** -0.5)
    assert_close(attention(q, k, v, causal=True, **arguments), expected)


def test_the_public_names() -> None:
    assert longspan.ops.__all__ == [
        "AttentionState",
        "attention",
        "context_parallel_attention",
        "merge",
    ]
    assert all(hasattr(longspan.ops, name) for name in longspan.ops.__all__)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 300), (40, 300), (40, 40), (40, 7)])
def test_every_query_sees_every_key_by_default(tokens: int, keys: int) -> None:
    q, k, v = inputs(tokens, keys)
    everything = torch.ones(tokens, keys, dtype=torch.bool)
    assert_close(attention(q, k, v), masked_attention(q, k, v, everything, scale=0.125))


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 300), (40, 300), (40, 40), (300, 300)])
def test_causal_queries_are_the_last_tokens_by_default(tokens: int, keys: int) -> None:
    assert_sees(*inputs(tokens, keys), torch.arange(keys)[keys - tokens :], torch.arange(keys))


def test_causal_queries_before_the_first_key_see_nothing() -> None:
    q, k, v = inputs(40, 7)
    state = attention(q, k, v, causal=True)
    assert_close(state[:33], AttentionState.empty(33, 4, 64, q.device))
    assert_close(state[33:], attention(q[33:], k, v, causal=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "keys"), [(0, 0), (0, 5), (5, 0)])
def test_no_queries_and_no_keys_are_normal(tokens: int, keys: int, causal: bool) -> None:
    state = attention(*inputs(tokens, keys), causal=causal)
    assert_close(state, AttentionState.empty(tokens, 4, 64, torch.device("cpu")))


POSITIONS: dict[str, tuple[Iterable[int], Iterable[int]]] = {
    "one run in the middle": (range(10, 30), range(50)),
    "queries and keys overlap in part": (range(20, 60), range(40)),
    "keys all later": (range(20), range(20, 40)),
    "gaps": ([0, 1, 2, 50, 51, 90], [*range(10), *range(45, 55), *range(80, 99)]),
    "striped": (range(1, 80, 4), range(3, 80, 4)),
    "zigzag": ([*range(8), *range(56, 64)], [*range(8, 16), *range(48, 56)]),
    "keys not in order": (range(30, 40), [*range(20, 40), *range(20)]),
    "queries not in order": ([39, 2, 3, 4, 0, 25], range(40)),
    "a query twice": ([7, 7, 3, 7], range(10)),
    "far away": (range(10**9, 10**9 + 5), range(10**9 - 3, 10**9 + 3)),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_causal_query_sees_the_keys_up_to_its_position(name: str) -> None:
    at_q, at_kv = (torch.tensor(list(numbers)) for numbers in POSITIONS[name])
    q, k, v = inputs(len(at_q), len(at_kv))
    assert_sees(q, k, v, at_q, at_kv, q_positions=at_q, kv_positions=at_kv)


@given(
    q_positions=st.lists(st.integers(0, 60), max_size=30),
    kv_positions=st.lists(st.integers(0, 60), max_size=30, unique=True),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
@settings(deadline=None, max_examples=100)
def test_any_positions(q_positions: list[int], kv_positions: list[int], dtype: torch.dtype) -> None:
    at_q, at_kv = torch.tensor(q_positions, dtype=dtype), torch.tensor(kv_positions, dtype=dtype)
    q, k, v = inputs(len(q_positions), len(kv_positions), head_dim=16)
    assert_sees(q, k, v, at_q, at_kv, q_positions=at_q, kv_positions=at_kv)


def test_each_side_may_have_positions_alone() -> None:
    q, k, v = inputs(3, 10)
    at_q, at_kv = torch.tensor([4, 0, 8]), torch.arange(20, 30)
    assert_sees(q, k, v, at_q, torch.arange(10), q_positions=at_q)
    assert_sees(q, k, v, torch.arange(7, 10), at_kv - 20, kv_positions=at_kv - 20)


def test_without_causal_positions_hide_nothing() -> None:
    q, k, v = inputs(3, 10)
    state = attention(q, k, v, q_positions=torch.zeros(3).long(), kv_positions=torch.arange(10, 20))
    assert_close(state, attention(q, k, v))


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (14, 2), (6, 6), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_scale_is_one_over_the_root_of_the_head_size_by_default(
    heads: int, kv_heads: int, head_dim: int
) -> None:
    q, k, v = inputs(9, 9, heads, kv_heads, head_dim)
    assert_sees(q, k, v, torch.arange(9), torch.arange(9), scale=None)
    assert_sees(q, k, v, torch.arange(9), torch.arange(9), scale=head_dim**-0.5)
    assert_close(attention(q, k, v, scale=0.0), attention(q * 0, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_gives_the_state_of_the_widened_inputs(
    dtype: torch.dtype, causal: bool
) -> None:
    halves = [x.to(dtype) for x in inputs(50, 50)]
    q, k, v = (x.float() for x in halves)
    state, exact = attention(*halves, causal=causal), attention(q, k, v, causal=causal)
    torch.testing.assert_close(state.lse, exact.lse, atol=2e-6, rtol=1e-5)
    # Where the CPU multiplies pairs of bfloat16, weights are rounded: half their last unit.
    in_pairs = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    weight = 2**-8 if in_pairs else 0.0
    off = weight * attention(q, k, v.abs(), causal=causal).out + 2e-6 + 1e-5 * exact.out.abs()
    assert bool(((state.out - exact.out).abs() <= off).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
def test_strides_change_nothing(causal: bool, first: int, second: int) -> None:
    """Inputs that are views with any two dimensions of their memory exchanged."""
    packed = inputs(50, 50)
    strided = [x.transpose(first, second).contiguous().transpose(first, second) for x in packed]
    assert_close(attention(*strided, causal=causal), attention(*packed, causal=causal))


def test_parts_of_the_keys_merge_to_the_whole() -> None:
    q, k, v = inputs(20, 50)
    positions = torch.arange(50)
    at_q = positions[30:]
    front, back = (
        attention(q, k[part], v[part], causal=True, q_positions=at_q, kv_positions=positions[part])
        for part in (slice(0, 35), slice(35, 50))
    )
    assert_close(merge(front, back), attention(q, k, v, causal=True))


def test_inputs_stay_as_they_are() -> None:
    before, after = inputs(5, 9), inputs(5, 9)
    at_kv = torch.tensor([3, 1, 2, 0, 8, 7, 6, 5, 4])
    attention(*after, causal=True, kv_positions=at_kv)
    assert all(map(torch.equal, before, after))
    assert at_kv.tolist() == [3, 1, 2, 0, 8, 7, 6, 5, 4]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "q of 2 dimensions": ({"q": torch.ones(5, 64)}, r"q \[5, 64\] must be \[T, H, D\]"),
    "k of 4 dimensions": ({"k": torch.ones(1, 9, 2, 64)}, r"k \[1, 9, 2, 64\]"),
    "v shorter than k": ({"v": torch.ones(8, 2, 64)}, r"v \[8, 2, 64\]"),
    "heads that don't divide": ({"q": torch.ones(5, 3, 64)}, "multiple of key heads"),
    "other head sizes": ({"q": torch.ones(5, 4, 32)}, "head sizes"),
    "no key heads": ({"k": torch.ones(9, 0, 64), "v": torch.ones(9, 0, 64)}, "heads"),
    "types that differ": ({"k": torch.ones(9, 2, 64).half()}, r"k \(torch.float16\)"),
    "too few q_positions": ({"q_positions": torch.arange(4)}, r"q_positions \[4\] must be \[5\]"),
    "q_positions of 2 dimensions": ({"q_positions": torch.ones(1, 5)}, r"q_positions \[1, 5\]"),
    "too many kv_positions": ({"kv_positions": torch.arange(10)}, r"kv_positions \[10\]"),
    "a position twice": ({"kv_positions": torch.zeros(9).long()}, "kv_positions .* twice"),
    "q_positions that aren't integers": ({"q_positions": torch.rand(5)}, "q_positions"),
    "kv_positions that aren't integers": ({"kv_positions": torch.rand(9)}, "kv_positions"),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str, causal: bool) -> None:
    changed, message = WRONG[name]
    q, k, v = inputs(5, 9)
    with pytest.raises(ValueError, match=message):
        attention(**({"q": q, "k": k, "v": v} | changed), causal=causal)
