"""Text from tokens, one token at a time, against `tokenizer.decode` of all. Pure Python."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longspan.engine.detokenizer import Detokenizer
from longspan.errors import InvalidRequestError

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "很长的提示分布在许多设备上。",
    "Party 🎉🎉 with a family 👨‍👩‍👧‍👦 and a thumb 👍🏽!\n\tNaïve café.",
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As of GPT-2 and Llama 3: any bytes may meet in a token. Ids 0 and 1 are special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As of Llama 2: a text's first space is stripped, unknown characters are byte tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
EOS = 0
UNKNOWN = 10**6

texts = st.one_of(
    st.sampled_from(SENTENCES),
    st.text(max_size=40),
    st.text("ab 世界🎉\ufffd", max_size=40),
)
token_ids = st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=60)
broken_bytes = st.lists(
    st.sampled_from([0, 1, *BYTE_LEVEL("界🎉a\ufffd")["input_ids"], *range(160, 250)]), max_size=60
)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def bytes_of(text: str) -> list[int]:
    """The text in the byte-level tokenizer's tokens of one byte each."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    if not text:
        return []
    ids = BYTE_LEVEL.convert_tokens_to_ids(list(letters(text)[0][0]))
    assert isinstance(ids, list)
    return ids


def run(detokenizer: Detokenizer, ids: list[int]) -> tuple[list[str], str | None]:
    """What a stream gets after each token and at the end, and the stop string that ended it."""
    released = []
    for token_id in ids:
        stop = detokenizer.append(token_id)
        released.append(detokenizer.release())
        if stop is not None:
            return released, stop
    stop = detokenizer.finish()
    return [*released, detokenizer.release()], stop


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


class Spy:
    """A tokenizer that notes how many tokens it has to decode at most at a time."""

    def __init__(self) -> None:
        self.longest = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str | list[str]:
        self.longest = max(self.longest, len(ids))
        return BYTE_LEVEL.decode(ids, skip_special_tokens=skip_special_tokens)


class TestText:
    @given(token_ids | broken_bytes, st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_any_tokens_give_the_text_of_decode(self, ids: list[int], skip: bool) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL, skip_special_tokens=skip)
        released, stop = run(detokenizer, ids)
        expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
        assert "".join(released) == detokenizer.text == expected
        assert stop is None

    @given(texts)
    @settings(max_examples=200, deadline=None)
    def test_the_tokens_of_a_text_give_the_text(self, text: str) -> None:
        released, _ = run(Detokenizer(BYTE_LEVEL), encode(BYTE_LEVEL, text))
        assert "".join(released) == text

    @given(texts.filter(lambda text: "\ufffd" not in text))
    @settings(max_examples=200, deadline=None)
    def test_so_do_those_of_a_byte_fallback_tokenizer(self, text: str) -> None:
        ids = encode(BYTE_FALLBACK, text)
        released, _ = run(Detokenizer(BYTE_FALLBACK), ids)
        assert "".join(released) == BYTE_FALLBACK.decode(ids, skip_special_tokens=True)

    def test_a_character_is_released_with_its_last_byte(self) -> None:
        released, _ = run(Detokenizer(BYTE_LEVEL), bytes_of("a🎉界é"))
        assert released == ["a", "", "", "", "🎉", "", "", "界", "", "é", ""]

    def test_special_tokens_inside_a_character_do_not_break_it(self) -> None:
        first, *others = bytes_of("🎉")
        released, _ = run(Detokenizer(BYTE_LEVEL), [first, *[EOS] * 20, *others])
        assert "".join(released) == "🎉"

    def test_special_tokens_are_shown_on_request(self) -> None:
        ids = [EOS, *bytes_of("a"), EOS]
        assert "".join(run(Detokenizer(BYTE_LEVEL), ids)[0]) == "a"
        shown, _ = run(Detokenizer(BYTE_LEVEL, skip_special_tokens=False), ids)
        assert "".join(shown) == "<eos>a<eos>"

    def test_an_incomplete_character_is_held_until_the_end(self) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL)
        for token_id in bytes_of("a🎉")[:-1]:
            detokenizer.append(token_id)
        assert detokenizer.text == "a"
        detokenizer.finish()
        assert detokenizer.text == "a\ufffd"

    def test_an_incomplete_character_of_byte_fallback_leaves_those_before_it(self) -> None:
        released, _ = run(Detokenizer(BYTE_FALLBACK), encode(BYTE_FALLBACK, "界🎉")[:-1])
        assert "".join(released) == "界\ufffd\ufffd\ufffd"

    def test_a_broken_byte_under_byte_fallback_breaks_the_run_that_follows(self) -> None:
        broken: Any = BYTE_FALLBACK.convert_tokens_to_ids("<0xFF>")
        ids = [broken, *encode(BYTE_FALLBACK, "界界")[1:], *encode(BYTE_FALLBACK, "a")]
        released, _ = run(Detokenizer(BYTE_FALLBACK), ids)
        assert "".join(released) == BYTE_FALLBACK.decode(ids) == "\ufffd" * 7 + " a"

    @pytest.mark.parametrize(
        "ids",
        [
            bytes_of("abc 界🎉") * 100,
            bytes_of("界")[:1] * 500,
            bytes_of("界")[1:] * 300,
            [EOS] * 500,
            bytes_of("a") + [UNKNOWN] * 500,
            bytes_of("🎉")[:-1] + [EOS, UNKNOWN] * 500 + bytes_of("🎉")[-1:],
        ],
        ids=["text", "lead bytes", "trail bytes", "special", "unknown", "inside a character"],
    )
    def test_no_run_of_tokens_makes_the_decoded_window_long(self, ids: list[int]) -> None:
        spy: Any = Spy()
        released, _ = run(Detokenizer(spy), ids)
        assert "".join(released) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)
        assert spy.longest <= 8

    def test_without_a_tokenizer_the_text_stays_empty(self) -> None:
        detokenizer = Detokenizer(None)
        assert run(detokenizer, [1, 2, 10**9]) == (["", "", "", ""], None)
        assert detokenizer.text == ""


