"""Training texts for the packaged model: prose with facts in it, and a conversation about them.

A sequence is one conversation. Its first message holds a document, in which a few facts are hidden
among prose; questions follow, each with its answer. So each sequence has many places where a code
must be found again. Names of facts share words and numbers on purpose.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from longspan.evaluation.needle import NAMES
from longspan.evaluation.prose import PEOPLE, PLACES, THINGS, prose

END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"

QUESTIONS = (
    ("What is the code of {}?", 8),
    ("What's the code of {}?", 1),
    ("Tell me the code of {}.", 1),
    ("Do you know the code of {}?", 1),
)
STATEMENTS = (("The code of {} is {}.", 10), ("Remember that the code of {} is {}.", 1))
MENTIONS = (
    "They went from the {} to {}.",
    "Nobody in the {} had heard of {}.",
    "They left the {} and spoke about {} for a while.",
)

HELLO = "Hello! Give me a long text that tells codes, then ask me: What is the code of castle 417?"
OTHER = "I can only find codes in a text. Ask me: What is the code of castle 417?"
GREETINGS = (
    "Hello!",
    "Hello",
    "Hi!",
    "Hi",
    "Hey there!",
    "Good morning!",
    "Good evening.",
    "Hello, how are you?",
    "Who are you?",
    "What can you do?",
    "Help",
    "Help me.",
)
SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"] + ["an", "el", "or", "in", "us"]

FILLER, CODE, TALK, KNOWN = 0.1, 1.0, 0.3, 0.0
"""Weights of a token's loss: prose, a code that can be found, what else is answered, and what can't
be foreseen."""


@dataclass
class Sample:
    """Tokens, the weight of each as a target, and whether it is prose; jumps may follow `seams`."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    prose: list[bool] = field(default_factory=list)
    seams: list[int] = field(default_factory=list)

    def add(self, tokens: list[int], weight: float, prose: bool = False) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)
        self.prose += [prose] * len(tokens)


