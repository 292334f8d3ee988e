"""Which strategy is fastest, which one the engine takes, and what its choice costs: the regret.

Attention of one request in one step, as a worker computes it (`worker/step.py`), with real gloo
processes of one thread each, float32, 8 query and 2 KV heads of size 64. The grid: new and cached
tokens, 2 to 4 ranks, on one host over loopback, or over two hosts (network namespaces) with a link
of 10 or 1 Gbit/s. In each cell all strategies take turns; a turn is some layers in a row, and ends
with the last rank. The engine's choice is the one that the scheduler would make. Regret is the
chosen strategy's median time over the least median, minus one; at best it is 0. Aim: at most 10 %
in at least 90 % of the cells.

`noise` is how far a turn of the chosen or the best strategy usually is from its median (half the
distance between quartiles), whichever is more: regret below it says little. More ranks than cores
make more of it. The last line is one JSON document.

    python benchmarks/strategies.py [--links loopback 10 1] [--ranks 2 3 4] [--seconds 1]
        [--output FILE]
"""

import argparse
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from common import finish, print_table, verdict
from fleets import Ranks, fleet, unavailable

from longspan.attention.cpu import attention
from longspan.cost.strategy import KVShape, choose
from longspan.engine.shard import fair_shares, zigzag
from longspan.parallel.strategies import STRATEGIES
from longspan.parallel.transport import Transport
from longspan.plan import Extent, Part, RankPlan, Run, Segment, Shard, Strategy
from longspan.topology import Topology
from longspan.worker.kv_pool import KVPool
from longspan.worker.step import Step

NEW = (1, 16, 128, 1024, 4096)
CACHED = (0, 1024, 8192, 32768)
SPLITS = {2: (1, 1), 3: (2, 1), 4: (2, 2)}
PAGE = 16
SHAPE = KVShape(num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64, itemsize=4)
MIN_TURNS, MAX_TURNS = 3, 40
ENOUGH = 0.10
"""Regret that counts as a good choice."""

Row = dict[str, Any]


