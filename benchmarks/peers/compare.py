"""Longspan beside the engines that people use on a CPU: the same model, prompts, threads, dtype.

A Llama with random weights (hidden 512, 8 layers, 8 query and 2 KV heads of size 64), greedy. Each
engine stays loaded in a process of its own and they answer in turn, so that one computes while the
others sleep: vLLM's CPU build, transformers' `generate`, Longspan as one rank of all threads and as
so many ranks of one. In each pair every engine has the same fresh prompt, which no cache knows; the
next pair goes through the engines the other way round.

`ttft_s` is the time to the first token of one prompt, `tpot_ms` the mean time for each of the
following ones, with so many requests at once. Prompts of up to 4,096 tokens are all different when
there are several, and computed before; longer ones differ only in their last token, and begin as
the fresh prompt did, which all engines keep. `vs X` is the median of the pairs' ratios to engine X
in the same pair: below 1 is faster than X. In float32 the tokens of all engines should be the same;
`agree` is in how many sequences of all they are the same as the first engine's.

What each engine has: Longspan as installed; vLLM with libiomp5 and tcmalloc, as its documentation
wants it; transformers with `sdpa`, and prompts of at most 4,096 tokens, since longer ones take too
long. `continuous` is transformers' `generate_batch`.

    python benchmarks/peers/compare.py [--engines longspan-1 longspan-2 vllm transformers]
        [--dtypes float32 bfloat16] [--lengths 4096 16384 32768] [--batches 1 8] [--pairs 3]
        [--threads 2] [--save]

`--save` writes benchmarks/results/peers-MACHINE.json and docs/peers.png; what an earlier run has
measured of other dtypes, lengths and batches stays. A quick look, which takes some minutes:
--lengths 4096 --batches 1 --dtypes float32. The last line is one JSON document.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import environment
from plot import save_plot

sys.path.append(str(Path(__file__).parents[1]))

from common import build_model, finish, machine, print_table, random_tokens, verdict

ROOT = Path(__file__).parents[2]
PEERS = ("vllm", "transformers", "continuous")
NEW_TOKENS = 33
MOST_DISTINCT = 4096
"""Several prompts that are longer share all but their last token: else they take minutes each."""
SLOW = {"transformers": 4096, "continuous": 4096}
"""Longest prompts of engines that take too long for more, and are not what users serve with."""
MARGIN = 256
PAUSE = 0.4
"""Seconds for the threads of the last engine to fall asleep; they spin for 0.2."""
TARGETS = {
    ("ttft_s", "float32"): 1.0,
    ("ttft_s", "bfloat16"): 0.6,
    ("tpot_ms", "float32"): 0.8,
    ("tpot_ms", "bfloat16"): 0.8,
}
"""At most so much of vLLM's time, from 4,096 tokens."""

Row = dict[str, Any]


class Engine:
    """An engine in a process of its own, which sleeps while it is asked nothing."""

    def __init__(self, name: str, model: Path, dtype: str, threads: int, longest: int) -> None:
        self.name = name
        own = environment.variables(threads) if name == "vllm" else _variables(name, threads)
        python = environment.PYTHON if name == "vllm" else sys.executable
        pool = 8 * MOST_DISTINCT + 2 * longest + 16 * MARGIN
        program = Path(__file__).with_name("engines.py")
        arguments = [name, model, dtype, str(pool), str(longest + MARGIN)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | own,
        )
        self._answer()

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], Any]:
        """New tokens of each prompt, and when each of them came, in seconds."""
        time.sleep(PAUSE)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of is told below
            print(
                json.dumps({"prompts": prompts, "new_tokens": new_tokens}),
                file=self._process.stdin,
                flush=True,
            )
        answer = self._answer()
        return answer["tokens"], answer["times"]

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            words = self._log.read().strip().splitlines()[-12:]
            code = self._process.wait()
            sys.exit("\n".join([f"error: {self.name} ended with exit code {code}:", *words]))
        return json.loads(line)


