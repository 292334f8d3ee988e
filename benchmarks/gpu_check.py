"""On a machine with a GPU: is everything right there, and how far is it from what the GPU can do?

Correctness: the kernel against the reference in float32, for every type; greedy tokens of engines
with 1 and 2 ranks against `model.generate` (two ranks share a GPU if there is but one, over gloo).
Speed: attention in TFLOP/s and GB/s, and the part of what `torch.matmul` and a copy reach beside
it; time to the first token and for each further one of a random model in the shape of
Llama-3.1-8B, against transformers, for the prompts that fit the GPU.

Writes one JSON document to benchmarks/results/ and prints it on the last line. Status 1: something
is wrong; 2: there is no GPU. The large model takes 16 GB of the folder for temporary files.

    python benchmarks/gpu_check.py [--without-model] [--output FILE]
"""

import argparse
import gc
import itertools
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import build_model, finish, print_table, random_tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteriaList,
)
from transformers.utils import logging

from longspan import LLM, SamplingParams
from longspan.attention import reference
from longspan.attention.cuda import attention
from longspan.errors import RankFailedError
from longspan.worker.launch import SHARE_GPU

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is. A test runs the same in miniature on the CPU."""

    checked: Sequence[tuple[int, int]] = ((1, 1), (1, 5000), (3, 700), (40, 333), (300, 300))
    """Queries and keys of what is compared; where they are as many, also causal."""
    checked_heads: Sequence[tuple[int, int]] = ((32, 8), (14, 2), (6, 6), (8, 1))
    checked_dims: Sequence[int] = (64, 80, 128, 256)
    checked_prompts: Sequence[int] = (5, 700, 3000)
    backend: str | None = None
    """Of the ranks of a small model, by default processes from 2 on."""
    matrix: int = 8192
    copied_bytes: int = 2**30
    timed_heads: Sequence[tuple[int, int, int]] = ((32, 8, 128), (8, 2, 64))
    """Query heads, key/value heads, head size."""
    prefills: Sequence[int] = (2048, 8192, 32_768)
    decodes: Sequence[int] = (8192, 32_768, 131_072, 524_288)
    repeats: int = 5
    model: Mapping[str, int] = field(default_factory=lambda: LLAMA_8B)
    prompts: Sequence[int] = (8192, 32_768, 131_072, 262_144, 524_288)
    new_tokens: int = 33


WARM = 256
"""Tokens of a prompt whose time does not count."""


def random_inputs(
    tokens: int, keys: int, heads: tuple[int, int], head_dim: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], and k, v [S, G, D] as they lie in a pool."""
    q = torch.randn(tokens, heads[0], head_dim, device=like.device)
    k, v = torch.randn(2, heads[1], keys, head_dim, device=like.device).to(like.dtype)
    return q.to(like.dtype), k.transpose(0, 1), v.transpose(0, 1)


def check_kernel(device: torch.device, sizes: Sizes) -> list[Row]:
    """For each type and head size the largest error, as a part of what is allowed.

    Half precision may round each weight once: an error of eps times the weighted mean of |v|.
    """
    rows = []
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, head_dim in itertools.product(dtypes, sizes.checked_dims):
        like = torch.empty(0, dtype=dtype, device=device)
        eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        worst = 0.0
        for heads, (tokens, keys) in itertools.product(sizes.checked_heads, sizes.checked):
            q, k, v = random_inputs(tokens, keys, heads, head_dim, like)
            for causal in {False, tokens == keys}:
                ours, theirs, of_v = (
                    function(q, k, values, scale=head_dim**-0.5, causal=causal)
                    for function, values in (
                        (attention, v),
                        (reference.attention, v),
                        (reference.attention, v.abs()),
                    )
                )
                allowed = 2e-6 + 1e-5 * theirs.out.abs() + eps * of_v.out
                worst = max(
                    worst,
                    part_of_allowed(ours.out, theirs.out, allowed),
                    part_of_allowed(ours.lse, theirs.lse, 2e-6 + 1e-5 * theirs.lse.abs()),
                )
        what = f"attention, {name_of(dtype)}, head size {head_dim}"
        rows.append({"check": what, "of_allowed": worst, "right": worst <= 1.0})
    return rows