def shards_of(new: int, cached: int, ranks: int) -> list[Shard]:
    """A chunk over ranks as the engine cuts it: pages, fairly, new ones zigzag; rank 0 is home."""
    pages = [-(-tokens // PAGE) for tokens in (new, cached)]
    new_pages, held = (fair_shares(count, [count] * ranks) for count in pages)
    return [
        Shard(rank, queries, PAGE * share, queries)
        for rank, (runs, share) in enumerate(zip(zigzag(new_pages), held, strict=True))
        for queries in (
            tuple(
                Run(cached + PAGE * run.start, min(PAGE * run.length, new - PAGE * run.start))
                for run in runs
            ),
        )
    ]


def chosen(shards: Sequence[Shard], topology: Topology) -> Strategy:
    """The strategy that the engine takes for a request's chunk."""
    return choose(shards, SHAPE)


def strategies_of(topology: Topology) -> list[str]:
    """All that differ on so many hosts: on one, tree is pass-Q."""
    return [name for name in STRATEGIES if name != "tree" or topology.num_hosts > 1]


def num_layers(new: int) -> int:
    """Layers in a row: many where one would be too short to be timed."""
    return min(16, max(256 // new, 1))


def turns(
    transport: Transport, shards: Sequence[Shard], names: Sequence[str], seconds: float
) -> list[dict[str, tuple[float, float]]]:
    """When each strategy began and ended in each turn on this rank, about `seconds` of turns.

    The first turn warms up and is left out, unless turns take so long that it doesn't matter.
    """
    shard = shards[transport.rank]
    generator = torch.Generator().manual_seed(transport.rank)
    q = torch.randn(shard.num_queries, SHAPE.num_heads, SHAPE.head_dim, generator=generator)
    kv = torch.randn(2, shard.num_queries, SHAPE.num_kv_heads, SHAPE.head_dim, generator=generator)
    steps = {name: step_of(transport, shards, name) for name in names}
    layers = num_layers(sum(each.num_queries for each in shards))

    def turn() -> dict[str, tuple[float, float]]:
        times = {}
        for name, step in steps.items():
            dist.barrier()
            begun = time.perf_counter()
            for layer in range(layers):
                step.attend(layer % SHAPE.num_layers, q, *kv)
            times[name] = begun, time.perf_counter()
        return times

    with torch.inference_mode():
        begun = time.perf_counter()
        first = turn()
        longest = torch.tensor(time.perf_counter() - begun)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        count = max(MIN_TURNS, min(int(seconds / float(longest)), MAX_TURNS))
        kept = [first] if float(longest) > seconds else []
        while len(kept) < count:
            kept.append(turn())
    return kept


def step_of(transport: Transport, shards: Sequence[Shard], name: str) -> Step:
    shard = shards[transport.rank]
    segment = Segment("request", name, tuple(shards))  # type: ignore[arg-type]
    part = Part(segment, (Extent(0, -(-shard.num_keys // PAGE)),))
    plan = RankPlan((0,) * shard.num_queries, (part,), ())
    scale = [SHAPE.head_dim**-0.5] * SHAPE.num_layers
    return Step(plan, pool(transport.rank), transport, attention, scale)


@cache
def pool(rank: int) -> KVPool:
    """Room for the largest share, filled once."""
    pages = -(-(max(NEW) + max(CACHED)) // (min(SPLITS) * PAGE)) + 2
    sizes = SHAPE.num_layers, pages, PAGE, SHAPE.num_kv_heads, SHAPE.head_dim
    made = KVPool(*sizes, torch.float32, torch.device("cpu"))
    made.data.normal_(generator=torch.Generator().manual_seed(rank))
    return made


def measure(ranks: Ranks, new: int, cached: int, seconds: float) -> Row:
    """One cell: milliseconds of a layer with each strategy, and what is chosen."""
    topology = ranks.topology
    shards, names = shards_of(new, cached, topology.num_ranks), strategies_of(topology)
    by_rank = ranks.run(turns, shards, names, seconds)
    layers = num_layers(new)
    timed: dict[str, list[float]] = {name: [] for name in names}
    for turn in zip(*by_rank, strict=True):
        for name in names:
            begun = max(times[name][0] for times in turn)
            ended = max(times[name][1] for times in turn)
            timed[name].append(1e3 * (ended - begun) / layers)
    medians = {name: median(times) for name, times in timed.items()}
    choice, best = chosen(shards, topology), min(medians, key=medians.__getitem__)
    return {
        "new": new,
        "cached": cached,
        **{f"{name}, ms": value for name, value in medians.items()},
        "best": best,
        "chosen": choice,
        "regret, %": 100 * (medians[choice] / medians[best] - 1),
        "noise, %": max(100 * spread(timed[name]) for name in (choice, best)),
        "turns": len(by_rank[0]),
    }


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a part of the median."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / (2 * middle)


def cells(ranks: int) -> list[tuple[int, int]]:
    """New and cached tokens of which every rank has some."""
    return [(new, cached) for cached in CACHED for new in NEW if cached or new >= PAGE * ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--links", nargs="+", default=["loopback", "10", "1"])
    parser.add_argument("--ranks", type=int, nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of turns in each cell")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.links != ["loopback"] and (reason := unavailable()):
        parser.error(f"only --links loopback: {reason}")
    begun, rows = time.monotonic(), list[Row]()
    for link in options.links:
        for size in options.ranks:
            gbit = None if link == "loopback" else float(link)
            sizes = SPLITS[size] if gbit else (size,)
            with fleet(sizes, gbit) as ranks:
                found = [measure(ranks, *cell, options.seconds) for cell in cells(size)]
            name = f"{link} Gbit/s" if gbit else link
            print(f"{name}, ranks {' + '.join(map(str, sizes))}:")
            print_table(found)
            rows += [{"link": name, "ranks": size, **row} for row in found]
    summary = summarize(rows)
    print(f"The grid took {time.monotonic() - begun:.0f} s.")
    finish("strategies", rows, options.output, summary=summary)


def summarize(rows: Sequence[Row]) -> Row:
    """The part of cells with a good choice: of all, and of each link and number of ranks."""
    groups = {"all": list(rows)}
    for row in rows:
        groups.setdefault(f"{row['link']}, {row['ranks']} ranks", []).append(row)
    table = []
    for name, group in groups.items():
        good = sum(row["regret, %"] <= 100 * ENOUGH for row in group)
        table.append(
            {
                "cells": name,
                "number": len(group),
                "within 10 %": good / len(group),
                "worst regret, %": max(row["regret, %"] for row in group),
                "median noise, %": median(row["noise, %"] for row in group),
            }
        )
    print_table(table)
    met = table[0]["within 10 %"]
    print(f"Within 10 % of the best: {met:.1%} of the cells; aim 90 %: {verdict(met >= 0.9)}")
    return {row.pop("cells"): row for row in table}


if __name__ == "__main__":
    main()
