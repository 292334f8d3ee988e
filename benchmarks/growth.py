"""A context that outgrows its rank while it decodes, and grows onto the next and the next.

One request begins on a rank whose pool holds 992 tokens and decodes 5,000, over three ranks that
could hold 5,392 together: real processes of one thread each, a random model of 10 million weights,
float32 on the CPU. Timed is every token, from the one before. When the home moves nothing is
copied, so at best that token takes as long as any with keys on several ranks, for which every layer
costs two messages. The keys that lie elsewhere may then travel home beside the next steps. Aim: a
token at a move takes at most twice the median of all. The slowest of all tokens, and how many are
slower than those at moves, tell what is noise of the machine. Tokens have to be those of
transformers in one process.

`--repeats` times; each is shown. The last line is one JSON document.

    python benchmarks/growth.py [--repeats 3] [--new-tokens 5000] [--output FILE]
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    build_model,
    finish,
    one_thread_each,
    print_table,
    quantile,
    random_tokens,
    verdict,
)
from transformers import AutoModelForCausalLM

from longspan import LLM, SamplingParams

POOLS = (1000, 2000, 2400)
PAGE_SIZE = 16
PROMPT = 64
BUCKET = 250
NEARBY = 50
"""So many tokens before a move and after it are compared with it."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Token:
    """When a token was drawn, on which home, and how many keys each rank held then."""

    at: float
    home: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """The home moves; times in milliseconds."""

    token: int
    home: int
    before: float
    pause: float
    after: float


def grow(llm: LLM, prompt: list[int], new_tokens: int) -> tuple[list[int], list[Token]]:
    """Decode one request that begins on the first rank, the one with the smallest pool."""
    engine = llm.engine
    once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for _ in POOLS[1:]:  # two others arrive just before it, and take the larger ones
        engine.add_request(prompt, once)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    group = engine.add_request(prompt, params)
    [request], tokens = group.requests, list[Token]()
    while engine.has_requests:
        if group not in engine.step():
            continue
        if request.home is not None:  # else it has just ended
            keys = tuple(request.num_keys(rank) for rank in range(len(POOLS)))
            tokens.append(Token(time.perf_counter(), request.home, keys))
    assert tokens[0].home == 0, "it has to begin on the smallest pool"
    return request.output_token_ids, tokens


def moves_of(tokens: Sequence[Token], pauses: Sequence[float]) -> list[Move]:
    """`pauses[i]` is the time from token i to the next."""
    return [
        Move(
            index + 1,
            after.home,
            median(pauses[max(index - NEARBY, 0) : index]),
            pauses[index],
            median(pauses[index + 1 : index + 1 + NEARBY]),
        )
        for index, (before, after) in enumerate(pairwise(tokens))
        if after.home != before.home
    ]


def buckets_of(tokens: Sequence[Token], pauses: Sequence[float]) -> list[Row]:
    rows = []
    for start in range(0, len(pauses), BUCKET):
        part = pauses[start : start + BUCKET]
        last = tokens[start + len(part)]
        rows.append(
            {
                "tokens to": start + len(part) + 1,
                "median, ms": median(part),
                "p99, ms": quantile(part, 0.99),
                "max, ms": max(part),
                "home": last.home,
                **{f"rank {rank}": keys for rank, keys in enumerate(last.keys)},
            }
        )
    return rows


def gathered(tokens: Sequence[Token]) -> Row:
    """How many keys came home from other ranks, and with how many tokens' steps."""
    coming = [
        before.keys[rank] - after.keys[rank]
        for before, after in pairwise(tokens)
        for rank in range(len(POOLS))
        if after.keys[rank] < before.keys[rank]
    ]
    return {"keys": sum(coming), "steps": len(coming)}


def report(run: int, tokens: Sequence[Token]) -> Row:
    pauses = [1e3 * (after.at - before.at) for before, after in pairwise(tokens)]
    moves, typical = moves_of(tokens, pauses), median(pauses)
    at_move = max(move.pause for move in moves)
    buckets = buckets_of(tokens, pauses)
    print_table(buckets)
    for move in moves:
        print(
            f"token {move.token}: home moves to rank {move.home}; {move.pause:.2f} ms, "
            f"median of {NEARBY} before {move.before:.2f} ms, after {move.after:.2f} ms"
        )
    home = gathered(tokens)
    print(f"gathered at home: {home['keys']} tokens' keys, in {home['steps']} steps\n")
    return {
        "run": run,
        "median, ms": typical,
        "p99, ms": quantile(pauses, 0.99),
        "max, ms": max(pauses),
        "at moves, ms": at_move,
        "% slower": 100 * sum(pause > at_move for pause in pauses) / len(pauses),
        "of median": at_move / typical,
        "": verdict(at_move <= 2 * typical),
        "moves": [asdict(move) for move in moves],
        "gathered": home,
        "buckets": buckets,
        "pauses_ms": [round(pause, 3) for pause in pauses],
        "homes": [token.home for token in tokens],
    }


def expected_tokens(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """What transformers says in one process."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(prompt) :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=5000)
    parser.add_argument("--output")
    options = parser.parse_args()
    one_thread_each()
    prompt = random_tokens(random.Random(0), PROMPT)
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder:
        model = build_model(Path(folder))
        expected = expected_tokens(Path(folder), prompt, options.new_tokens)
        rows = []
        with LLM(
            folder,
            context_parallel_size=len(POOLS),
            kv_cache_tokens=POOLS,
            page_size=PAGE_SIZE,
            dtype="float32",
            device="cpu",
            enable_prefix_caching=False,
        ) as llm:
            fits = [usage.total * PAGE_SIZE for usage in llm.engine.kv_usage]
            print(f"pools hold {fits} tokens; a prompt of {PROMPT}, {options.new_tokens} more\n")
            for run in range(options.repeats):
                found, tokens = grow(llm, prompt, options.new_tokens)
                assert found == expected, "these are not the tokens of transformers"
                rows.append(report(run + 1, tokens))
    print_table([{name: row[name] for name in list(row)[:8]} for row in rows])
    for move in zip(*(row["moves"] for row in rows), strict=True):
        ratios = [each["pause"] / max(each["before"], each["after"]) for each in move]
        print(
            f"home moves to rank {move[0]['home']}: {median(ratios):.2f} of the median around it, "
            f"median of {len(ratios)} runs; each {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
        )
    print(f"All {options.new_tokens} tokens are those of transformers, {options.repeats} times.")
    settings = {"kv_cache_tokens": POOLS, "page_size": PAGE_SIZE, "prompt_tokens": PROMPT}
    finish("growth", rows, options.output, model=model, settings=settings)


if __name__ == "__main__":
    main()
