"""The compiled kernel, over keys that lie anywhere in a pool, is the reference."""

import math
import platform
import shutil
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import assert_equal, attention_in_float64
from torch import Tensor

from longspan import compiled
from longspan.attention import cpu, native, reference
from longspan.attention.kernel import Kernel, kernel_for
from longspan.attention.kv_format import encode
from longspan.attention.state import AttentionState
from longspan.attention.tiled import Tiled
from longspan.attention.work import MIN_SHARED_KEYS, Share, Tile, Work
from longspan.compiled import library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
HEADS = [(8, 2), (16, 2), (14, 2), (6, 6), (8, 1), (2, 1), (9, 1)]
HEAD_DIMS = [32, 64, 72, 80, 128, 256]
SHAPES = [(1, 1), (1, 130), (1, 1000), (2, 300), (3, 2), (7, 130), (64, 64), (130, 517), (300, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    built = library(native.SOURCE)
    assert built is not None
    return native.Native(built)


def random_inputs(
    tokens: int,
    keys: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """q [T, H, D] and kv [2, G, S, D], standard normal."""
    generator = torch.Generator().manual_seed(tokens * 10_007 + keys * 101 + head_dim)
    q = torch.randn(tokens, heads[0], head_dim, generator=generator)
    kv = torch.randn(2, heads[1], keys, head_dim, generator=generator)
    return q.to(dtype), kv.to(dtype)


def whole(tokens: int, keys: int, causal: bool = False) -> Work:
    tile = Tile(slice(0, tokens), slice(0, keys), causal)
    return Work([Share(0, [tile] if tokens and keys else [], [slice(0, keys)])])


def run(kernel: Kernel, q: Tensor, kv: Tensor, work: Work, scale: float) -> AttentionState:
    state = AttentionState.empty(len(q), q.shape[1], q.shape[2], q.device)
    kernel(state, q, kv, work, scale=scale)
    return state


def assert_close(actual: AttentionState, expected: AttentionState) -> None:
    for ours, theirs in ((actual.out, expected.out), (actual.lse, expected.lse)):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_it_is_the_kernel_of_the_cpu() -> None:
    assert isinstance(kernel_for(CPU), native.Native)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}_{heads[1]}")
def test_it_is_the_reference(
    kernel: Kernel, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    expected = Tiled(reference.attention)
    for tokens, keys in SHAPES:
        for causal in (False, True):
            keys = tokens if causal else keys
            q, kv = random_inputs(tokens, keys, heads, head_dim)
            kv = encode(kv, dtype)
            work = whole(tokens, keys, causal)
            assert_close(
                run(kernel, q, kv, work, head_dim**-0.5), run(expected, q, kv, work, head_dim**-0.5)
            )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for another x86 processor")
def test_the_narrowest_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 floats; this machine's own are wider."""
    flags = tuple(flag.replace("native", "x86-64") for flag in compiled._FLAGS)
    monkeypatch.setattr(compiled, "_FLAGS", flags)
    built = library.__wrapped__(native.SOURCE)
    assert built is not None
    narrow, expected = native.Native(built), Tiled(reference.attention)
    for heads, head_dim, dtype in product(
        [(8, 2), (16, 2), (6, 6)], (64, 72), (*DTYPES, torch.int8)
    ):
        for tokens, keys in SHAPES:
            q, kv = random_inputs(tokens, keys, heads, head_dim)
            kv, work = encode(kv, dtype), whole(tokens, keys)
            assert_close(run(narrow, q, kv, work, 0.1), run(expected, q, kv, work, 0.1))


def test_its_error_is_that_of_float32(kernel: Kernel) -> None:
    """Against float64 it is no further off than PyTorch's own float32 kernel, but for chance."""
    q, kv = random_inputs(5, 3000, (8, 2), 64)
    exact = attention_in_float64(q, *kv.transpose(1, 2), scale=0.125)
    ours, theirs = (
        float((run(each, q, kv, whole(5, 3000), 0.125).out.double() - exact.out).abs().max())
        for each in (kernel, Tiled(cpu.attention))
    )
    assert ours < 2 * theirs


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_scores_of_any_size(kernel: Kernel, scale: float) -> None:
    q, kv = random_inputs(40, 300, (4, 2), 64)
    for tokens in (1, 40):
        work = whole(tokens, 300)
        ours = run(kernel, q[:tokens], kv, work, scale)
        exact = attention_in_float64(q[:tokens], *kv.transpose(1, 2), scale=scale)
        # A float32 score of this size is this far off, and so are weights, which are its powers.
        off = 1e-6 * (1 + float(exact.lse.abs().max()))
        torch.testing.assert_close(ours.lse.double(), exact.lse, atol=off, rtol=1e-5)
        torch.testing.assert_close(ours.out.double(), exact.out, atol=20 * off, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_lies_beside_the_keys_is_not_read(
    kernel: Kernel, value: float, dtype: torch.dtype
) -> None:
    for tokens in (1, 2, 60):
        q, kv = random_inputs(tokens, 400, (8, 2), 64, dtype)
        first = Work([Share(0, [Tile(slice(0, tokens), slice(0, 133), False)], [slice(7, 140)])])
        clean = run(kernel, q, kv, first, 0.125)
        kv[:, :, :7] = kv[:, :, 140:] = value
        dirty = run(kernel, q, kv, first, 0.125)
        assert_equal(clean, dirty)


def test_no_queries_and_no_keys_are_normal(kernel: Kernel) -> None:
    for tokens, keys in ((0, 0), (0, 5), (5, 0)):
        q, kv = random_inputs(tokens, keys, (4, 2), 64)
        state = run(kernel, q, kv, whole(tokens, keys), 0.125)
        assert torch.equal(state.out, torch.zeros(tokens, 4, 64))
        assert torch.equal(state.lse, torch.full((tokens, 4), -math.inf))
    run(kernel, q, kv, Work([]), 0.125)


def test_one_key_gives_its_value(kernel: Kernel) -> None:
    for dtype in DTYPES:
        q, kv = random_inputs(1, 1, (4, 2), 64, dtype)
        state = run(kernel, q, kv, whole(1, 1), 0.125)
        assert torch.equal(state.out[0], kv[1, [0, 0, 1, 1], 0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_half_precision_is_widened(kernel: Kernel, dtype: torch.dtype, tokens: int) -> None:
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU multiplies pairs of bfloat16; see the next test")
    q, kv = random_inputs(tokens, 300, (8, 2), 64, dtype)
    ours = run(kernel, q, kv, whole(tokens, 300), 0.125)
    wide = run(kernel, q.float(), kv.float(), whole(tokens, 300), 0.125)
    few_pairs = dtype == torch.bfloat16 and tokens == 1  # those are summed in another order
    (assert_close if few_pairs else assert_equal)(ours, wide)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}_{heads[1]}")
def test_in_bfloat16_weights_alone_may_be_rounded(
    kernel: Kernel, heads: tuple[int, int], head_dim: int
) -> None:
    """Where the CPU multiplies pairs. So the log-sum-exp is as exact as ever, and each term of the
    output is off by half a unit in its last place, 2^-8 of it, at most."""
    expected, scale = Tiled(reference.attention), head_dim**-0.5
    for tokens, keys in SHAPES:
        for causal in (False, True):
            keys = tokens if causal else keys
            q, kv = random_inputs(tokens, keys, heads, head_dim, torch.bfloat16)
            work = whole(tokens, keys, causal)
            ours = run(kernel, q, kv, work, scale)
            exact = run(expected, q.float(), kv.float(), work, scale)
            terms = run(expected, q.float(), torch.stack((kv[0], kv[1].abs())).float(), work, scale)
            torch.testing.assert_close(ours.lse, exact.lse, atol=2e-6, rtol=1e-5)
            off = (ours.out - exact.out).abs()
            assert bool((off <= 2**-8 * terms.out + 2e-6 + 1e-5 * exact.out.abs()).all())


def decoding(prefix: int, tails: Sequence[int], stranger: int) -> tuple[Work, int]:
    """One query for each tail, over the prefix and keys of its own; one of them has no prefix."""
    shares, end = [], prefix + 5
    for row, tail in enumerate(tails):
        ranges = [slice(end, end + tail + 1)]
        if row != stranger:
            ranges.insert(0, slice(3, 3 + prefix))
        keys = sum(r.stop - r.start for r in ranges)
        shares.append(Share(row, [Tile(slice(0, 1), slice(0, keys), False)], ranges))
        end += tail + 1
    return Work(shares), end


@pytest.mark.parametrize("stranger", [-1, 0, 2])
@pytest.mark.parametrize("requests", [2, 3, 8, 40])
@pytest.mark.parametrize("prefix", [10, 64, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_prefix_of_several_requests_is_read_once(
    kernel: Kernel, dtype: torch.dtype, prefix: int, requests: int, stranger: int
) -> None:
    work, keys = decoding(prefix, [7 * row % 50 for row in range(requests)], stranger)
    q, kv = random_inputs(requests, keys, (8, 2), 64)
    kv = encode(kv, dtype)
    expected = run(Tiled(reference.attention), q, kv, work, 0.125)
    assert_close(run(kernel, q, kv, work, 0.125), expected)
    read = sum(int(table[:, 3].sum()) for table in work.tables)
    alone = sum(r.stop - r.start for share in work.shares for r in share.ranges)
    runs = [size for size in (stranger, requests - stranger - 1) if size > 1]
    shared = sum(size - 1 for size in (runs if stranger >= 0 else [requests]))
    assert read == alone - (prefix * shared if prefix >= MIN_SHARED_KEYS else 0)


def token_major(kv: Tensor) -> Tensor:
    """[S, 2, G, D] in memory, as other engines' pages are."""
    return kv.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def every_other(kv: Tensor) -> Tensor:
    return kv.repeat_interleave(2, dim=2)[:, :, ::2]


def depth_first(kv: Tensor) -> Tensor:
    return kv.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("view", [token_major, every_other, depth_first])
def test_strides_change_nothing(kernel: Kernel, view: Callable[[Tensor], Tensor]) -> None:
    for tokens in (1, 70):
        q, kv = random_inputs(tokens, 200, (8, 2), 64)
        strided = view(kv)
        assert not strided.is_contiguous()
        assert torch.equal(strided, kv)
        asking = torch.stack((q, q, q), dim=1)[:, 1]
        expected = run(kernel, q, kv, whole(tokens, 200), 0.125)
        assert_equal(run(kernel, asking, strided, whole(tokens, 200), 0.125), expected)


def in_pages(keys: int, size: int, generator: torch.Generator) -> list[slice]:
    """Pages of a pool that hold so many tokens, in any order; the last one may be partly full."""
    pages = torch.randperm(-(-keys // size) + 3, generator=generator).tolist()
    ranges = [slice(page * size, (page + 1) * size) for page in pages[: -(-keys // size)]]
    if keys % size:
        ranges[-1] = slice(ranges[-1].start, ranges[-1].start + keys % size)
    return ranges


@st.composite
def works(draw: st.DrawFn) -> tuple[Work, int]:
    """Several requests of a step, in pages of a pool: cached keys, then a causal square."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    size = draw(st.sampled_from([1, 3, 16]))
    shares = []
    row = slots = 0
    for _ in range(draw(st.integers(1, 4))):
        new = draw(st.sampled_from([1, 1, 2, 5, 40, 150]))
        cached = draw(st.sampled_from([0, 1, 16, 200]))
        rows = slice(0, new)
        tiles = [Tile(rows, slice(cached, cached + new), new > 1)]
        if cached:
            tiles.insert(0, Tile(rows, slice(0, cached), False))
        places = in_pages(cached + new, size, generator)
        ranges = [slice(slots + place.start, slots + place.stop) for place in places]
        shares.append(Share(row, tiles, ranges))
        row += new
        slots += (-(-(cached + new) // size) + 3) * size
    return Work(shares), slots


@pytest.mark.parametrize("threads", [1, 3])
@settings(max_examples=60, deadline=None)
@given(case=works())
def test_requests_of_a_step_in_scattered_pages(threads: int, case: tuple[Work, int]) -> None:
    work, slots = case
    tokens = sum(max(tile.rows.stop for tile in share.tiles) for share in work.shares)
    q, kv = random_inputs(tokens, slots, (8, 2), 32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = run(kernel_for(CPU), q, kv, work, 0.2)
    finally:
        torch.set_num_threads(before)
    assert_close(ours, run(Tiled(reference.attention), q, kv, work, 0.2))
    assert_close(ours, run(Tiled(cpu.attention), q, kv, work, 0.2))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_long_contexts_are_split_over_threads(kernel: Kernel, threads: int, tokens: int) -> None:
    q, kv = random_inputs(tokens, 9_001, (8, 2), 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = run(kernel, q, kv, whole(tokens, 9_001), 0.125)
    finally:
        torch.set_num_threads(before)
    assert_close(ours, run(Tiled(reference.attention), q, kv, whole(tokens, 9_001), 0.125))


def cut_in(sizes: Sequence[int]) -> list[slice]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("tokens", [1, 9])
def test_it_merges_into_what_the_state_holds(kernel: Kernel, tokens: int) -> None:
    sizes = [0, 1, 130, 0, 7, 62]
    q, kv = random_inputs(tokens, sum(sizes), (8, 2), 64)
    state = AttentionState.empty(tokens, 8, 64, CPU)
    state.out.fill_(math.nan)  # what an empty state holds is nobody's business
    for place in cut_in(sizes):
        length = place.stop - place.start
        kernel(state, q, kv[:, :, place], whole(tokens, length), scale=0.125)
    expected = run(Tiled(reference.attention), q, kv, whole(tokens, sum(sizes)), 0.125)
    assert_close(state, expected)


def test_only_the_rows_of_the_work_change(kernel: Kernel) -> None:
    q, kv = random_inputs(6, 50, (4, 2), 64)
    state = AttentionState(torch.full((6, 4, 64), 7.0), torch.full((6, 4), 0.5))
    work = Work([Share(2, [Tile(slice(0, 2), slice(0, 50), False)], [slice(0, 50)])])
    kernel(state, q, kv, work, scale=0.125)
    kept = [0, 1, 4, 5]
    assert bool((state.out[kept] == 7).all())
    assert bool((state.lse[kept] == 0.5).all())
    assert bool((state.out[2:4] != 7).any(-1).all())
    assert bool((state.lse[2:4] > 0.5).all())
