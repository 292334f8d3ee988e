"""Fast linear layers compute what `nn.Linear` does, row by row, with or without a compiler."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longspan import compiled
from longspan.worker import linear
from longspan.worker.linear import FEW_ROWS, FastLinear, use_fast_linears

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).eval()


def exact(plain: nn.Linear, x: Tensor) -> Tensor:
    return copy.deepcopy(plain).double()(x.double())


def assert_exact(found: Tensor, plain: nn.Linear, x: Tensor) -> None:
    """Up to one rounding to the dtype, and float32's of the sum."""
    expected = exact(plain, x)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    allowed = torch.finfo(x.dtype).eps / 2 * expected.abs() + 1e-6
    assert (error <= 1.01 * allowed).all(), float((error - allowed).max())


@pytest.fixture(params=["compiled", "without a compiler"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without a compiler":
        monkeypatch.setattr(linear, "library", lambda source: None)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, FEW_ROWS, FEW_ROWS + 1, 200])
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"), [(64, 32, False), (96, 7, True), (50, 9, True), (16, 1, False)]
)
@torch.inference_mode()
def test_it_computes_what_a_linear_layer_does(
    way: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    plain = layer(inputs, outputs, dtype, bias)
    x = torch.randn(2, rows, inputs).to(dtype)[:1]
    assert_exact(FastLinear(plain)(x), plain, x)


@torch.inference_mode()
def test_it_was_compiled_here() -> None:
    """Or the tests above test one thing twice."""
    assert FastLinear(layer(32, 8, torch.bfloat16))._kernel is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_a_large_half_precision_layer_is_widened_in_blocks(dtype: torch.dtype) -> None:
    plain = layer(linear.BLOCK_WEIGHTS // 1000, 2500, dtype, bias=True)
    x = torch.randn(40, plain.in_features).to(dtype)
    assert_exact(FastLinear(plain)(x), plain, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_row_does_not_depend_on_those_beside_it(dtype: torch.dtype) -> None:
    fast = FastLinear(layer(256, 130, dtype))
    x = torch.randn(FEW_ROWS, 256).to(dtype)
    together = fast(x)
    for rows in range(1, 8):
        parts = [fast(part) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), together), rows


@torch.inference_mode()
def test_threads_change_nothing() -> None:
    fast = FastLinear(layer(512, 515, torch.float32))
    assert fast.weight.numel() > linear.PARALLEL_WEIGHTS
    x, threads = torch.randn(3, 512), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fast(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.inference_mode()
def test_inputs_of_any_strides() -> None:
    plain = layer(64, 24, torch.bfloat16)
    x = torch.randn(64, 6).bfloat16().t()
    assert_exact(FastLinear(plain)(x), plain, x)


@torch.inference_mode()
def test_infinities_and_nans_stay() -> None:
    plain = layer(32, 8, torch.bfloat16)
    x = torch.ones(3, 32).bfloat16()
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    found = FastLinear(plain)(x)
    assert found[0].isnan().all()
    assert found[1].isinf().all()
    assert found[2].isfinite().all()


def test_only_plain_layers_are_replaced_and_keep_their_parameters() -> None:
    class Own(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.SiLU())])
            self.own = Own(16, 16)
            self.head = nn.Linear(16, 10, bias=False)
            self.head.weight = self.embed.weight

    model = Model()
    before = dict(model.named_parameters())
    use_fast_linears(model)
    assert all(a is b for a, b in zip(before.values(), model.parameters(), strict=True))
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert type(model.layers[0][0]) is FastLinear
    assert type(model.own) is Own
    assert type(model.head) is FastLinear
    assert model.head.weight is model.embed.weight


def test_without_a_compiler_a_warning_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "some.cpp"
    source.write_text("this is no C++")
    for compiler, cause in (("/no/such/compiler", "No such file"), (None, "error")):
        monkeypatch.setenv("CXX", compiler) if compiler else monkeypatch.delenv("CXX")
        compiled.library.cache_clear()
        assert compiled.library(source) is None
        assert "some.cpp can't be compiled, so slower code is used" in caplog.text
        assert cause in caplog.text
    compiled.library.cache_clear()
