"""`make gpu-check` in miniature: all its steps, on the CPU and in Triton's interpreter."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this system")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / "gpu_check.py"))


@pytest.fixture
def small(script: dict[str, Any]) -> Any:
    return script["Sizes"](
        checked=((1, 3), (5, 5)),
        checked_heads=((2, 1),),
        checked_dims=(16,),
        checked_prompts=(5, 200),
        backend="uni",
        matrix=32,
        copied_bytes=1024,
        timed_heads=((2, 1, 16),),
        prefills=(4,),
        decodes=(8,),
        repeats=1,
        model={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 4096,
        },
        prompts=(40, 300),
        new_tokens=3,
    )


def test_all_parts_run_and_find_everything_right(script: dict[str, Any], small: Any) -> None:
    found = script["run"](CPU, small)
    assert [row["check"] for row in found["checks"] if not row["right"]] == []
    assert len(found["checks"]) == 3 + 2  # types; engines
    for row in found["attention"]:
        assert row["ms"] > 0
        assert row["tflop_s"] > 0
        assert row["kv_gb_s"] > 0
    assert [(row["queries"], row["keys"], row["mask"]) for row in found["attention"][:3]] == [
        (4, 4, "causal"),
        (4, 4, "none"),
        (1, 8, "none"),
    ]
    assert [(row["engine"], row["prompt_tokens"]) for row in found["engines"]] == [
        ("transformers", 40),
        ("transformers", 300),
        ("longspan", 40),
        ("longspan", 300),
    ]
    assert all(row["ttft_s"] > 0 and row["tpot_ms"] > 0 for row in found["engines"])


def test_a_wrong_kernel_is_found(script: dict[str, Any], small: Any) -> None:
    """One that loses a key of 100, and one that gives a NaN."""
    check, right = script["check_kernel"], script["attention"]

    def loses_the_last_key(q: Any, k: Any, v: Any, **more: Any) -> Any:
        return right(q[-1:], k[:-1], v[:-1], scale=more["scale"])

    def gives_nan(q: Any, k: Any, v: Any, **more: Any) -> Any:
        state = right(q, k, v, **more)
        state.out[0, 0, 0] = torch.nan
        return state

    for wrong in (loses_the_last_key, gives_nan):
        check.__globals__["attention"] = wrong
        assert [row["right"] for row in check(CPU, small)] == [False] * 3


def test_without_a_gpu_it_says_so_in_one_line(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as ended:
        script["main"]()
    assert ended.value.code == 2
    line = "error: gpu-check needs a GPU that PyTorch can use; there is none\n"
    assert capsys.readouterr() == ("", line)
