"""The CPU attention kernel against what the machine can do: matrix products and memory reads.

Prefill is queries over as many keys, none masked, as percent of the rate of matrix products in
attention's shapes, a thread. Where PyTorch multiplies bfloat16 slower than float32 (no units for
it), the rate of float32 counts for both. Decode is one query, or eight of their own requests, over
32K keys each, as percent of what as many threads read from memory. Ceiling and kernel are measured
in turns; figures are medians of the turns' ratios.

    python benchmarks/attention.py [--turns 5] [--output FILE]
"""

import argparse
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ceilings import best_time, matmul_flops, num_threads, read_bandwidth
from common import finish, print_table

from longspan.attention.kernel import kernel_for
from longspan.attention.kv_format import encode
from longspan.attention.state import AttentionState
from longspan.attention.work import Share, Tile, Work

HEADS, KV_HEADS = 8, 2
PREFILL_TOKENS, DECODE_KEYS = 8192, 32_768
FLOATS = (torch.float32, torch.bfloat16)

Row = dict[str, Any]


def seconds_of(queries: int, requests: int, keys: int, head_dim: int, dtype: torch.dtype) -> float:
    """Of so many queries of each request over so many keys of its own."""
    kernel = kernel_for(torch.device("cpu"))
    q = torch.randn(queries * requests, HEADS, head_dim)
    q = q.to(dtype if dtype.is_floating_point else torch.float32)
    kv = encode(torch.randn(2, KV_HEADS, keys * requests, head_dim), dtype)
    tile = Tile(slice(0, queries), slice(0, keys), causal=False)
    work = Work(
        [
            Share(request * queries, [tile], [slice(request * keys, (request + 1) * keys)])
            for request in range(requests)
        ]
    )
    state = AttentionState.empty(len(q), HEADS, head_dim, q.device)
    return best_time(lambda: kernel(state, q, kv, work, scale=head_dim**-0.5), turns=2)


def prefill(turns: int, dtype: torch.dtype, head_dim: int, threads: int) -> Row:
    flops = 4 * PREFILL_TOKENS**2 * HEADS * head_dim
    rates, parts = [], []
    for _ in range(turns):
        ceiling = max(matmul_flops(kind, head_dim) for kind in {torch.float32, dtype}) * threads
        with num_threads(threads):
            rates.append(flops / seconds_of(PREFILL_TOKENS, 1, PREFILL_TOKENS, head_dim, dtype))
        parts.append(rates[-1] / ceiling)
    what = f"prefill 8K x 8K, head size {head_dim}, {name_of(dtype)}, {threads} thread(s)"
    rate = median(rates) / threads / 1e9
    return {
        "kernel": what,
        "unit": "GFLOP/s a thread",
        "rate": rate,
        "percent": 100 * median(parts),
    }


def decode(turns: int, dtype: torch.dtype, batch: int, threads: int) -> Row:
    row_bytes = encode(torch.zeros(64), dtype).nbytes
    size = 2 * KV_HEADS * DECODE_KEYS * batch * row_bytes
    rates, parts = [], []
    for _ in range(turns):
        ceiling = read_bandwidth(threads)
        with num_threads(threads):
            rates.append(size / seconds_of(1, batch, DECODE_KEYS, 64, dtype))
        parts.append(rates[-1] / ceiling)
    what = f"decode 32K, batch {batch}, {name_of(dtype)}, {threads} thread(s)"
    percent = 100 * median(parts)
    return {"kernel": what, "unit": "GB/s", "rate": median(rates) / 1e9, "percent": percent}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [
        prefill(options.turns, dtype, head_dim, threads)
        for dtype, head_dim, threads in product(FLOATS, (64, 128), (1, 2))
    ]
    rows += [
        decode(options.turns, dtype, batch, threads)
        for dtype, batch, threads in product((*FLOATS, torch.int8), (1, 8), (1, 2))
    ]
    print_table(rows)
    finish("attention", rows, options.output)


if __name__ == "__main__":
    main()
