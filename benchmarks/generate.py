"""Time to the first token and for each further one, on the packaged model, by number of ranks.

Every row has the same cores: one process with all of them, or so many ranks with their part each.
What could be reached at best is the first row, plain transformers, which sends nothing; ranks add
messages and can only gain where attention over one process's threads scales badly. The rows take
turns, `--repeats` times; figures are medians. The last line is one JSON document.

    python benchmarks/generate.py [--lengths 2048 8192 24000] [--repeats 3] [--output FILE]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch
from common import finish
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from longspan import LLM, SamplingParams
from longspan.demo import model_path
from longspan.evaluation.prose import prose

NEW_TOKENS = 33

Timed = tuple[list[int], float, float]
"""Tokens, seconds to the first, seconds for each further one."""
Run = Callable[[list[int]], Timed]


@contextmanager
def with_transformers() -> Iterator[Run]:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def generate(prompt: list[int], new: int) -> tuple[list[int], float]:
        token_ids = torch.tensor([prompt])
        begun = time.perf_counter()
        out = model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=new
        )
        return out[0, len(prompt) :].tolist(), time.perf_counter() - begun

    def run(prompt: list[int]) -> Timed:
        _, first = generate(prompt, 1)
        tokens, whole = generate(prompt, NEW_TOKENS)
        return tokens, first, (whole - first) / (NEW_TOKENS - 1)

    yield run


@contextmanager
def with_ranks(ranks: int, longest: int) -> Iterator[Run]:
    with LLM(
        str(model_path()),
        context_parallel_size=ranks,
        dtype="float32",
        device="cpu",
        kv_cache_tokens=longest + 64,
        enable_prefix_caching=False,  # the prompts come again
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

        def run(prompt: list[int]) -> Timed:
            [output] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            metrics = output.metrics
            assert metrics is not None
            first, further = metrics.time_to_first_token, metrics.time_per_output_token
            assert first is not None
            assert further is not None
            return output.outputs[0].token_ids, first, further

        yield run


def measure(lengths: Sequence[int], ranks: Sequence[int], repeats: int) -> list[dict[str, object]]:
    rows = []
    with ExitStack() as stack:
        runs = {"transformers": stack.enter_context(with_transformers())}
        for count in ranks:
            runs[f"{count} rank{'s' * (count > 1)}"] = stack.enter_context(
                with_ranks(count, max(lengths))
            )
        prompt = prose_tokens(max(lengths))
        for length in lengths:
            timed: dict[str, list[Timed]] = {name: [] for name in runs}
            for _ in range(repeats + 1):
                for name, run in runs.items():
                    timed[name].append(run(prompt[:length]))
            expected = timed["transformers"][0][0]
            for name, results in timed.items():
                assert all(tokens == expected for tokens, _, _ in results), (name, length)
                rows.append(
                    {
                        "engine": name,
                        "prompt_tokens": length,
                        "ttft_s": statistics.median(first for _, first, _ in results[1:]),
                        "tpot_ms": 1e3 * statistics.median(next_ for _, _, next_ in results[1:]),
                    }
                )
                print(
                    "{engine:14} {prompt_tokens:7} {ttft_s:9.3f} {tpot_ms:9.2f}".format(**rows[-1])
                )
    return rows


def prose_tokens(count: int) -> list[int]:
    """At least so many tokens of a prose."""
    text = " ".join(islice(prose(0), count // 5))
    tokens: list[int] = AutoTokenizer.from_pretrained(model_path()).encode(text, verbose=False)
    assert len(tokens) >= count
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 24000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    print(f"{'engine':14} {'tokens':>7} {'TTFT s':>9} {'TPOT ms':>9}")
    rows = measure(options.lengths, options.ranks, options.repeats)
    finish("generate", rows, options.output)


if __name__ == "__main__":
    main()
