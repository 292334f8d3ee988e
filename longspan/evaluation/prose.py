"""Endless plain prose, the same for the same seed: what facts are hidden in.

The prose is made here, so that a haystack of any length needs no download. Its sentences are drawn
from a few hundred words; some name numbers, or things that have a number, as distractors.
"""

import random
from collections.abc import Iterator

__all__ = ["PEOPLE", "PLACES", "THINGS", "prose", "words_of"]


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text; a hyphen stands for a space in one."""
    return tuple(word.replace("-", " ") for word in text.split())


PEOPLE = words_of(
    "farmer baker sailor teacher miller doctor painter tailor smith weaver hunter fisher "
    "ferryman shepherd gardener carpenter widow stranger captain student mayor judge singer "
    "writer guard merchant clerk driver cook nurse pilot mason potter monk soldier traveller "
    "neighbour child"
)

PLACES = words_of(
    "village town city valley river forest market square garden bridge mill inn church school "
    "station road field meadow hill mountain coast island lake shore cellar kitchen yard "
    "stable workshop library theatre hospital palace castle tower gate wall street corner "
    "cottage barn orchard quarry mine cave desert plain swamp canal ford pass"
)

THINGS = words_of(
    "basket blanket bottle box bell book candle carpet chair clock cloak coat coin cup "
    "curtain door drum flag flute hammer hat horse cart key knife ladder lamp letter map "
    "mirror needle oven page painting pencil pipe plate rope saddle sack shield ship shoe "
    "shovel spoon stone sword table tent thread tool train tray trunk wagon watch wheel "
    "window violin anchor apple bread butter cheese corn fruit grain honey meat milk onion "
    "pear pepper plum potato salt soup sugar tea wine"
)

_QUALITIES = words_of(
    "old young quiet tired small large heavy light dark bright cold warm narrow wide empty "
    "full broken clean dusty early late poor rich proud careful cheerful clever curious "
    "gentle honest lazy lonely lucky noisy patient plain polite serious simple strange strong "
    "sudden thin weak"
)

_DEEDS = words_of(
    "carried sold bought found lost hid painted mended broke cleaned counted weighed borrowed "
    "brought forgot left kept moved opened closed lifted dropped wrapped washed measured "
    "showed"
)

_ADVERBS = words_of(
    "slowly quickly quietly twice again often never soon early at-last once carefully"
)

_TIMES = words_of(
    "morning evening night day winter summer spring autumn week month year hour afternoon"
)

_NUMBERS = words_of("two three four five six seven eight nine ten eleven twelve twenty thirty")

_PATTERNS = (
    "The {quality} {person} {deed} the {thing} {adverb}.",
    "In the {time} the {person} of the {place} {deed} a {quality} {thing}.",
    "Nobody in the {place} knew why the {person} {deed} the {thing}.",
    "It was a {quality} {time}, and the {place} lay {quality} behind the {place}.",
    "The {person} and the {person} walked from the {place} to the {place}.",
    "There were {number} {quality} people in the {place} that {time}.",
    'A {quality} {person} said that the {thing} was "too {quality}" for the {place}.',
    "After {number} {time}s the {thing} still stood in the {quality} {place}.",
    "Who had {deed} the {thing}? The {person} asked, but the {person} did not answer.",
    "When the {time} came, the {person} {deed} the {thing} and went to the {place}.",
    "The road to the {place} was {quality}, so the {person} {adverb} stopped at the {place}.",
    "The {person} {deed} {digits} {quality} stones near the {place}.",
    "They came to the {place} {digits} in the {time} and saw the {thing} {digits}.",
    "Between the {place} and the {place} one could see a {thing}, a {thing} and a {thing}.",
    "The people of the {place} were {quality} but {quality}, as the {person} had told them.",
    "In the year {year} the {person} {deed} the {thing} in front of the {place}.",
    "It is said that a {thing} {digits} is worth more than a {quality} {thing}.",
    "So the {time} passed, {adverb}, and the {person} was {quality}.",
)

_WORDS = {
    "person": PEOPLE,
    "place": PLACES,
    "thing": THINGS,
    "quality": _QUALITIES,
    "deed": _DEEDS,
    "adverb": _ADVERBS,
    "time": _TIMES,
    "number": _NUMBERS,
}


def prose(seed: float | str) -> Iterator[str]:
    """Sentences without end, each with its full stop and no space around it."""
    draw = random.Random(f"prose {seed}")
    fields = _Fields(draw)
    while True:
        yield draw.choice(_PATTERNS).format_map(fields)


class _Fields(dict[str, str]):
    """Draws a word each time that a pattern asks for one."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def __missing__(self, field: str) -> str:
        if field == "digits":
            return str(self._draw.randrange(2, 1000))
        if field == "year":
            return str(self._draw.randrange(1200, 1950))
        return self._draw.choice(_WORDS[field])
