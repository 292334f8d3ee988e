"""How surely the packaged model finds facts in long texts, over several ranks and on one.

Of the right answers at least 95 % are wanted up to 64K tokens and 90 % at 128K, on three ranks; one
rank has to give the same answers, letter by letter. Texts, names and codes are others than the
model was trained with. With `--plot` the heat map of the first number of ranks is drawn. The last
line is one JSON document.

    python benchmarks/needle.py [--lengths 1024 ...] [--ranks 3 1] [--plot FILE] [--output FILE]
"""

import argparse
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


def same(reports: list[Report]) -> list[str]:
    """How many answers of each other number of ranks are those of the first one."""
    first, *others = reports
    lines = []
    for other in others:
        theirs = {(q.length, q.depth, q.name): q.answer.text for q in first.questions}
        equal = [theirs[q.length, q.depth, q.name] == q.answer.text for q in other.questions]
        lines.append(
            f"{sum(equal)} of {len(equal)} answers of {other.ranks} and {first.ranks} ranks"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    sweep = Sweep(tuple(options.lengths), DEPTHS, options.samples, options.seed)
    reports = [measured(ranks, sweep) for ranks in options.ranks]
    if options.plot:
        save_heat_map(reports[0], options.plot)
    rows = [row(report, length) for report in reports for length in sweep.lengths]
    print_table(rows)
    for length in sweep.lengths:
        wanted = WANTED_IF_LONG if length >= LONG else WANTED
        met = verdict(reports[0].accuracy(length) >= wanted)
        print(f"{length} tokens: {100 * wanted:.0f} % wanted: {met}")
    for equal in same(reports):
        print(f"identical: {equal}")
    answers = [
        [report.ranks, q.length, q.depth, q.name, q.code, q.answer.text]
        for report in reports
        for q in report.questions
    ]
    finish("needle", rows, options.output, identical=same(reports), answers=answers)


if __name__ == "__main__":
    main()
