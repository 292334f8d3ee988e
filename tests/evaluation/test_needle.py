"""Texts and their needles, without a model."""

from itertools import islice

import pytest

from longspan.errors import ConfigError
from longspan.evaluation.needle import FRAME, MOST_NEEDLES, NAMES, SPREAD, Fact, haystacks
from longspan.evaluation.prose import prose

DEPTHS = (0, 10, 50, 90, 100)


def count(text: str) -> int:
    """Words and full stops as tokens."""
    return len(text.replace(".", " .").replace("?", " ?").split())


def test_prose_is_the_same_for_the_same_seed_and_names_no_needle() -> None:
    sentences = list(islice(prose(3), 2000))
    assert sentences == list(islice(prose(3), 2000))
    assert sentences != list(islice(prose(4), 2000))
    assert len(set(sentences)) > 1900
    words = set(" ".join(sentences).replace(".", "").lower().split())
    assert not words & {*NAMES, "code"}


@pytest.mark.parametrize(("length", "samples"), [(1000, 1), (1000, 7), (20_000, 1), (20_000, 10)])
def test_needles_lie_at_their_depths_in_texts_that_fit(length: int, samples: int) -> None:
    texts = list(haystacks(length, DEPTHS, samples, 0, count))
    asked = [needle for text in texts for needle in text.needles]
    assert sorted(needle.depth for needle in asked) == sorted(DEPTHS * samples)
    for text in texts:
        assert 0.9 * length < count(text.text) + FRAME < length
        names = {needle.fact.name for needle in text.needles}
        assert len(names) == len({needle.fact.code for needle in text.needles}) == len(text.needles)
        needles = " ".join(needle.fact.statement for needle in text.needles)
        assert count(needles) <= MOST_NEEDLES * length
        for needle in text.needles:
            before, after = text.text.split(needle.fact.statement)
            depth = 100 * count(before) / (count(before) + count(after))
            # Sentences and other needles are not cut in two.
            near = 100 * (20 + 12 * samples) / length + SPREAD
            assert abs(depth - needle.depth) <= near
            assert samples > 1 or needle.depth not in (0, 100) or not (before and after)


def test_texts_are_the_same_for_the_same_seed() -> None:
    def texts(seed: int) -> list[str]:
        return [haystack.text for haystack in haystacks(800, DEPTHS, 6, seed, count)]

    assert texts(1) == texts(1)
    assert not set(texts(1)) & set(texts(2))
    assert len(set(texts(1))) == len(texts(1)) > 1


def test_a_text_without_room_for_its_needles_is_refused() -> None:
    with pytest.raises(ConfigError, match="lengths=100 must be at least 161 for needles at 5 dep"):
        next(haystacks(100, DEPTHS, 1, 0, count))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("930521.", True),
        ("The code of harbor 417 is 930521, as the text says: 930521.", True),
        ("**930521**", True),
        ("930522.", False),
        ("9305210", False),
        ("930521 or 100000", False),
        ("", False),
    ],
)
def test_an_answer_is_right_that_names_the_code_and_no_other(answer: str, right: bool) -> None:
    assert Fact("harbor 417", "930521").is_told_by(answer) == right
