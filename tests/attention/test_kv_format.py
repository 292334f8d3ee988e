"""Rows of keys and values come back as they were, or in int8 off by half a scale at most."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention.kv_format import decode, encode, row_length
from longspan.cost.kv_shape import KVShape
from longspan.models import ModelSpec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_floats(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 8)
    assert torch.equal(decode(encode(x, dtype)), x.to(dtype))
    assert row_length(8, dtype) == 8


@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
def test_int8_is_off_by_half_a_scale(seed: int, size: float) -> None:
    x = torch.randn(7, 2, 64, generator=torch.Generator().manual_seed(seed)) * size
    rows = encode(x, torch.int8)
    assert rows.shape == (7, 2, row_length(64, torch.int8)) == (7, 2, 68)
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((decode(rows) - x).abs() <= 0.5001 * scale).all())


def test_rows_of_zeros_stay_zeros() -> None:
    assert torch.equal(decode(encode(torch.zeros(3, 2, 16), torch.int8)), torch.zeros(3, 2, 16))


def test_the_same_numbers_give_the_same_rows_whatever_lies_beside_them() -> None:
    x = torch.randn(9, 2, 16)
    assert torch.equal(encode(x, torch.int8)[3:5], encode(x[3:5], torch.int8))


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16", "int8"])
def test_rows_have_the_bytes_that_are_counted_with(kept: str) -> None:
    """Pools and messages are planned by `KVShape`, which knows of no tensors."""
    spec = ModelSpec("m", "A", 1, 2, 1, 80, 99, 99, (), "float32", kept, num_active_parameters=9)
    key_and_value = encode(torch.zeros(2, 80), getattr(torch, kept))
    assert KVShape.of(spec).token_bytes == key_and_value.nbytes
