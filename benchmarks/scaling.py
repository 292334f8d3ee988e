"""What ranks cost: a long prompt on one rank and on two, of as many threads each or in all.

The engines and the model are those of the comparison with peers (benchmarks/peers), float32. Each
stays loaded in a process of its own, and in each pair all have the same fresh prompt, one after the
other. Two ranks of one thread should take at most 1 / 1.9 of the time of one such rank, and at most
1.03 of the time of one rank of two threads.

    python benchmarks/scaling.py [--tokens 32768] [--pairs 2] [--output FILE]
"""

import argparse
import contextlib
import random
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).with_name("peers")))

from common import build_model, finish, print_table, random_tokens, verdict
from compare import Engine

SHAPES = ((1, 1), (2, 1), (1, 2))
"""Ranks, and threads of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    times: dict[tuple[int, int], list[float]] = {shape: [] for shape in SHAPES}
    with contextlib.ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        build_model(model, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
        engines = {}
        for ranks, threads in SHAPES:
            name = f"longspan-{ranks}"
            engine = Engine(name, model, "float32", ranks * threads, options.tokens)
            stack.callback(engine.close)
            engine.run([random_tokens(random.Random(-1), 2048)], 3)
            engines[ranks, threads] = engine
        for pair in range(options.pairs):
            prompt = random_tokens(random.Random(pair), options.tokens)
            for shape in SHAPES if pair % 2 == 0 else reversed(SHAPES):
                _, [[seconds]] = engines[shape].run([prompt], 1)
                times[shape].append(seconds)
                print(f"pair {pair + 1}, {shape}: {seconds:.1f} s", file=sys.stderr, flush=True)
    rows = [
        {"ranks": ranks, "threads each": threads, "ttft_s": median(times[ranks, threads])}
        for ranks, threads in SHAPES
    ]
    print_table(rows)
    speedup, ratio = (
        median(a / b for a, b in zip(times[first], times[second], strict=True))
        for first, second in (((1, 1), (2, 1)), ((2, 1), (1, 2)))
    )
    aims = [
        {
            "aim": "2 x 1 is 1.9 times as fast as 1 x 1",
            "found": speedup,
            "verdict": verdict(speedup >= 1.9),
        },
        {
            "aim": "2 x 1 takes 1.03 of the time of 1 x 2",
            "found": ratio,
            "verdict": verdict(ratio <= 1.03),
        },
    ]
    print_table(aims)
    finish("scaling", rows, options.output, tokens=options.tokens, pairs=options.pairs, aims=aims)


if __name__ == "__main__":
    main()
