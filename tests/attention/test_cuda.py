"""The kernels for GPUs, run on the CPU by Triton's interpreter, and compiled for GPUs.

What the interpreter cannot show, that tensor cores round the softmax's weights of half-precision
inputs, `make gpu-check` measures on a GPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_kernels import (
    HEADS,
    assert_close,
    assert_equal,
    attention_in_float64,
    every_other_token,
    heads_first,
    inputs,
    interleaved,
)
from torch import Tensor

from longspan.attention import reference
from longspan.attention.kernel import kernel_for
from longspan.attention.state import AttentionState
from longspan.attention.tiled import Tiled

pytest.importorskip("triton", reason="Triton has no wheel for this system")

from longspan.attention import cuda

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_heads = pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}_{heads[1]}")


def assert_is_the_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = 0.125, causal: bool = False
) -> None:
    assert_close(
        cuda.attention(q, k, v, scale=scale, causal=causal),
        reference.attention(q, k, v, scale=scale, causal=causal),
    )


@each_heads
def test_few_queries_and_their_group_are_rows_of_one_product(heads: tuple[int, int]) -> None:
    for tokens, keys in ((1, 7), (3, 33)):
        assert_is_the_reference(*inputs(tokens, keys, heads, 64))


@each_dtype
@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128, 256])
def test_any_head_size_and_type(head_dim: int, dtype: torch.dtype) -> None:
    assert_is_the_reference(*inputs(2, 67, (4, 2), head_dim, dtype), scale=head_dim**-0.5)
    assert_is_the_reference(
        *inputs(19, 19, (4, 2), head_dim, dtype), scale=head_dim**-0.5, causal=True
    )


@each_dtype
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 130])
def test_causal_squares(size: int, dtype: torch.dtype) -> None:
    assert_is_the_reference(*inputs(size, size, (3, 1), 32, dtype), causal=True)


@each_dtype
def test_many_queries_over_many_keys(dtype: torch.dtype) -> None:
    assert_is_the_reference(*inputs(70, 150, (2, 1), 64, dtype))


@pytest.mark.parametrize("keys", [511, 512, 513, 700, 1100, 2080])
def test_keys_of_few_queries_are_split_and_merged(keys: int) -> None:
    q, k, v = inputs(1, keys, (4, 1), 32, torch.bfloat16)
    assert (cuda.num_splits(1, keys, q.device) > 1) == (keys >= 2 * cuda.MIN_SPLIT_KEYS)
    assert_is_the_reference(q, k, v)


@pytest.mark.parametrize("splits", [1, 2, 3, 16, 128])
def test_parts_merge_as_states_do(splits: int) -> None:
    generator = torch.Generator().manual_seed(splits)
    parts = AttentionState(
        torch.randn(splits, 2, 3, 80, generator=generator),
        torch.randn(splits, 2, 3, generator=generator) * 20,
    )
    weights = torch.softmax(parts.lse.double(), 0).unsqueeze(-1)
    expected = AttentionState(
        (parts.out.double() * weights).sum(0), parts.lse.double().logsumexp(0)
    )
    assert_close(cuda.merge_parts(parts), expected)


def test_work_is_split_until_all_multiprocessors_have_some() -> None:
    cpu = torch.device("cpu")
    one = cuda.num_splits(1, 10**6, cpu)
    assert one > cuda.num_splits(2, 10**6, cpu) > 1
    assert cuda.num_splits(one + 1, 10**6, cpu) == 1
    assert cuda.num_splits(1, cuda.MIN_SPLIT_KEYS, cpu) == 1


@pytest.mark.parametrize("level", [-1e4, -100.0, 100.0, 1e4])
def test_scores_of_any_level(level: float) -> None:
    """exp of such scores is infinite or 0, unless the greatest is taken off first."""
    q, k, v = inputs(2, 600, (4, 2), 32)
    q[..., 0], k[..., 0] = level, 1.0
    state = cuda.attention(q, k, v, scale=1.0)
    expected = attention_in_float64(q, k, v, scale=1.0)
    rounding = 8 * abs(level) * torch.finfo(torch.float32).eps  # of the scores themselves
    torch.testing.assert_close(state.out.double(), expected.out, atol=rounding, rtol=1e-5)
    torch.testing.assert_close(state.lse.double(), expected.lse, atol=rounding, rtol=1e-7)


def test_scale_multiplies_the_scores() -> None:
    for scale in (0.0, 0.05, 1.0):
        assert_is_the_reference(*inputs(3, 40, (4, 2), 64), scale=scale)


@pytest.mark.parametrize(("tokens", "keys"), [(0, 0), (0, 5), (5, 0), (1, 0)])
def test_no_queries_and_no_keys_are_normal(tokens: int, keys: int) -> None:
    q, k, v = inputs(tokens, keys, (4, 2), 64)
    nothing = AttentionState.empty(tokens, 4, 64, q.device)
    for causal in (False, True) if tokens == keys else (False,):
        assert_equal(cuda.attention(q, k, v, scale=0.125, causal=causal), nothing)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("view", [interleaved, heads_first, every_other_token])
def test_strides_change_nothing(
    causal: bool, view: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
) -> None:
    packed = inputs(21, 21, (4, 2), 64)
    strided = view(*packed)
    assert not strided[0].is_contiguous()
    assert_equal(
        cuda.attention(*strided, scale=0.125, causal=causal),
        cuda.attention(*packed, scale=0.125, causal=causal),
    )


def test_neither_is_what_lies_beside_the_numbers_read_nor_written() -> None:
    """Blocks are larger than what they hold: a NaN beside it must not get in."""
    q, k, v = (
        torch.full((len(x) + 64, x.shape[1], 128), torch.nan) for x in inputs(5, 40, (4, 2), 80)
    )
    for room, x in zip((q, k, v), inputs(5, 40, (4, 2), 80), strict=True):
        room[: len(x), :, :80] = x
    assert_equal(
        cuda.attention(q[:5, :, :80], k[:40, :, :80], v[:40, :, :80], scale=0.1),
        cuda.attention(*inputs(5, 40, (4, 2), 80), scale=0.1),
    )


def test_keys_as_they_lie_in_a_pool_and_shards_that_merge_to_the_whole() -> None:
    sizes = [0, 1, 70, 0, 7]
    q, k, v = inputs(9, sum(sizes), (4, 2), 64)
    pool = torch.stack((k, v)).transpose(1, 2).contiguous()  # [2, G, S, D]
    state = AttentionState.empty(9, 4, 64, q.device)
    for block in torch.split(pool, sizes, dim=2):
        state.absorb(cuda.attention(q, *block.transpose(1, 2), scale=0.125))
    assert_close(state, reference.attention(q, k, v, scale=0.125))


def test_inputs_stay_as_they_are() -> None:
    before, after = inputs(5, 5, (4, 2), 64), inputs(5, 5, (4, 2), 64)
    cuda.attention(*after, scale=0.125, causal=True)
    assert all(map(torch.equal, before, after))


def test_gpus_have_this_kernel() -> None:
    kernel = kernel_for(torch.device("cuda"))
    assert isinstance(kernel, Tiled)
    assert kernel.attention is cuda.attention


def test_kernels_compile_for_gpus_and_fit_them(tmp_path: Path) -> None:
    """The compiler needs no GPU, and refuses much that the interpreter takes."""
    script = Path(__file__).with_name("compile_for_gpus.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel["name"] for kernel in compiled] == ["attend"] * 3 + ["merge"]
    for kernel in compiled:
        assert kernel["shared_bytes"] <= 99 * 1024, kernel  # per program, the least since Ampere
    assert [kernel["tensor_cores"] for kernel in compiled] == [True, True, False, False]
