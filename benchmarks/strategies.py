"""Which strategy is fastest, which one the engine takes, and what its choice costs: the regret.

Attention of one request in one step, as a worker computes it (`worker/step.py`), with real gloo
processes of one thread each, float32, 8 query and 2 KV heads of size 64. The grid: new and cached
tokens, 2 to 4 ranks, on one host over loopback, or over two hosts (network namespaces) with a link
of 10 or 1 Gbit/s. Each fleet first measures itself, as `longspan calibrate` does; the engine's
choice is that of the cost model with these rates. In each cell all strategies take turns; a turn is
some layers in a row, and ends with the last rank. Regret is the chosen strategy's median time over
the least median, minus one; at best it is 0. Aim: at most 10 % in at least 90 % of the cells.

`noise` is how far a turn of the chosen or the best strategy usually is from its median (half the
distance between quartiles), whichever is more: regret below it says little. More ranks than cores
make more of it. The last line is one JSON document, which also has what was predicted.

    python benchmarks/strategies.py [--links loopback 10 1] [--ranks 2 3 4] [--seconds 1]
        [--output FILE]
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from common import build_model, finish, print_table, verdict
from fleets import PAGE_SIZE, Ranks, fleet, runner, unavailable

from longspan.config import EngineConfig
from longspan.cost.choice import choose, predictions
from longspan.cost.kv_shape import KVShape
from longspan.cost.model import CostModel
from longspan.cost.samples import Samples, fit_rates
from longspan.engine.shard import fair_shares, zigzag
from longspan.models import load_spec
from longspan.parallel.transport import Transport
from longspan.plan import Extent, Part, RankPlan, Run, Segment, Shard, Strategy
from longspan.worker.measure import measure
from longspan.worker.model_runner import ModelRunner
from longspan.worker.step import Step

NEW = (1, 16, 128, 1024, 4096)
CACHED = (0, 1024, 8192, 32768)
SPLITS = {2: (1, 1), 3: (2, 1), 4: (2, 2)}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
LAYERS = 4
ROOM = (max(NEW) + max(CACHED)) // min(SPLITS) + 2 * PAGE_SIZE
"""Tokens of the largest share."""
MAX_TURNS = 40
FEW_TURNS = 5
"""Where there are not more turns each takes long, and a cold one hardly differs."""
ENOUGH = 0.10
"""Regret that counts as a good choice."""

Row = dict[str, Any]


def shards_of(new: int, cached: int, ranks: int) -> list[Shard]:
    """A chunk over ranks as the engine cuts it: pages, fairly, new ones zigzag; rank 0 is home."""
    pages, held = (-(-tokens // PAGE_SIZE) for tokens in (new, cached))
    shards = []
    for rank, runs in enumerate(zigzag(fair_shares(pages, [pages] * ranks))):
        starts = [PAGE_SIZE * run.start for run in runs]
        lengths = [PAGE_SIZE * run.length for run in runs]
        queries = tuple(
            Run(cached + start, min(length, new - start))
            for start, length in zip(starts, lengths, strict=True)
        )
        share = fair_shares(held, [held] * ranks)[rank]
        shards.append(Shard(rank, queries, PAGE_SIZE * share, queries))
    return shards


def calibrate(transport: Transport, folder: str) -> Samples:
    """What this rank measures of itself."""
    return measure(runner(transport, folder, ROOM))


def cost_of(ranks: Ranks, folder: str) -> CostModel:
    """The cost model of a fleet as the engine makes it: with what the fleet measures of itself."""
    spec = load_spec(EngineConfig(model=folder))
    samples = ranks.run(calibrate, folder)
    rates = fit_rates(samples, KVShape.of(spec), spec.num_active_parameters)
    return CostModel.of(spec, rates, ranks.topology)


def different(cost: CostModel) -> list[Strategy]:
    """The strategies of a fleet that differ: with one rank on each host, tree is pass-Q."""
    single = cost.topology.num_ranks == cost.topology.num_hosts
    return [strategy for strategy in cost.strategies if not (single and strategy == "tree")]


def num_layers(new: int) -> int:
    """Layers in a row: many where one would be too short to be timed."""
    return min(16, max(256 // new, 1))


def turns(
    transport: Transport,
    folder: str,
    shards: Sequence[Shard],
    strategies: Sequence[Strategy],
    seconds: float,
) -> list[dict[str, tuple[float, float]]]:
    """When each strategy began and ended in each turn on this rank, about `seconds` of turns.

    The first turn warms up and is left out, unless there are few.
    """
    model = runner(transport, folder, ROOM)
    spec, num_queries = model.spec, shards[transport.rank].num_queries
    q = torch.randn(num_queries, spec.num_heads, spec.head_dim)
    kv = torch.randn(2, num_queries, spec.num_kv_heads, spec.head_dim)
    steps = {strategy: step_of(model, shards, strategy) for strategy in strategies}
    layers = num_layers(sum(shard.num_queries for shard in shards))

    def turn() -> dict[str, tuple[float, float]]:
        times = {}
        for strategy, step in steps.items():
            dist.barrier()
            begun = time.perf_counter()
            for layer in range(layers):
                step.attend(layer % LAYERS, q, *kv)
            times[strategy] = begun, time.perf_counter()
        return times

    with torch.inference_mode():
        begun = time.perf_counter()
        first = turn()
        longest = torch.tensor(time.perf_counter() - begun)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        more = max(2, min(int(seconds / float(longest)), MAX_TURNS))
        rest = [turn() for _ in range(more)]
    return [first, *rest] if more < FEW_TURNS else rest


def step_of(model: ModelRunner, shards: Sequence[Shard], strategy: Strategy) -> Step:
    shard = shards[model.transport.rank]
    segment = Segment("request", strategy, tuple(shards))
    part = Part(segment, (Extent(0, -(-shard.num_keys // PAGE_SIZE)),))
    plan = RankPlan((0,) * shard.num_queries, (part,), ())
    return Step(plan, model.pool, model.transport, model.kernel, model.scale)


def compare(
    ranks: Ranks, cost: CostModel, folder: str, new: int, cached: int, seconds: float
) -> Row:
    """One cell: milliseconds of a layer with each strategy, and which is chosen."""
    shards, strategies = shards_of(new, cached, ranks.topology.num_ranks), different(cost)
    predicted = predictions(shards, cost, strategies)
    choice = choose(predicted)
    by_rank = ranks.run(turns, folder, shards, strategies, seconds)
    timed: dict[Strategy, list[float]] = {strategy: [] for strategy in strategies}
    for turn in zip(*by_rank, strict=True):
        for strategy, times in timed.items():
            begun = max(on_rank[strategy][0] for on_rank in turn)
            ended = max(on_rank[strategy][1] for on_rank in turn)
            times.append(1e3 * (ended - begun) / num_layers(new))
    medians = {strategy: median(times) for strategy, times in timed.items()}
    best = min(medians, key=medians.__getitem__)
    return {
        "new": new,
        "cached": cached,
        **{f"{strategy}, ms": value for strategy, value in medians.items()},
        "best": best,
        "chosen": choice,
        "regret, %": 100 * (medians[choice] / medians[best] - 1),
        "noise, %": max(100 * spread(timed[strategy]) for strategy in (choice, best)),
        "turns": len(by_rank[0]),
        "predicted, ms": {name: 1e3 * one.seconds / LAYERS for name, one in predicted.items()},
    }


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a part of the median."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / (2 * middle)


def cells(ranks: int) -> list[tuple[int, int]]:
    """New and cached tokens of which every rank has some."""
    return [(new, cached) for cached in CACHED for new in NEW if cached or new >= PAGE_SIZE * ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--links", nargs="+", default=["loopback", "10", "1"])
    parser.add_argument("--ranks", type=int, nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of turns in each cell")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.links != ["loopback"] and (reason := unavailable()):
        parser.error(f"only --links loopback: {reason}")
    begun, rows, rates = time.monotonic(), list[Row](), {}
    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder), num_hidden_layers=LAYERS, **HEADS)
        for link, size in product(options.links, options.ranks):
            gbit = None if link == "loopback" else float(link)
            sizes = SPLITS[size] if gbit else (size,)
            name = f"{link}{' Gbit/s' * bool(gbit)}, ranks {' + '.join(map(str, sizes))}"
            with fleet(sizes, gbit) as ranks:
                cost = cost_of(ranks, folder)
                found = [
                    compare(ranks, cost, folder, *cell, options.seconds) for cell in cells(size)
                ]
            print(f"{name}:")
            print_table([{key: row[key] for key in row if key != "predicted, ms"} for row in found])
            rows += [{"fleet": name, **row} for row in found]
            rates[name] = asdict(cost.rates)
    summary = summarize(rows)
    print(f"The grid took {time.monotonic() - begun:.0f} s.")
    finish("strategies", rows, options.output, summary=summary, rates=rates)


def summarize(rows: Sequence[Row]) -> Row:
    """The part of cells with a good choice: of all, and of each fleet."""
    groups = {"all": list(rows)}
    for row in rows:
        groups.setdefault(row["fleet"], []).append(row)
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
