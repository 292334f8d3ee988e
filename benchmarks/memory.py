"""Peak memory of ranks at a long prompt against a formula of weights, keys and activations.

Ranks are processes; what each has anyway (Python, PyTorch, the kernels) is the peak of a rank that
serves a model of almost no weights a short prompt, and is taken off. Peaks are the system's
high-water marks of resident memory, from after the model was loaded. Chunks have 2,048 tokens of
each rank to the end (`max_step_time=None`; by default they get shorter), and several ranks use
pass-KV, the strategy that needs most. The formula, float32:

    weights + KV + activations
    KV: the rank's tokens, 2 x layers x kv_heads x head_dim numbers each
    activations: the larger of what a layer's attention and its MLP hold of one chunk at a time, for
    each token 2 hidden (the sum and its norm), and 3 x intermediate for the MLP, or q, k and v, as
    they are and rotated, and the state; with several ranks also two blocks of one layer's keys of
    another rank, on their way round the ring

    python benchmarks/memory.py [--tokens 65536] [--ranks 1 2] [--layers 8] [--output FILE]
"""

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from common import build_model, finish, print_table, random_tokens, verdict

from longspan import LLM, SamplingParams

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
TINY = {**HEADS, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
MIB = 1 << 20
FLOAT = 4
CHUNK = 2048


def peaks(model: Path, ranks: int, tokens: int, prompt: int) -> list[int]:
    """Of each rank, in bytes, while a prompt is computed and one token drawn."""
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // ranks, 1))
    llm = LLM(
        str(model),
        context_parallel_size=ranks,
        distributed_executor_backend="mp",
        kv_cache_tokens=-(-tokens // ranks // 256) * 256 + 1024,
        max_num_batched_tokens=CHUNK,
        max_step_time=None,
        attention_strategy="pass_kv" if ranks > 1 else "auto",
        min_tokens_per_rank=1024 if ranks > 1 else None,
        enable_prefix_caching=False,
    )
    try:
        processes = ranks_of(psutil.Process(), ranks)
        for process in processes:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
        token_ids = random_tokens(random.Random(0), prompt)
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        llm.generate([{"prompt_token_ids": token_ids}], params)
        return [high_water(process.pid) for process in processes]
    finally:
        llm.close()


def ranks_of(process: Any, ranks: int) -> list[Any]:
    """The processes below this one that nobody is below."""
    found = [child for child in process.children(recursive=True) if not child.children()]
    assert len(found) == ranks, found
    return found


def high_water(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def formula(sizes: dict[str, Any], ranks: int, tokens: int) -> dict[str, int]:
    """Bytes of a rank."""
    hidden, inner, layers = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    depth, vocab = sizes["head_dim"], sizes["vocab_size"]
    attention = (2 * heads + 2 * kv_heads) * depth * hidden
    weights = layers * (attention + 3 * hidden * inner + 2 * hidden) + (2 * vocab + 1) * hidden
    key = 2 * kv_heads * depth
    in_attention = 2 * (heads + kv_heads) * depth + kv_heads * depth + heads * depth
    activations = CHUNK * (2 * hidden + max(3 * inner, in_attention))
    blocks = 2 * key * tokens // ranks if ranks > 1 else 0
    parts = {
        "weights": weights,
        "kv": key * layers * tokens // ranks,
        "activations": activations + blocks,
    }
    return {name: FLOAT * numbers for name, numbers in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tiny, model = Path(folder) / "tiny", Path(folder) / "model"
        build_model(tiny, **TINY)
        sizes = build_model(model, num_hidden_layers=options.layers, **HEADS)
        for ranks in options.ranks:
            base = max(peaks(tiny, ranks, 2048, 64))
            parts = formula(sizes, ranks, options.tokens)
            for rank, peak in enumerate(peaks(model, ranks, options.tokens, options.tokens - 1)):
                ratio = (peak - base) / sum(parts.values())
                rows.append(
                    {
                        "ranks": ranks,
                        "rank": rank,
                        **{f"{name} MiB": value / MIB for name, value in parts.items()},
                        "formula MiB": sum(parts.values()) / MIB,
                        "peak MiB": (peak - base) / MIB,
                        "base MiB": base / MIB,
                        "ratio": ratio,
                        "verdict": verdict(abs(ratio - 1) <= 0.15),
                    }
                )
    print_table(rows)
    finish("memory", rows, options.output, tokens=options.tokens, chunk=CHUNK)


if __name__ == "__main__":
    main()
