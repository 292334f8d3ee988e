"""Fused layers compute what a model's own modules do, and other layers are left as they are."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from zoo import build

from longspan.worker import fused_layer, hf_attention
from longspan.worker.fused_layer import FusedLayer, fuse_layers
from longspan.worker.linear import FEW_ROWS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

LAYERS = 3
FUSED = ("llama", "qwen2", "qwen3", "mistral", "smollm3")
OTHERS = ("gemma", "phi3", "olmo2", "granite", "mixtral", "qwen3_moe")


def load(name: str, folder: Path, dtype: torch.dtype, **overrides: Any) -> nn.Module:
    hf_attention.register()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        build(name, folder / name, **overrides),
        dtype=dtype,
        attn_implementation=hf_attention.NAME,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():  # norms and biases that are 1 and 0 would prove little
            if weight.ndim == 1:
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


class Neighbours:
    """Attention in which each token sees itself alone, as a step has it; it may be of use in the
    last layer for some rows alone."""

    def __init__(self, drawn: Sequence[int] | None = None) -> None:
        self.drawn = None if drawn is None else torch.tensor(drawn, dtype=torch.int64)
        self.attended: list[int] = []

    def rows(self, layer: int) -> Tensor | None:
        return self.drawn if layer == LAYERS - 1 else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.attended.append(len(q))
        group = q.shape[1] // k.shape[1]
        if len(q) < len(k):
            k, v = k[self.drawn], v[self.drawn]
        k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
        return v * torch.tanh((q.float() * k).sum(-1, keepdim=True)) + layer


@torch.inference_mode()
def logits(model: nn.Module, rows: int, step: Neighbours | None = None, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, 512, (1, rows), generator=generator)
    positions = torch.randint(0, 5000, (1, rows), generator=generator)
    output = model(
        input_ids=tokens,
        position_ids=positions,
        use_cache=False,
        step=step or Neighbours(),
        **kwargs,
    )
    found: Tensor = output.logits[0]
    return found


def assert_close(found: Tensor, expected: Tensor, exact: Tensor) -> None:
    """As near to the exact logits as the model's own modules come, or nearly."""
    own = (expected.double() - exact).abs().max()
    error = (found.double() - exact).abs().max()
    assert error <= 1.5 * own + 1e-5 * exact.abs().max(), (error, own, exact.abs().max())


def assert_close_on_average(found: Tensor, expected: Tensor, exact: Tensor) -> None:
    """By the root of the mean square."""
    own, error = ((x.double() - exact).square().mean().sqrt() for x in (expected, found))
    size = exact.square().mean().sqrt()
    assert error <= 1.2 * own + 5e-6 * size, (error, own, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_it_computes_what_the_modules_do(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(name, tmp_path, dtype)
    exact_model = copy.deepcopy(model).double()
    rows = (1, 2, 3, 7, 8, FEW_ROWS, FEW_ROWS + 1, 100, 1300)  # of many one is far off by chance
    expected = [logits(model, count) for count in rows]
    assert len(fuse_layers(model)) == LAYERS
    found, exact = ([logits(m, count) for count in rows] for m in (model, exact_model))
    assert_close_on_average(torch.cat(found), torch.cat(expected), torch.cat(exact))
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return  # its inputs are rounded as the modules' are, so the largest of few errors is chance
    for each in zip(found[:6], expected, exact, strict=False):
        assert_close(*each)


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_left_alone(name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path, torch.float32)
    before = logits(model, 5)
    assert not fuse_layers(model)
    assert torch.equal(logits(model, 5), before)


@pytest.mark.parametrize(
    "overrides",
    [{"head_dim": 8}, {"rms_norm_eps": 1.0}, {"attention_bias": True, "mlp_bias": True}],
    ids=str,
)
def test_what_a_config_can_change_is_taken_over(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = load("llama", tmp_path, torch.float32, **overrides)
    exact, own = copy.deepcopy(model).double(), logits(model, 5)
    assert len(fuse_layers(model)) == LAYERS
    assert_close(logits(model, 5), own, logits(exact, 5))


def test_what_only_looks_alike_is_found_out(tmp_path: Path) -> None:
    model = load("llama", tmp_path, torch.float32, hidden_act="gelu")
    before = logits(model, 5)
    assert not fuse_layers(model)
    assert torch.equal(logits(model, 5), before)


@torch.inference_mode()
def test_a_row_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    model = load("llama", tmp_path, torch.float32)
    assert len(fuse_layers(model)) == LAYERS
    together = logits(model, 9)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, 512, (1, 9), generator=generator)
    positions = torch.randint(0, 5000, (1, 9), generator=generator)
    for row in range(9):
        alone = model(
            input_ids=tokens[:, row : row + 1],
            position_ids=positions[:, row : row + 1],
            use_cache=False,
            step=Neighbours(),
        )
        states = alone.logits[0, 0]
        assert torch.allclose(states, together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("drawn", [[], [4], [0, 3, 4]], ids=str)
def test_the_last_layer_is_computed_for_drawn_rows_alone(
    drawn: list[int], rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load("qwen3", tmp_path, dtype)
    steps = [Neighbours(drawn) for _ in range(2)]
    modules, whole = logits(model, rows, steps[0])[drawn], logits(model, rows)[drawn]
    assert torch.equal(modules, whole)
    assert len(fuse_layers(model)) == LAYERS
    found, whole = logits(model, rows, steps[1])[drawn], logits(model, rows)[drawn]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5 if dtype.itemsize == 4 else 2e-2)
    for step in steps:
        assert step.attended == [rows] * (LAYERS - 1) + [len(drawn)]


def test_too_few_rows_for_all_threads_go_through_the_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama", tmp_path, torch.float32)
    before = logits(model, 100)
    assert len(fuse_layers(model)) == LAYERS
    assert not torch.equal(logits(model, 100), before)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert torch.equal(logits(model, 100), before)


def test_without_a_compiler_nothing_is_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_layer, "library", lambda source: None)
    model = load("llama", tmp_path, torch.float32)
    assert not fuse_layers(model)
    assert not any(isinstance(module.forward, FusedLayer) for module in model.modules())