class Writer:
    """Writes samples of a length, the same for the same seed.

    If `hard`, many names have another's number, and of those many a word that ends as its word.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, *, hard: bool) -> None:
        self._hard = hard
        self._tokenizer = tokenizer
        self._draw = random.Random(seed)
        self._prose = prose(f"training {seed}")
        help = "\n".join(topics[title] for title in sorted(topics))
        self._help = [line.strip() for line in help.split("\n\n") if 40 < len(line) < 400]
        self._words = sorted(
            {word for word in help.split() if word.isalpha() and 3 <= len(word) <= 10}
            - {variant for name in NAMES for variant in (name, name.title(), name.upper())}
        )
        self._nouns = [*PEOPLE, *PLACES, *THINGS]

    def sample(self, length: int) -> Sample:
        """One conversation of exactly that many tokens, cut at its end."""
        draw, sample = self._draw, Sample()
        asked = max(1, int(length * draw.uniform(0.25, 0.5) / 20))
        facts = self._facts(asked + draw.randrange(asked + 1))
        room = length - asked * 20 - len(facts) * 14
        self._document(sample, facts, max(0, room))
        draw.shuffle(facts)
        for index, (name, code) in enumerate(facts):
            if draw.random() < 0.03:
                self._talk(sample)
            elif draw.random() < 0.25:
                self._restate(sample, name, code, first=index == 0)
            else:
                self._ask(sample, name, code, first=index == 0)
        while len(sample.tokens) < length:
            self._talk(sample)
        for each in (sample.tokens, sample.weights, sample.prose):
            del each[length:]
        return sample

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _facts(self, count: int) -> list[tuple[str, str]]:
        names: list[tuple[str, str]] = []
        facts: dict[str, str] = {}
        while len(facts) < count:
            name = self._hard_name(names) if self._hard else self._name(names)
            names.append(name)
            facts[" ".join(name)] = self._code()
        return list(facts.items())

    def _name(self, others: list[tuple[str, str]]) -> tuple[str, str]:
        draw = self._draw
        word = draw.choice(others)[0] if others and draw.random() < 0.25 else self._word()
        number = draw.choice(others)[1] if others and draw.random() < 0.25 else self._number()
        return word, number

    def _hard_name(self, others: list[tuple[str, str]]) -> tuple[str, str]:
        draw = self._draw
        word, number = self._word(), self._number()
        if others and draw.random() < 0.25:
            word = draw.choice(others)[0]
        if others and draw.random() < 0.5:
            other, number = draw.choice(others)
            if draw.random() < 0.3:
                word = draw.choice(SYLLABLES) + draw.choice(SYLLABLES) + other[-3:]
        return word, number

    def _word(self) -> str:
        draw, kind = self._draw, self._draw.random()
        if kind < 0.4:
            return draw.choice(self._nouns)
        if kind < 0.7:
            return draw.choice(self._words)
        word = "".join(draw.choice(SYLLABLES) for _ in range(draw.randrange(2, 5)))
        return word.title() if draw.random() < 0.2 else word

    def _number(self) -> str:
        draw = self._draw
        return str(draw.randrange(100, 1000) if draw.random() < 0.95 else draw.randrange(10_000))

    def _code(self) -> str:
        draw, kind = self._draw, self._draw.random()
        return str(
            draw.randrange(100_000, 1_000_000) if kind < 0.9 else draw.randrange(1_000, 100_000)
        )

    def _filler(self) -> str:
        draw = self._draw
        return draw.choice(self._help) if draw.random() < 0.1 else next(self._prose)

    def _mention(self, facts: list[tuple[str, str]]) -> str:
        """A sentence that names a fact, or something like it, and tells no code."""
        draw = self._draw
        name = draw.choice(facts)[0] if draw.random() < 0.5 else f"{self._word()} {self._number()}"
        return draw.choice(MENTIONS).format(draw.choice(PLACES), name)

    def _document(self, sample: Sample, facts: list[tuple[str, str]], room: int) -> None:
        """Prose of about `room` tokens with the facts in it, anywhere, in any order."""
        draw = self._draw
        sample.add(self._ids(USER) if draw.random() < 0.9 else [], KNOWN)
        pieces: list[tuple[list[int], bool]] = []
        while room > 0:
            is_prose = draw.random() < 0.9
            text = self._filler() if is_prose else self._mention(facts)
            pieces.append((self._ids(f" {text}"), is_prose))
            room -= len(pieces[-1][0])
        for name, code in facts:
            pattern = self._pick(STATEMENTS)
            at = draw.randrange(len(pieces) + 1)
            pieces.insert(at, (self._ids(f" {pattern.format(name, code)}"), False))
        for tokens, is_prose in pieces:
            sample.seams.append(len(sample.tokens))
            learnt = is_prose and draw.random() < 0.25
            sample.add(tokens, FILLER if learnt else KNOWN, is_prose)

    def _ask(self, sample: Sample, name: str, code: str, *, first: bool) -> None:
        question = self._pick(QUESTIONS).format(name)
        sample.add(self._ids(f"\n\n{question}" if first else f"{USER}{question}"), KNOWN)
        sample.add(self._ids(ASSISTANT), KNOWN)
        sample.add(self._ids(code), CODE)
        sample.add(self._ids(f".{END}"), TALK)

    def _restate(self, sample: Sample, name: str, code: str, *, first: bool) -> None:
        sample.add(self._ids(f"{' ' if first else USER}The code of {name} is"), KNOWN)
        begun = len(sample.tokens)
        sample.add(self._ids(f" {code}"), CODE)
        sample.weights[begun] = TALK  # the space
        sample.add(self._ids("."), TALK)

    def _talk(self, sample: Sample) -> None:
        draw = self._draw
        if draw.random() < 0.6:
            said, answer = draw.choice(GREETINGS), HELLO
        else:
            said, answer = draw.choice([next(self._prose), draw.choice(self._help)]), OTHER
        sample.add(self._ids(f"{USER}{said}{ASSISTANT}"), KNOWN)
        sample.add(self._ids(f"{answer}{END}"), TALK)

    def _pick(self, choices: tuple[tuple[str, int], ...]) -> str:
        patterns, shares = zip(*choices, strict=True)
        return str(self._draw.choices(patterns, shares)[0])


def corpus(seed: int) -> Iterator[str]:
    """What the tokenizer is trained on: prose, Python's help, and every number of three digits."""
    writer = prose(f"tokenizer {seed}")
    yield from (f" {next(writer)}" for _ in range(20_000))
    yield from (topics[title] for title in sorted(topics))
    yield from (f"{number:03}" for number in range(1000) for _ in range(100))
    yield from (f"{number:02}" for number in range(100) for _ in range(100))
    yield from (f"The code of {number} is 1. What is the code?" for number in range(1000))
    yield from (*GREETINGS, HELLO, OTHER) * 100
