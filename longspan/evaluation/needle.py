"""Needles and haystacks: facts, a long prose that hides them, and whether an answer tells them."""

import random
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from longspan.errors import ConfigError
from longspan.evaluation.prose import prose, words_of

__all__ = ["NAMES", "Fact", "Haystack", "Needle", "haystacks"]

NAMES = words_of(
    "harbor falcon copper lantern willow ember granite saffron cobalt meridian juniper orchid "
    "marble raven cedar quartz thistle amber beacon comet walnut velvet sparrow glacier maple "
    "tundra pelican garnet lotus hazel basalt heron clover topaz canyon magnet otter prairie "
    "rocket violet"
)
"""First words of the names of what has a code. The packaged model was not trained with them."""

MOST_NEEDLES = 0.25
"""Part of a haystack's tokens that its needles may have."""

FRAME = 64
"""Tokens of a context that are kept for the chat template and the answer."""

SPREAD = 4.0
"""Needles that share a depth are spread over so many percent around it."""

Count = Callable[[str], int]
"""Tells how many tokens a text has."""


@dataclass(frozen=True, slots=True)
class Fact:
    """The code of something: `harbor 417` has `930521`."""

    name: str
    code: str

    @property
    def statement(self) -> str:
        return f"The code of {self.name} is {self.code}."

    @property
    def question(self) -> str:
        return f"What is the code of {self.name}?"

    @property
    def beginning(self) -> str:
        """How an answer begins, for models that go on with a text and know no questions."""
        return f"The code of {self.name} is"

    def is_told_by(self, answer: str) -> bool:
        """Whether an answer names the code and no other one."""
        return set(re.findall(r"(?<!\d)\d{6}(?!\d)", answer)) == {self.code}


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact, and the depth in percent at which it is counted; 0 is a context's begin."""

    fact: Fact
    depth: float


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text and the needles in it, in the order in which they are asked for."""

    text: str
    needles: tuple[Needle, ...]


def haystacks(
    length: int, depths: Sequence[float], samples: int, seed: int, count: Count
) -> Iterator[Haystack]:
    """Texts that need a context of `length` tokens, with question and answer.

    In all of them together are `samples` needles for each depth. A text holds as many as it has
    room for: what questions have in common is computed once, so that a further needle costs little.
    And needles are what a wrong answer may name.

    Raises:
        ConfigError: not even one needle for each depth has room.
    """
    example = Fact("meridian 417", "930521")
    costs, frame = count(f" {example.statement}"), count(example.question) + FRAME
    each = min(samples, int(MOST_NEEDLES * length / (costs * len(depths))))
    if not each:
        raise ConfigError(
            f"lengths={length} must be at least {int(costs * len(depths) / MOST_NEEDLES) + 1} for "
            f"needles at {len(depths)} depths; give a longer one, or fewer depths"
        )
    for index, begun in enumerate(range(0, samples, each)):
        draw = random.Random(f"needle {seed} {length} {index}")
        yield _haystack(length - frame, depths, min(each, samples - begun), draw, count)


def _haystack(
    length: int, depths: Sequence[float], each: int, draw: random.Random, count: Count
) -> Haystack:
    facts = _facts(each * len(depths), draw)
    room = length - sum(count(f" {fact.statement}") for fact in facts)
    sentences, ends = _sentences(room, draw.random(), count)
    needles, hidden = [], defaultdict[int, list[str]](list)
    for index, fact in enumerate(facts):
        depth = depths[index // each]
        needles.append(Needle(fact, depth))
        before = ends[-1] * _place(depth, index % each, each) / 100
        hidden[bisect_right(ends, before)].append(fact.statement)
    draw.shuffle(needles)
    pieces = list(hidden[0])
    for index, sentence in enumerate(sentences, 1):
        pieces += [sentence, *hidden[index]]
    return Haystack(" ".join(pieces), tuple(needles))


def _facts(count: int, draw: random.Random) -> list[Fact]:
    """Facts whose names and codes all differ, though many names share a word or a number."""
    numbers = draw.sample(range(100, 1000), max(count // 2, 1))
    names = draw.sample([f"{word} {number}" for word in NAMES for number in numbers], count)
    codes = draw.sample(range(100_000, 1_000_000), count)
    return [Fact(name, str(code)) for name, code in zip(names, codes, strict=True)]


def _sentences(room: int, seed: float, count: Count) -> tuple[list[str], list[int]]:
    """Sentences of about `room` tokens together, and how many tokens there are up to each's end."""
    sentences: list[str] = []
    ends: list[int] = []
    end = 0
    for sentence in prose(seed):
        end += count(f" {sentence}")
        if end > room and sentences:
            break
        sentences.append(sentence)
        ends.append(end)
    return sentences, ends


def _place(depth: float, index: int, count: int) -> float:
    """Where, in percent, the one with this index of `count` needles lies that share a depth."""
    if count == 1:
        return depth
    first = min(max(depth - SPREAD / 2, 0.0), 100.0 - SPREAD)
    return first + SPREAD * index / (count - 1)
