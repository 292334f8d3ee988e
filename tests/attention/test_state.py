"""The algebra of attention states: one operation, associative, commutative, with an identity."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.attention import absorb
from longspan.attention.reference import attention
from longspan.attention.state import AttentionState, merge

torch.set_num_threads(1)

TOKENS, HEADS, HEAD_DIM = 3, 2, 4
EPS = torch.finfo(torch.float32).eps
CPU = torch.device("cpu")

quick = settings(deadline=None, max_examples=100)


def floats(limit: float) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=32)


def tensors(elements: st.SearchStrategy[float], *shape: int) -> st.SearchStrategy[Tensor]:
    size = math.prod(shape)
    lists = st.lists(elements, min_size=size, max_size=size)
    return lists.map(lambda numbers: torch.tensor(numbers, dtype=torch.float32).view(shape))


@st.composite
def states(draw: st.DrawFn, limit: float = 20.0) -> AttentionState:
    """States over any keys: some queries see none, and then `out` is undefined, here NaN."""
    lse = draw(tensors(st.one_of(floats(limit), st.just(-math.inf)), TOKENS, HEADS))
    out = draw(tensors(floats(4.0), TOKENS, HEADS, HEAD_DIM))
    return AttentionState(out.masked_fill(lse.isneginf().unsqueeze(-1), math.nan), lse)


def empty() -> AttentionState:
    return AttentionState.empty(TOKENS, HEADS, HEAD_DIM, CPU)


def defined(state: AttentionState) -> AttentionState:
    """The state with a plain zero wherever no key was seen."""
    nothing = state.lse.isneginf().unsqueeze(-1)
    return AttentionState(state.out.masked_fill(nothing, 0.0), state.lse)


def weighted_mean(*parts: AttentionState) -> AttentionState:
    """What a merge means, in float64: the mean of the outs, weighted by exp(lse)."""
    lse = torch.stack([part.lse.double() for part in parts])
    out = torch.stack([defined(part).out.double() for part in parts])
    total = lse.logsumexp(0)
    weight = torch.exp(lse - total).nan_to_num(0.0)
    return AttentionState((weight.unsqueeze(-1) * out).sum(0), total)


def assert_equal(actual: AttentionState, expected: AttentionState) -> None:
    assert torch.equal(actual.out, expected.out)
    assert torch.equal(actual.lse, expected.lse)


def assert_close(actual: AttentionState, expected: AttentionState, atol: float = 2e-6) -> None:
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    for ours, theirs in ((actual.out, expected.out), (actual.lse, expected.lse)):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=1e-5)


@given(states(), states())
@quick
def test_merge_is_the_mean_weighted_by_the_exponentials(
    first: AttentionState, second: AttentionState
) -> None:
    assert_close(merge(first, second), weighted_mean(first, second))


@given(states(limit=1e4), states(limit=1e4))
@quick
def test_merge_is_commutative_to_the_last_bit(
    first: AttentionState, second: AttentionState
) -> None:
    assert_equal(merge(first, second), merge(second, first))


@given(states(), states(), states())
@quick
def test_merge_is_associative(a: AttentionState, b: AttentionState, c: AttentionState) -> None:
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(states(limit=1e4), states(limit=1e4), states(limit=1e4))
@quick
def test_merge_is_associative_up_to_the_rounding_of_large_lse(
    a: AttentionState, b: AttentionState, c: AttentionState
) -> None:
    # An lse near 1e4 is itself only known to 1e4 * EPS = 1.2e-3, whatever the formula.
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)), atol=8 * 1e4 * EPS)


@given(states(limit=1e4))
@quick
def test_the_empty_state_is_the_identity_to_the_last_bit(state: AttentionState) -> None:
    assert_equal(merge(state, empty()), defined(state))
    assert_equal(merge(empty(), state), defined(state))


@pytest.mark.parametrize("out", [0.0, 7.0, math.inf, math.nan])
def test_two_empty_states_make_an_empty_state_whatever_their_outs_hold(out: float) -> None:
    undefined = AttentionState(torch.full((TOKENS, HEADS, HEAD_DIM), out), empty().lse)
    assert_equal(merge(undefined, undefined), empty())
    assert_equal(merge(undefined, empty()), empty())


@pytest.mark.parametrize("out", [7.0, math.inf, math.nan])
def test_an_empty_state_adds_nothing_whatever_its_out_holds(out: float) -> None:
    undefined = AttentionState(torch.full((TOKENS, HEADS, HEAD_DIM), out), empty().lse)
    state = AttentionState(torch.randn(TOKENS, HEADS, HEAD_DIM), torch.randn(TOKENS, HEADS))
    assert_equal(merge(state, undefined), state)
    assert_equal(merge(undefined, state), state)


@given(states(limit=1e4), states(limit=1e4))
@quick
def test_merge_never_makes_a_nan(first: AttentionState, second: AttentionState) -> None:
    merged = merge(first, second)
    assert not merged.out.isnan().any()
    assert not merged.lse.isnan().any()


@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_a_state_that_weighs_exp_1e4_times_more_is_all_that_is_left(level: float) -> None:
    out = torch.randn(2, TOKENS, HEADS, HEAD_DIM)
    lse = torch.full((TOKENS, HEADS), level)
    heavy, light = AttentionState(out[0], lse), AttentionState(out[1], lse - 1e4)
    assert_equal(merge(heavy, light), heavy)
    assert_equal(merge(light, heavy), heavy)


@given(level=floats(1e4), apart=floats(5.0), outs=st.tuples(floats(4.0), floats(4.0)))
@example(level=9999.5, apart=0.0, outs=(4.0, 4.0))
@quick
def test_merged_out_lies_between_the_outs(
    level: float, apart: float, outs: tuple[float, float]
) -> None:
    """It is a mean: its weights sum to one, however coarse float32 is at that lse."""
    first, second = (
        AttentionState(torch.full((1, 1, 1), out), torch.full((1, 1), lse))
        for out, lse in zip(outs, (level, level + apart), strict=True)
    )
    merged = float(merge(first, second).out)
    assert min(outs) - 2e-6 <= merged <= max(outs) + 2e-6


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
@quick
def test_parts_of_the_keys_merged_in_any_order_are_attention_over_all(
    seed: int, sizes: list[int], order: random.Random
) -> None:
    torch.manual_seed(seed)
    q = torch.randn(TOKENS, 4, 16)
    k, v = torch.randn(2, sum(sizes), 2, 16)
    parts = [
        attention(q, keys, values, scale=0.25)
        for keys, values in zip(torch.split(k, sizes), torch.split(v, sizes), strict=True)
    ]
    order.shuffle(parts)
    merged = AttentionState.empty(TOKENS, 4, 16, CPU)
    for part in parts:
        merged.absorb(part)
    assert_close(merged, attention(q, k, v, scale=0.25))


def test_every_tree_of_merges_gives_the_same_state() -> None:
    torch.manual_seed(0)
    q = torch.randn(TOKENS, 4, 16)
    k, v = torch.randn(2, 64, 2, 16)
    parts = [
        attention(q, keys, values, scale=0.25)
        for keys, values in zip(
            torch.split(k, [1, 0, 13, 50]), torch.split(v, [1, 0, 13, 50]), strict=True
        )
    ]
    whole = attention(q, k, v, scale=0.25)
    for a, b, c, d in itertools.permutations(parts):
        assert_close(merge(merge(a, b), merge(c, d)), whole)
        assert_close(merge(merge(merge(a, b), c), d), whole)


@pytest.fixture(params=["compiled", "without a compiler"])
def assert_merged(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[AttentionState, AttentionState], None]:
    """To the last bit what `merge` gives, where it is `merge`."""
    if request.param == "compiled":
        return assert_close
    monkeypatch.setattr(absorb, "found", lambda *_: None)
    return assert_equal


def random_state(tokens: int, empty_part: float) -> AttentionState:
    state = AttentionState(torch.randn(tokens, HEADS, HEAD_DIM), 9 * torch.randn(tokens, HEADS))
    nothing = torch.rand(tokens, HEADS) < empty_part
    state.lse.masked_fill_(nothing, -math.inf)
    state.out.masked_fill_(nothing.unsqueeze(-1), math.nan)
    return state


@pytest.mark.parametrize("empty_part", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [1, 7, 40_000])
def test_absorb_is_merge_in_place(
    assert_merged: Callable[..., None], tokens: int, empty_part: float
) -> None:
    torch.manual_seed(tokens)
    state, other = random_state(tokens, empty_part), random_state(tokens, empty_part)
    expected = merge(state, other)
    state.absorb(other)
    assert_merged(defined(state), expected)


def test_absorb_takes_some_rows_and_states_as_they_travel(
    assert_merged: Callable[..., None],
) -> None:
    torch.manual_seed(0)
    state, other = random_state(5, 0.0), random_state(2, 0.0)
    packed = torch.cat((other.out, other.lse.unsqueeze(-1)), dim=-1)
    before = AttentionState(state.out.clone(), state.lse.clone())
    state[1:3].absorb(AttentionState(packed[..., :-1], packed[..., -1]))
    assert_merged(state[1:3], merge(before[1:3], other))
    assert_equal(state[:1], before[:1])
    assert_equal(state[3:], before[3:])


def test_states_of_no_queries_merge() -> None:
    nothing = AttentionState.empty(0, HEADS, HEAD_DIM, CPU)
    assert merge(nothing, nothing).out.shape == (0, HEADS, HEAD_DIM)
    assert merge(nothing, nothing).lse.shape == (0, HEADS)