class TestStop:
    @given(st.data())
    @settings(max_examples=150, deadline=None)
    def test_the_text_is_cut_where_the_definition_cuts_it(self, data: st.DataObject) -> None:
        text = data.draw(texts)
        places = st.integers(0, len(text))
        pieces = st.builds(
            lambda start, size: text[start : start + size], places, st.integers(1, 6)
        )
        stops = data.draw(
            st.lists((pieces | st.text("ab 世", min_size=1)).filter(bool), max_size=4)
        )
        for ids in (encode(BYTE_LEVEL, text), bytes_of(text)):
            detokenizer = Detokenizer(BYTE_LEVEL, stop=tuple(stops))
            released, stop = run(detokenizer, ids)
            assert (detokenizer.text, stop) == cut(text, stops)
            assert "".join(released) == detokenizer.text

    @given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=2, max_size=6), min_size=1))
    @settings(max_examples=200, deadline=None)
    def test_only_what_may_become_a_stop_string_is_held(self, text: str, stops: list[str]) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL, stop=tuple(stops))
        released = ""
        for end, token_id in enumerate(bytes_of(text), start=1):
            if detokenizer.append(token_id) is not None:
                return
            released += detokenizer.release()
            seen = text[:end]
            held = max(
                size
                for stop in stops
                for size in range(min(len(stop), end + 1))
                if seen.endswith(stop[:size])
            )
            assert released == seen[: end - held]
            assert detokenizer.text == seen

    def test_a_stop_string_over_many_tokens_is_never_shown(self) -> None:
        released, stop = run(Detokenizer(BYTE_LEVEL, stop=("STOP",)), bytes_of("ab STAB STOP x"))
        assert released == ["a", "b", " ", "", "", "STA", "B", " ", "", "", "", ""]
        assert stop == "STOP"

    def test_text_after_the_stop_string_in_the_same_token_is_cut(self) -> None:
        [token_id] = encode(BYTE_LEVEL, " quick")
        detokenizer = Detokenizer(BYTE_LEVEL, stop=("ui",))
        assert detokenizer.append(token_id) == "ui"
        assert detokenizer.text == detokenizer.release() == " q"

    def test_of_stop_strings_that_end_together_the_longest_counts(self) -> None:
        for stops in (("c", "abc", "bc"), ("abc", "c")):
            detokenizer = Detokenizer(BYTE_LEVEL, stop=stops)
            assert run(detokenizer, bytes_of("xabc"))[1] == "abc"
            assert detokenizer.text == "x"

    def test_the_end_releases_what_was_held(self) -> None:
        released, stop = run(Detokenizer(BYTE_LEVEL, stop=("abcd",)), bytes_of("xabc"))
        assert released == ["x", "", "", "", "abc"]
        assert stop is None

    def test_a_stop_string_may_hold_the_sign_for_broken_bytes(self) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL, stop=("a\ufffd",))
        assert run(detokenizer, bytes_of("xa🎉")[:-1]) == (["x", "", "", "", "", ""], "a\ufffd")
        assert detokenizer.text == "x"

    def test_stop_strings_do_not_count_in_the_first_min_tokens(self) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL, stop=("ab",), min_tokens=3)
        released, stop = run(detokenizer, bytes_of("ababab"))
        assert released == ["a", "b", "a", "b", "", ""]
        assert stop == "ab"
        assert detokenizer.text == "abab"

    @pytest.mark.parametrize("end", ["stop", "finish"])
    def test_nothing_follows_the_end(self, end: str) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL, stop=("b",))
        [a, b] = bytes_of("ab")
        detokenizer.append(a)
        detokenizer.append(b) if end == "stop" else detokenizer.finish()
        with pytest.raises(AssertionError, match="the text has ended"):
            detokenizer.append(a)
        with pytest.raises(AssertionError, match="the text has ended"):
            detokenizer.finish()

    def test_stop_strings_need_a_tokenizer(self) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            Detokenizer(None, stop=("x",))
        assert str(refused.value) == (
            "stop=['x'] needs a tokenizer, but the engine has none; use stop_token_ids"
        )
