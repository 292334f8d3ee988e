"""How fast a day of many ranks goes by in simulation, and what its users would see.

The engine's scheduler and ledger serve a made-up trace on ranks that take predicted time: an 8B
model, prompts of 500 to 8,000 tokens and some of 100,000 to 1,000,000, outputs of 100 on average.
`cpu_s` and `us_a_step` are what the engine itself costs, on one core. The last line is one JSON
document.

    python benchmarks/simulate.py [--ranks 128] [--requests 10000] [--rate 30] [--output FILE]
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from common import finish, print_table

from longspan.config import EngineConfig
from longspan.cost.simulate import RequestFigures, SimulationResult, percentile, simulate
from longspan.cost.trace import Arrival, Trace
from longspan.models import ModelSpec

LLAMA_8B = ModelSpec(
    name="llama-8b",
    architecture="LlamaForCausalLM",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128_256,
    max_model_len=1_100_000,
    eos_token_ids=(0,),
    dtype="bfloat16",
    kv_cache_dtype="bfloat16",
    num_active_parameters=7_000_000_000,
)
RANK_TOKENS = 400_000
"""52 GB of keys and values, as an 80 GB device has beside the weights."""
LONG = 50_000
"""Prompts above so many tokens are called long."""


def made_up(requests: int, rate: float, long_part: float, seed: int) -> Trace:
    """Arrivals at random, `rate` a second; a fifth of the short prompts has a common beginning."""
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(requests):
        now += rng.expovariate(rate)
        output = min(max(round(rng.lognormvariate(4.2, 0.9)), 1), 2000)
        if rng.random() < long_part:
            prompt, shared = round(1e5 * 10 ** rng.random()), None
        else:
            prompt = round(500 * 16 ** rng.random())
            shared = f"system {rng.randrange(20)}" if rng.random() < 0.2 else None
        arrivals.append(
            Arrival(
                time=now,
                prompt=prompt,
                output_tokens=output,
                max_tokens=4 * output,
                prefix=shared,
                prefix_tokens=400 if shared else 0,
            )
        )
    return Trace(arrivals)


def rows(requests: Sequence[RequestFigures]) -> list[dict[str, object]]:
    short = [one for one in requests if one.prompt_tokens <= LONG]
    long = [one for one in requests if one.prompt_tokens > LONG]
    return [row(name, chosen) for name, chosen in (("short", short), ("long", long)) if chosen]


def row(name: str, requests: Sequence[RequestFigures]) -> dict[str, object]:
    ttft, tpot = [one.ttft for one in requests], [one.tpot for one in requests]
    return {
        "prompts": name,
        "requests": len(requests),
        "refused": sum(one.error is not None for one in requests),
        "prompt_tokens": sum(one.prompt_tokens for one in requests),
        "output_tokens": sum(one.output_tokens for one in requests),
        "mean_degree": statistics.mean(one.degree for one in requests),
        "preemptions": sum(one.preemptions for one in requests),
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p99_s": percentile(ttft, 99),
        "tpot_p50_s": percentile(tpot, 50),
        "tpot_p99_s": percentile(tpot, 99),
    }


def figures_of(result: SimulationResult) -> dict[str, object]:
    return {
        "ranks": len(result.ranks),
        "simulated_s": result.seconds,
        "tokens_per_s": result.tokens_per_second,
        "mean_use": statistics.mean(rank.use for rank in result.ranks),
        "least_use": min(rank.use for rank in result.ranks),
        "most_pages": max(rank.peak_pages / rank.num_pages for rank in result.ranks),
        "steps": result.num_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second")
    parser.add_argument("--long", type=float, default=0.01, help="part of prompts that are long")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = EngineConfig(
        model=LLAMA_8B.name,
        context_parallel_size=options.ranks,
        page_size=options.page_size,
        max_num_seqs=64 * options.ranks,
    )
    trace = made_up(options.requests, options.rate, options.long, options.seed)
    begun = time.perf_counter(), time.process_time()
    num_pages = [RANK_TOKENS // options.page_size] * options.ranks
    result = simulate(trace, config, LLAMA_8B, num_pages)
    wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    found = rows(result.requests)
    print_table(found)
    figures = figures_of(result)
    figures |= {"wall_s": wall, "cpu_s": cpu, "us_a_step": 1e6 * cpu / result.num_steps}
    print_table([figures])
    given = {"rate": options.rate, "page_size": options.page_size, "seed": options.seed}
    finish("simulate", found, options.output, **given, **figures)


if __name__ == "__main__":
    main()
