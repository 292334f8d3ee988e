"""Decoding one request over two hosts with two ranks each: tree against flat pass-Q and a ring.

Hosts are network namespaces of this machine, joined by a link of 10 or 1 Gbit/s. A step is that of
a worker (`worker/model_runner.py`): one token through a random Llama of 4 layers, 8 query and 2 KV
heads of size 64, float32, on the home, with the context's keys shared evenly by all four ranks;
real gloo processes of one thread each. `local` has all keys on the home and sends nothing: what
could be reached at best if one rank had room, though it then reads four times the keys. For each
token pass-Q sends a query to three ranks and gets three states back, of which two cross the link;
tree sends one query over and gets one state; a ring of keys (pass-KV) sends all of them round.

Bytes between hosts are those that the transports counted. Strategies take turns, `--tokens` times;
times are medians of the home's, with half the distance between the quartiles. All must draw the
same token. Aim: tree sends half of what pass-Q does from host to host, as there are two ranks on
each. The last line is one JSON document.

    python benchmarks/hosts.py [--links 10 1] [--contexts 4096 32768] [--tokens 50] [--output FILE]
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch.distributed as dist
from common import build_model, finish, print_table, verdict
from fleets import PAGE_SIZE, fleet, runner, unavailable

from longspan.parallel.transport import Transport
from longspan.plan import Extent, Part, RankPlan, Run, Sampling, Segment, Shard

HOSTS = (2, 2)
RANKS = sum(HOSTS)
LAYERS = 4
STRATEGIES = ("local", "pass_q", "tree", "pass_kv")
RING_TOKENS = 5
"""A ring takes too long for more."""

Row = dict[str, Any]


def load(transport: Transport, folder: str, tokens: int) -> None:
    """Make all ranks ready."""
    runner(transport, folder, tokens)
    dist.barrier()


def plan_of(strategy: str, context: int, rank: int) -> RankPlan:
    """One decode token's step. The home, rank 0, has the pages of all if the strategy is local.

    A rank's share of the context is what it has in its pool from `rank * context / RANKS` on, so
    that whoever holds the keys, they are the same.
    """
    new = (Run(context, 1),)
    share = context // RANKS
    local = strategy == "local"
    shards = (Shard(0, new, context if local else share, new),)
    if not local:
        shards += tuple(Shard(other, (), share, ()) for other in range(1, RANKS))
    segment = Segment("request", strategy, shards)  # type: ignore[arg-type]
    held = shards[rank].num_keys - (rank == 0)
    extents = (Extent(rank * share // PAGE_SIZE, held // PAGE_SIZE),)
    if rank:
        return RankPlan((), (Part(segment, extents),), ())
    extents += (Extent(context // PAGE_SIZE, 1),)  # the new token's page
    return RankPlan((1,), (Part(segment, extents),), (Sampling("request", 0, 0, context + 1, 0.0),))


def decode(
    transport: Transport, folder: str, tokens: int, strategy: str, context: int
) -> tuple[int | None, int, float]:
    """One step on this rank: the token drawn, bytes sent to other hosts, seconds."""
    model = runner(transport, folder, tokens)
    dist.barrier()
    begun = time.perf_counter()
    if strategy == "local" and transport.rank:
        return None, 0, 0.0
    result = model.execute(plan_of(strategy, context, transport.rank))
    seconds = time.perf_counter() - begun
    far = sum(traffic.far_bytes for traffic in result.traffic.values())
    return (result.sampled[0].token_id if result.sampled else None), far, seconds


def measure(gbit: float, contexts: Sequence[int], folder: str, tokens: int) -> list[Row]:
    room = max(contexts) + PAGE_SIZE
    rows = []
    with fleet(HOSTS, gbit) as ranks:
        ranks.run(load, folder, room)
        for context in contexts:
            steps: dict[str, list[tuple[int | None, int, float]]] = {s: [] for s in STRATEGIES}
            for turn in range(tokens + 1):
                for strategy, done in steps.items():
                    if strategy != "pass_kv" or turn <= RING_TOKENS:
                        by_rank = ranks.run(decode, folder, room, strategy, context)
                        [token] = {token for token, _, _ in by_rank} - {None}
                        far = sum(sent for _, sent, _ in by_rank)
                        done.append((token, far, by_rank[0][2]))
            assert len({token for done in steps.values() for token, _, _ in done}) == 1
            for strategy, done in steps.items():
                [sent] = {far for _, far, _ in done}
                low, middle, high = quantiles([1e3 * s for _, _, s in done[1:]], n=4)
                rows.append(
                    {
                        "Gbit/s": gbit,
                        "context": context,
                        "strategy": strategy,
                        "bytes between hosts": sent,
                        "ms a token": middle,
                        "+-": (high - low) / 2,
                        "tokens": len(done) - 1,
                    }
                )
    print_table(rows)
    return rows


def judge(rows: Sequence[Row]) -> Row:
    """How much less tree sends between hosts, and how much sooner its token comes."""
    figures: dict[str, dict[tuple[float, int], Row]] = {name: {} for name in STRATEGIES}
    for row in rows:
        figures[row["strategy"]][row["Gbit/s"], row["context"]] = row
    bytes_ratio = {
        flat["bytes between hosts"] / figures["tree"][cell]["bytes between hosts"]
        for cell, flat in figures["pass_q"].items()
    }
    times = [
        flat["ms a token"] / figures["tree"][cell]["ms a token"]
        for cell, flat in figures["pass_q"].items()
    ]
    factor = HOSTS[0]
    print(
        f"pass-Q sends {min(bytes_ratio):.3g} times the bytes of tree from host to host; "
        f"aim {factor}: {verdict(bytes_ratio == {factor})}\n"
        f"and takes {median(times):.2f} times as long for a token (median of all cells)"
    )
    return {"bytes, pass_q / tree": min(bytes_ratio), "time, pass_q / tree": median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--links", type=float, nargs="+", default=[10, 1])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if reason := unavailable():
        parser.error(reason)
    with tempfile.TemporaryDirectory() as folder:
        heads = {"num_attention_heads": 8, "num_hidden_layers": LAYERS}
        build_model(Path(folder), **heads)
        rows = [
            row
            for gbit in options.links
            for row in measure(gbit, options.contexts, folder, options.tokens)
        ]
    finish("hosts", rows, options.output, hosts=HOSTS, summary=judge(rows))


if __name__ == "__main__":
    main()