def part_of_allowed(found: Tensor, expected: Tensor, allowed: Tensor) -> float:
    return float(((found - expected).abs() / allowed).nan_to_num(torch.inf).max())


def check_engine(device: torch.device, folder: Path, sizes: Sizes) -> list[Row]:
    """Greedy tokens of a small model in float32. No rank of two can hold the longest prompt."""
    build_model(folder)
    rng = random.Random(0)
    prompts = [random_tokens(rng, length) for length in sizes.checked_prompts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    expected = [generated(model, prompt, 16) for prompt in prompts]
    given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    rows = []
    for ranks in (1, 2):
        pool = max(sizes.checked_prompts) // ranks + 64
        with engine(folder, "float32", device, ranks, pool, sizes.backend) as llm:
            outputs = llm.generate(given, greedy(16), use_tqdm=False)
        right = [output.outputs[0].token_ids for output in outputs] == expected
        rows.append({"check": f"tokens of {ranks} rank(s)", "of_allowed": None, "right": right})
    return rows


def time_attention(device: torch.device, sizes: Sizes) -> list[Row]:
    """Prefill against matrix products, decode against a copy, which reads and writes."""
    source, target = torch.zeros(2, sizes.copied_bytes, dtype=torch.uint8, device=device)
    copied = 2 * len(source) / seconds(lambda: target.copy_(source), device, sizes.repeats)
    shapes = (
        *((size, size, True) for size in sizes.prefills),
        *((min(sizes.prefills), size, False) for size in sizes.prefills),
        *((1, size, False) for size in sizes.decodes),
    )
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        like = torch.empty(0, dtype=dtype, device=device)
        a, b = torch.randn(2, sizes.matrix, sizes.matrix, device=device).to(dtype)
        multiplied = 2 * sizes.matrix**3 / seconds(lambda: a @ b, device, sizes.repeats)  # noqa: B023
        for (heads, kv_heads, head_dim), (tokens, keys, causal) in itertools.product(
            sizes.timed_heads, shapes
        ):
            q, k, v = random_inputs(tokens, keys, (heads, kv_heads), head_dim, like)
            taken = seconds(
                lambda: attention(q, k, v, scale=head_dim**-0.5, causal=causal),  # noqa: B023
                device,
                sizes.repeats,
            )
            flops = 4 * tokens * keys * heads * head_dim * (0.5 if causal else 1.0) / taken
            read = (k.nbytes + v.nbytes) / taken
            rows.append(
                {
                    "dtype": name_of(dtype),
                    "heads": f"{heads}/{kv_heads} of {head_dim}",
                    "queries": tokens,
                    "keys": keys,
                    "mask": "causal" if causal else "none",
                    "ms": 1e3 * taken,
                    "tflop_s": flops / 1e12,
                    "of_matmul": flops / multiplied,
                    "kv_gb_s": read / 1e9,
                    "of_copy": read / copied,
                }
            )
    return rows


def time_engines(device: torch.device, folder: Path, sizes: Sizes) -> list[Row]:
    """Seconds to the first token and for each further one, in bfloat16: one rank, no batch."""
    prompt = random_tokens(random.Random(1), max(sizes.prompts))
    weights, rows = time_transformers(device, folder, prompt, sizes)
    gc.collect()
    torch.cuda.empty_cache()
    shape, margin = sizes.model, sizes.new_tokens + 64
    token_bytes = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    most = (0.85 * memory_of(device) - weights) / token_bytes - margin
    lengths = [length for length in sizes.prompts if length <= most]
    with engine(folder, "bfloat16", device, 1, max(lengths, default=WARM) + margin) as llm:

        def timed(prompt: list[int]) -> tuple[float, float]:
            given: Any = {"prompt_token_ids": prompt}
            [output] = llm.generate(given, greedy(sizes.new_tokens), use_tqdm=False)
            metrics = output.metrics
            assert metrics is not None
            first, further = metrics.time_to_first_token, metrics.time_per_output_token
            assert first is not None
            assert further is not None
            return first, further

        return rows + measure("longspan", lengths, prompt, timed)


def time_transformers(
    device: torch.device, folder: Path, prompt: list[int], sizes: Sizes
) -> tuple[int, list[Row]]:
    """The bytes of the model's weights, and the rows of transformers."""
    model = build_large(device, folder, sizes)

    def timed(prompt: list[int]) -> tuple[float, float]:
        begun, drawn = time.perf_counter(), []

        def note_the_time(ids: Tensor, _: object, **__: object) -> Tensor:
            synchronize(device)
            drawn.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=device)  # whether to stop

        generated(model, prompt, sizes.new_tokens, [note_the_time])
        return drawn[0] - begun, (drawn[-1] - drawn[0]) / (len(drawn) - 1)

    rows = measure("transformers", sizes.prompts, prompt, timed)
    return sum(parameter.nbytes for parameter in model.parameters()), rows


