"""Rows go where their slots are, by C++ and without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longspan.worker import scatter as scattering
from longspan.worker.scatter import scatter


@pytest.fixture(params=["compiled", "without a compiler"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without a compiler":
        monkeypatch.setattr(scattering, "found", lambda *_: None)


def as_it_is(x: Tensor) -> Tensor:
    return x


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def last_part(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=-1)[..., x.shape[-1] :]


def numbers_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("layout", [as_it_is, heads_first, last_part, numbers_first])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_each_row_is_in_its_slot(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, tokens: int
) -> None:
    torch.manual_seed(tokens)
    pools = torch.randint(-99, 99, (2, 3, 40, 12)).to(dtype)
    rows = torch.randint(-99, 99, (tokens, 3, 12)).to(dtype)
    slots = torch.randperm(40)[:tokens]
    expected = pools.clone()
    expected[1][:, slots] = rows.transpose(0, 1)
    scatter(pools[1], slots, layout(rows))
    assert torch.equal(pools, expected)
