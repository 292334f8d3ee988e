"""How surely the packaged model finds facts in long texts, over three ranks.

Wanted are 95 % right answers up to 64K tokens and 90 % at 128K. Texts, names and codes are others
than the model was trained with. `--plot` draws the heat map; `--compare` tells how many answers
are, letter by letter, those of an earlier run on another number of ranks. The last line is one
JSON document.

    python benchmarks/needle.py [--ranks 3] [--lengths 1024 ...] [--plot FILE] [--output FILE]
                                [--compare FILE]
"""

import argparse
import json
from pathlib import Path

from common import finish, print_table, verdict
from transformers.utils import logging

from longspan import LLM
from longspan.demo import model_path
from longspan.evaluation.heat_map import save_heat_map
from longspan.evaluation.subject import EngineSubject
from longspan.evaluation.sweep import Question, Report, Sweep, evaluate
from longspan.evaluation.table import line

LENGTHS = [1024, 4096, 16_384, 65_536, 131_072]
DEPTHS = tuple(float(depth) for depth in range(0, 101, 10))
LONG, WANTED, WANTED_IF_LONG = 131_072, 0.95, 0.90


def show(length: int, questions: list[Question]) -> None:
    print(line(length, questions), flush=True)


def measured(ranks: int, sweep: Sweep) -> Report:
    """The sweep on so many ranks, each with room for a little more than its share of the KV."""
    room = sweep.lengths[-1] + 64 * sweep.samples * len(sweep.depths)
    with LLM(
        str(model_path()),
        context_parallel_size=ranks,
        dtype="float32",
        device="cpu",
        kv_cache_tokens=room if ranks == 1 else 5 * room // (4 * ranks),
    ) as llm:
        return evaluate(EngineSubject(llm), sweep, ranks, show)


def row(report: Report, length: int) -> dict[str, object]:
    questions = report.at(length)
    answers = [question.answer for question in questions]
    return {
        "ranks": report.ranks,
        "length": length,
        "questions": len(questions),
        "right_percent": 100 * report.accuracy(length),
        "worst_depth_percent": 100 * min(report.accuracy(length, d) for d in report.sweep.depths),
        "prompt_tokens": max(answer.prompt_tokens for answer in answers),
        "ttft_s": max(answer.time_to_first_token for answer in answers),
    }


def compare(report: Report, file: Path) -> str:
    """How many answers are those in the document of an earlier run."""
    earlier = json.loads(file.read_text())["answers"]
    theirs = {(length, depth, name): text for length, depth, name, _, text in earlier}
    same = [theirs[q.length, q.depth, q.name] == q.answer.text for q in report.questions]
    return f"{sum(same)} of {len(same)} answers are those of {file.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    sweep = Sweep(tuple(options.lengths), DEPTHS, options.samples, options.seed)
    report = measured(options.ranks, sweep)
    if options.plot:
        save_heat_map(report, options.plot)
    rows = [row(report, length) for length in sweep.lengths]
    print_table(rows)
    for length in sweep.lengths:
        wanted = WANTED_IF_LONG if length >= LONG else WANTED
        met = verdict(report.accuracy(length) >= wanted)
        print(f"{length} tokens: {100 * wanted:.0f} % wanted: {met}")
    more = {"compared": compare(report, options.compare)} if options.compare else {}
    answers = [[q.length, q.depth, q.name, q.code, q.answer.text] for q in report.questions]
    finish("needle", rows, options.output, **more, answers=answers)


if __name__ == "__main__":
    main()
