"""Known numbers are found again in figures that were made of them, also in noisy ones."""

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.cost.fit import fit

SIZES = (64, 4096, 65_536, 1_000_000, 16_000_000)


@given(st.floats(1e-7, 1e-2), st.floats(1e-12, 1e-8))
def test_latency_and_bandwidth_of_exact_figures(seconds: float, byte: float) -> None:
    rows = [[1, size] for size in SIZES]
    found = fit(rows, [seconds + byte * size for size in SIZES])
    assert found == pytest.approx([seconds, byte], rel=1e-5)


def test_noise_of_a_tenth_moves_them_by_no_more() -> None:
    random = Random(1)
    rows = [[1, size] for size in SIZES] * 20
    exact = [50e-6 + size / 2e9 for _, size in rows]
    found = fit(rows, [value * random.uniform(0.9, 1.1) for value in exact])
    assert found == pytest.approx([50e-6, 1 / 2e9], rel=0.1)


def test_small_figures_count_as_much_as_large_ones() -> None:
    """One figure of a second in 20 is wrong by half: the microseconds say what the latency is."""
    rows = [[1, size] for size in SIZES]
    values = [5e-6 + size / 1e9 for size in SIZES]
    values[-1] *= 1.5
    assert fit(rows, values)[0] == pytest.approx(5e-6, rel=0.05)


def test_no_unknown_is_negative() -> None:
    """A line through these would begin below 0."""
    assert fit([[1, 1], [1, 2]], [1, 3], scales=[1, 1]) == pytest.approx([0, 1.4])
    assert fit([[1], [2]], [-1, -2], scales=[1, 1]) == [0]


@pytest.mark.parametrize("rows", [[[1, 2], [1, 2]], [[1, 0], [2, 0]]])
def test_columns_that_say_nothing_new_are_0(rows: Sequence[Sequence[float]]) -> None:
    found = fit(rows, [sum(row) for row in rows])
    assert 0 in found
    assert [sum(map(float.__mul__, map(float, row), found)) for row in rows] == pytest.approx(
        [sum(row) for row in rows]
    )


def test_scales_say_what_an_error_is_a_part_of() -> None:
    assert fit([[1], [1]], [1.0, 2.0], scales=[1.0, 1.0]) == pytest.approx([1.5])
    assert fit([[1], [1]], [1.0, 2.0], scales=[1.0, 1e6]) == pytest.approx([1.0])