def _variables(name: str, threads: int) -> dict[str, str]:
    ranks = int(name.removeprefix("longspan-")) if name.startswith("longspan-") else 1
    return {
        "OMP_NUM_THREADS": str(threads // ranks),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


@contextlib.contextmanager
def loaded(options: argparse.Namespace, dtype: str, model: Path) -> Iterator[list[Engine]]:
    """All engines, warm."""
    with contextlib.ExitStack() as stack:
        engines = []
        for name in options.engines:
            print(f"loading {name} in {dtype}", file=sys.stderr)
            engine = Engine(name, model, dtype, options.threads, max(options.lengths))
            stack.callback(engine.close)
            engines.append(engine)
            rng = random.Random(-1)
            for count in (1, *options.batches):
                engine.run([random_tokens(rng, 1024) for _ in range(count)], 3)
        yield engines


def measure(engines: Sequence[Engine], dtype: str, options: argparse.Namespace) -> list[Row]:
    """A row for each engine, length and number of requests."""
    rows = []
    for length in options.lengths:
        asked = [engine for engine in engines if length <= SLOW.get(engine.name, length)]
        for batch in options.batches:
            distinct = length <= MOST_DISTINCT
            found: dict[str, list[Row]] = {engine.name: [] for engine in asked}
            for pair in range(options.pairs):
                rng = random.Random(f"{length} {pair}")
                prompt = random_tokens(rng, length)
                several = [
                    random_tokens(rng, length) if distinct else [*prompt[:-1], token]
                    for token in range(batch)
                ]
                for engine in asked if pair % 2 == 0 else reversed(asked):
                    turn = _turn(engine, prompt, several)
                    found[engine.name].append(turn)
                    where = f"pair {pair + 1}, {length} tokens, batch {batch}: {engine.name}"
                    figures = ", ".join(f"{name} {turn[name]}" for name in ("ttft_s", "tpot_ms"))
                    print(f"{where}: {figures}", file=sys.stderr, flush=True)
            rows += _rows(found, dtype, length, batch)
            _show(rows[-len(asked) :])
    return rows


def _turn(engine: Engine, prompt: list[int], several: list[list[int]]) -> Row:
    """What one engine does in one pair."""
    if len(several) == 1:
        tokens, times = engine.run([prompt], NEW_TOKENS)
        return {"tokens": tokens, "ttft_s": times[0][0], "tpot_ms": per_token(times)}
    if engine.name not in ("transformers", "continuous"):
        engine.run(several, 1)
    tokens, times = engine.run(several, NEW_TOKENS)
    return {"tokens": tokens, "ttft_s": None, "tpot_ms": per_token(times)}


def per_token(times: Sequence[Sequence[float]]) -> float | None:
    """Mean milliseconds for a token while all requests draw tokens; None if they never all do."""
    last_begun = max(times, key=lambda own: own[0])
    begun, end = last_begun[0], min(own[-1] for own in times)
    count = sum(begun < time <= end for time in last_begun)
    return 1e3 * (end - begun) / count if count else None


def _rows(found: dict[str, list[Row]], dtype: str, length: int, batch: int) -> list[Row]:
    reference = next(iter(found.values()))
    rows = []
    for name, turns in found.items():
        row: Row = {"engine": name, "dtype": dtype, "prompt_tokens": length, "batch": batch}
        for figure in ("ttft_s", "tpot_ms"):
            values = [turn[figure] for turn in turns]
            row[figure] = None if None in values else median(values)
            for peer in (peer for peer in PEERS if peer in found):
                if name.startswith("longspan") and row[figure] is not None:
                    others = [turn[figure] for turn in found[peer]]
                    if None in others:
                        continue
                    row[f"{figure[:4]} vs {peer}"] = median(
                        own / other for own, other in zip(values, others, strict=True)
                    )
        same = [
            own == other
            for turn, first in zip(turns, reference, strict=True)
            for own, other in zip(turn["tokens"], first["tokens"], strict=True)
        ]
        row["agree"] = f"{sum(same)}/{len(same)}"
        row["turns"] = [{k: v for k, v in turn.items() if k != "tokens"} for turn in turns]
        rows.append(row)
    return rows


def _show(rows: Sequence[Row]) -> None:
    print_table([{key: row.get(key) for key in rows[0] if key != "turns"} for row in rows])


def judge(rows: Sequence[Row]) -> list[Row]:
    """Longspan's ratios to vLLM's time against the targets."""
    judged = []
    for row in rows:
        for figure in ("ttft_s", "tpot_ms"):
            ratio = row.get(f"{figure[:4]} vs vllm")
            if ratio is not None and row["prompt_tokens"] >= 4096:
                target = TARGETS[figure, row["dtype"]]
                judged.append(
                    {
                        "engine": row["engine"],
                        "dtype": row["dtype"],
                        "figure": figure[:4],
                        "prompt_tokens": row["prompt_tokens"],
                        "batch": row["batch"],
                        "ratio": ratio,
                        "target": target,
                        "verdict": verdict(ratio <= target),
                    }
                )
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    engines = ["longspan-1", "longspan-2", "vllm", "transformers"]
    parser.add_argument("--engines", nargs="+", default=engines)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if "vllm" in options.engines:
        try:
            environment.install()
        except environment.InstallError as error:
            sys.exit(f"error: vLLM can't be installed; leave it out of --engines\n{error}")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load is {load:.1f}: this machine does other things too", file=sys.stderr)
    model = environment.FOLDER / "model"  # always the same path: vLLM compiles once for each
    build_model(model, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
    rows: list[Row] = []
    for dtype in options.dtypes:
        with loaded(options, dtype, model) as running:
            rows += measure(running, dtype, options)
    judged = judge(rows)
    if judged:
        print_table(judged)
    result = ROOT / "benchmarks" / "results" / f"peers-{_slug(machine())}.json"
    if options.save:
        rows = _with_earlier(rows, result)
        save_plot(rows, machine(), ROOT / "docs" / "peers.png")
    more = {
        "threads": options.threads,
        "peers": {"vllm": environment.VLLM, "preloaded": environment.preloaded()},
        "load_before": load,
        "verdicts": judge(rows),
    }
    finish("peers", rows, result if options.save else None, **more)


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def _with_earlier(rows: list[Row], result: Path) -> list[Row]:
    """These rows, after those of cells that only an earlier run has measured."""
    earlier = json.loads(result.read_text())["rows"] if result.exists() else []
    cells = {(row["dtype"], row["prompt_tokens"], row["batch"]) for row in rows}
    kept = [r for r in earlier if (r["dtype"], r["prompt_tokens"], r["batch"]) not in cells]
    return kept + rows


if __name__ == "__main__":
    main()
