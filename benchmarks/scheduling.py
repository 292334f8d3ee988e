"""What a step costs the engine: microseconds of deciding, without any worker.

Running requests decode on simulated ranks that answer at once, so that nothing but the engine is
timed: `schedule` makes plans, `update` takes tokens. A request in ten lies on several ranks. In
the rows named "all at once" one request lies on every rank, so that all ranks step together and a
step has all requests in it: the most that one step can cost. Otherwise each rank steps by itself,
and a step has only its own. At best there is nothing to do but to make the plans' structs. Medians
over `--steps` steps; the last line is one JSON document.

    python benchmarks/scheduling.py [--steps 200] [--output FILE]
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence

from common import finish

from longspan import SamplingParams
from longspan.config import EngineConfig
from longspan.cost.rates import CUDA
from longspan.engine.engine import Engine
from longspan.models import ModelSpec
from longspan.plan import RankPlan, RankResult, Sampled
from longspan.topology import Topology

SPEC = ModelSpec(
    name="simulated",
    architecture="Simulated",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=1000,
    max_model_len=10**7,
    eos_token_ids=(),
    dtype="bfloat16",
    kv_cache_dtype="bfloat16",
    num_active_parameters=7 * 10**9,
)


class Immediate:
    """Ranks that draw the same token always, at once."""

    rates = CUDA

    def __init__(self, num_pages: Sequence[int]) -> None:
        self.num_pages = tuple(num_pages)
        self.joins = False
        self.queues = False
        self.topology = Topology.of_hosts([len(num_pages)])
        self._results: dict[int, RankResult] = {}

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        for rank, plan in plans.items():
            drawn = tuple(Sampled(sampling.request_id, 1) for sampling in plan.samplings)
            self._results[rank] = RankResult(drawn, {})

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        results, self._results = self._results, {}
        return results

    def close(self) -> None:
        pass


def measure(ranks: int, requests: int, together: bool, steps: int) -> dict[str, object]:
    config = EngineConfig(
        model="simulated",
        context_parallel_size=ranks,
        max_num_seqs=requests,
        min_tokens_per_rank=4096,
    )
    engine = Engine(config, SPEC, Immediate([40_000] * ranks))
    params = SamplingParams(max_tokens=100_000, ignore_eos=True)
    for number in range(requests):
        length = 500 + number % 7
        if number == 0 and together:
            length = 4096 * ranks
        elif number % 10 == 9 and together:
            length = 4096 * 2
        engine.add_request([number % 1000] * length, params)
    while engine.scheduler.waiting or any(r.num_pending > 1 for r in engine.scheduler.running):
        engine.step()
    timed = [one_round(engine) for _ in range(steps)]
    in_step, schedules, updates = (statistics.median(column) for column in zip(*timed, strict=True))
    row = {
        "ranks": ranks,
        "requests": requests,
        "together": together,
        "requests_in_a_step": in_step,
        "schedule_ms": schedules,
        "update_ms": updates,
    }
    name = "all at once" if together else "each rank by itself"
    print(
        f"{ranks:5} {requests:9} {name:20} {in_step:16.0f} {schedules:13.3f} {updates:11.3f}",
        flush=True,
    )
    return row


def one_round(engine: Engine) -> tuple[float, float, float]:
    """Requests in a step, and milliseconds of `schedule` and `update` for it."""
    scheduler, executor = engine.scheduler, engine.executor
    begun = time.perf_counter()
    steps = scheduler.schedule()
    scheduled = time.perf_counter()
    for step in steps:
        executor.start(step.plans)
    results = executor.wait()
    received = time.perf_counter()
    scheduler.update(results)
    updated = time.perf_counter()
    chunks = sum(len(step.chunks) for step in steps)
    count = len(steps)
    return chunks / count, 1e3 * (scheduled - begun) / count, 1e3 * (updated - received) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output")
    options = parser.parse_args()
    print(
        f"{'ranks':>5} {'requests':>9} {'':20} {'requests a step':>16} {'schedule, ms':>13} "
        f"{'update, ms':>11}"
    )
    rows = [
        measure(ranks, requests, together, options.steps)
        for ranks, requests in [(1, 256), (8, 256), (128, 256), (128, 4096)]
        for together in (False, True)
    ]
    finish("scheduling", rows, options.output)


if __name__ == "__main__":
    main()