def measure(
    name: str,
    lengths: Sequence[int],
    prompt: list[int],
    timed: Callable[[list[int]], tuple[float, float]],
) -> list[Row]:
    """A row for each length, up to the first that fails."""
    timed(prompt[:WARM])
    rows = []
    for length in lengths:
        try:
            first, further = timed(prompt[:length])
        except (torch.OutOfMemoryError, RankFailedError) as error:
            print(f"{name} failed at {length:,} tokens: {error}")
            break
        rows.append(
            {"engine": name, "prompt_tokens": length, "ttft_s": first, "tpot_ms": 1e3 * further}
        )
    return rows


def build_large(device: torch.device, folder: Path, sizes: Sizes) -> LlamaForCausalLM:
    """A random model on the device, which is saved, too."""
    config = LlamaConfig(
        max_position_embeddings=1 << 20, bos_token_id=None, eos_token_id=None, **sizes.model
    )
    config.dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    return model


def engine(
    folder: Path,
    dtype: str,
    device: torch.device,
    ranks: int,
    pool: int,
    backend: str | None = None,
) -> LLM:
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        os.environ[SHARE_GPU] = "1"
    return LLM(
        str(folder),
        dtype=dtype,
        device=device.type,
        context_parallel_size=ranks,
        distributed_executor_backend=backend,
        kv_cache_tokens=pool,
        enable_prefix_caching=False,  # the prompts come again
    )


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def generated(
    model: Any, prompt: list[int], tokens: int, after_each: Sequence[Callable[..., Tensor]] = ()
) -> list[int]:
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        stopping_criteria=StoppingCriteriaList(after_each),
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of work, of which ten at a time are given to the device."""

    def ten() -> float:
        begun = time.perf_counter()
        for _ in range(10):
            work()
        synchronize(device)
        return (time.perf_counter() - begun) / 10

    ten()
    return median(ten() for _ in range(repeats))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(device: torch.device, sizes: Sizes, with_model: bool = True) -> dict[str, list[Row]]:
    """All tables, each printed when it is there."""
    found: dict[str, list[Row]] = {}
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "checks": lambda folder: [
            *check_kernel(device, sizes),
            *check_engine(device, folder, sizes),
        ],
        "attention": lambda _: time_attention(device, sizes),
    }
    if with_model:
        parts["engines"] = lambda folder: time_engines(device, folder, sizes)
    for name, part in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = part(Path(folder))
        print_table(found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--without-model", action="store_true", help="leave the large model out")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/gpu-NAME.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: gpu-check needs a GPU that PyTorch can use; there is none", file=sys.stderr)
        sys.exit(2)
    logging.disable_progress_bar()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}\n")
    found = run(torch.device("cuda", 0), Sizes(), not options.without_model)
    file = "gpu-" + re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"
    output = options.output or Path(__file__).with_name("results") / file
    checks = found.pop("checks")
    finish("gpu_check", checks, output, gpu=gpu, **found)
    sys.exit(0 if all(row["right"] for row in checks) else 1)


if __name__ == "__main__":
    main()
