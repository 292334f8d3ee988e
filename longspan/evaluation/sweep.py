"""The evaluation: questions over length and depth, and what came of it as one document."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import msgspec

from longspan.errors import ConfigError
from longspan.evaluation.needle import haystacks
from longspan.evaluation.subject import Answer, Subject

__all__ = ["Question", "Report", "Sweep", "evaluate"]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked: at each length, `samples` questions for each depth in percent.

    Raises:
        ConfigError: a value is outside its limits.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int

    def __post_init__(self) -> None:
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            if not values or sorted(set(values)) != list(values):
                raise ConfigError(f"{name}={list(values)} must be one or more, ascending")
        if not 0 <= self.depths[0] <= self.depths[-1] <= 100:
            raise ConfigError(f"depths={list(self.depths)} must be from 0 to 100, in percent")
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples} must be at least 1")


@dataclass(frozen=True, slots=True)
class Question:
    """One question, its answer, and whether that is right. `length` is the one wanted."""

    length: int
    depth: float
    name: str
    code: str
    right: bool
    answer: Answer


@dataclass(frozen=True, slots=True)
class Report:
    """All questions of a sweep over one model; `ranks` is None where a server was asked."""

    model: str
    ranks: int | None
    sweep: Sweep
    questions: tuple[Question, ...]

    def accuracy(self, length: int, depth: float | None = None) -> float:
        """Part of the right answers at a length, and a depth or all."""
        return mean(
            question.right
            for question in self.questions
            if question.length == length and depth in (None, question.depth)
        )

    def at(self, length: int) -> list[Question]:
        """The questions of one length."""
        return [question for question in self.questions if question.length == length]

    def to_json(self) -> bytes:
        """One document with all questions and the accuracies."""
        cells = [
            {
                "length": length,
                "accuracy": self.accuracy(length),
                "by_depth": [self.accuracy(length, depth) for depth in self.sweep.depths],
            }
            for length in self.sweep.lengths
        ]
        return msgspec.json.encode(
            {
                "model": self.model,
                "ranks": self.ranks,
                "sweep": self.sweep,
                "results": cells,
                "questions": self.questions,
            }
        )


def evaluate(
    subject: Subject, sweep: Sweep, ranks: int | None, show: Callable[[int, list[Question]], None]
) -> Report:
    """Ask all questions, the shortest texts first; `show` is told each length's when it is done.

    Raises:
        ConfigError: a length has no room for a needle at each depth, or is above the limit.
    """
    if subject.limit is not None and sweep.lengths[-1] > subject.limit:
        raise ConfigError(
            f"lengths={sweep.lengths[-1]} is above the {subject.limit:,} tokens that "
            f"model={subject.name!r} can be given; give less, or more room for KV"
        )
    every: list[Question] = []
    plans = [
        (length, [*haystacks(length, sweep.depths, sweep.samples, sweep.seed, subject.count)])
        for length in sweep.lengths
    ]
    for length, texts in plans:
        asked: list[Question] = []
        for haystack in texts:
            facts = [needle.fact for needle in haystack.needles]
            answers = subject.ask(haystack.text, facts)
            asked += [
                Question(
                    length,
                    needle.depth,
                    needle.fact.name,
                    needle.fact.code,
                    needle.fact.is_told_by(answer.text),
                    answer,
                )
                for needle, answer in zip(haystack.needles, answers, strict=True)
            ]
        show(length, asked)
        every += asked
    return Report(subject.name, ranks, sweep, tuple(every))
