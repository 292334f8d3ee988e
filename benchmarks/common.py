"""What all benchmarks share: the machine, a random model, quantiles, tables, one document."""

import json
import os
import platform
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import longspan

VOCAB_SIZE = 4096


def machine() -> str:
    """The processor, what its vector units do, and how many cores there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    units = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_avx512_bf16_supported():
        units += " with bfloat16"
    return f"{names[0] if names else platform.machine()} ({units}), {os.cpu_count()} cores"


def one_thread_each() -> None:
    """Let this process and all that it will start compute with one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def build_model(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Save a random Llama in float32, the same every time; returns its sizes.

    Rows of the last layer differ in length, so that the best token is clearly the best: in batches
    of other sizes sums round differently, and tokens are to be the same all the same.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB_SIZE,
        **overrides,
    }
    config = LlamaConfig(
        max_position_embeddings=1 << 17,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.lm_head.weight *= torch.exp(0.7 * torch.randn(sizes["vocab_size"], 1))
    model.save_pretrained(folder)
    return sizes


def random_tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least this part of all are not above."""
    ordered = sorted(values)
    return ordered[max(-int(-part * len(ordered) // 1), 1) - 1]


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Rows under the names of the first one's columns; numbers to the right, texts to the left."""
    names = list(rows[0])
    table = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [isinstance(rows[0][name], str) for name in names]
    for line in table:
        cells = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ]
        print("  ".join(cells).rstrip(), flush=True)
    print(flush=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def finish(benchmark: str, rows: object, output: str | Path | None = None, **more: object) -> None:
    """Print all figures as one JSON document on the last line, and save it if asked to."""
    document = {
        "benchmark": benchmark,
        "longspan": longspan.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "machine": machine(),
        **more,
        "rows": rows,
    }
    if output:
        Path(output).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
