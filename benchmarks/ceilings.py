"""What this machine can do at best: matrix products in attention's shapes, and memory reads.

Kernel benchmarks divide by these. A matrix product is a tile of attention, in cache: 256 queries
of size 64 by 512 keys (Q K^T), and the weights by as many values (P V); a size 128 likewise. Rates
are for one thread. Reads sum more memory than caches hold, by one thread, two threads of one
process, and two processes at the same time (both together). Each figure is the best of some turns:
a ceiling.

    python benchmarks/ceilings.py [--output FILE]
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from common import finish, print_table
from torch import Tensor

QUERIES, KEYS = 256, 512
HEAD_DIMS = (64, 128)
TILES = 4
"""Products in one call; all of them stay in the second level's cache or near it."""
READ_BYTES = 512 << 20
TURNS = 7
SECONDS = 0.1
"""Least length of a turn."""

Row = dict[str, Any]


def matmul_flops(dtype: torch.dtype, head_dim: int = 64, threads: int = 1) -> float:
    """Matrix products in FLOP/s of all threads, the better of Q K^T and P V."""
    with num_threads(threads):
        q = torch.randn(TILES, QUERIES, head_dim).to(dtype)
        k = torch.randn(TILES, KEYS, head_dim).to(dtype)
        p = torch.randn(TILES, QUERIES, KEYS).to(dtype)
        scores, out = torch.empty_like(p), torch.empty_like(q)
        seconds = min(
            best_time(lambda: torch.bmm(q, k.transpose(1, 2), out=scores)),
            best_time(lambda: torch.bmm(p, k, out=out)),
        )
    return 2 * TILES * QUERIES * KEYS * head_dim / seconds


def read_bandwidth(threads: int = 1) -> float:
    """Bytes a second that so many threads of this process read from memory."""
    with num_threads(threads):
        return READ_BYTES / best_time(_reader())


def read_bandwidth_of_processes(processes: int = 2) -> float:
    """Bytes a second that so many processes of one thread read at the same time, all together."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.SimpleQueue()
    started = [
        context.Process(target=_read_beside, args=(start, results)) for _ in range(processes)
    ]
    for process in started:
        process.start()
    rates = [results.get() for _ in started]
    for process in started:
        process.join()
    return sum(rates)


def _read_beside(start: Barrier, results: Any) -> None:
    with num_threads(1):
        read = _reader()
        read()
        start.wait()
        begun, turns = time.perf_counter(), 20
        for _ in range(turns):
            read()
        results.put(turns * READ_BYTES / (time.perf_counter() - begun))


def _reader() -> Callable[[], Tensor]:
    # Integers are added as fast as they come; a dot product of floats would wait for its sums.
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return numbers.sum


def best_time(work: Callable[[], object], turns: int = TURNS) -> float:
    """The least mean seconds of a call, of some turns."""
    work()
    calls, best = 1, float("inf")
    for _ in range(turns):
        while True:
            begun = time.perf_counter()
            for _ in range(calls):
                work()
            seconds = time.perf_counter() - begun
            if seconds >= SECONDS:
                break
            calls *= 2
        best = min(best, seconds / calls)
    return best


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for dtype, head_dim in product((torch.float32, torch.bfloat16), HEAD_DIMS):
        name = f"matrix products, {str(dtype).removeprefix('torch.')}, head size {head_dim}"
        rate = matmul_flops(dtype, head_dim) / 1e9
        rows.append({"ceiling": name, "unit": "GFLOP/s a thread", "value": rate})
    for name, bandwidth in (
        ("reads, 1 thread", read_bandwidth(1)),
        ("reads, 2 threads", read_bandwidth(2)),
        ("reads, 2 processes of 1 thread", read_bandwidth_of_processes(2)),
    ):
        rows.append({"ceiling": name, "unit": "GB/s", "value": bandwidth / 1e9})
    print_table(rows)
    finish("ceilings", rows, options.output)


if __name__ == "__main__":
    main()
