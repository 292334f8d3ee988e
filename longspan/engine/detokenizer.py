"""Turns one completion's tokens into text as they come, and finds the stop strings in it."""

from typing import TYPE_CHECKING

from longspan.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what decoders write for bytes that are not UTF-8, or not yet
_MOST_OPEN = 3  # tokens, each of a byte or more, that can lie before a character's last byte


class Detokenizer:
    """The text of one completion, in amortised constant time a token.

    The text is `tokenizer.decode` of all tokens, cut before the first stop string to be complete;
    of several that end on the same character, the longest counts. How the text was cut into
    tokens makes no difference. One exception: where a byte-fallback tokenizer's `decode` gives up
    a whole run of byte tokens for one broken character, the characters before it stay; U+FFFD
    itself, spelled in byte tokens, counts as broken.

    Stop strings count only in text that follows the first `min_tokens` tokens. Text that may yet
    become a stop string is held back from `release`. Without a tokenizer the text stays empty.

    Raises:
        InvalidRequestError: there are stop strings but no tokenizer.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
    ) -> None:
        if tokenizer is None and stop:
            raise InvalidRequestError(
                f"stop={list(stop)} needs a tokenizer, but the engine has none; use stop_token_ids"
            )
        self._window = None if tokenizer is None else _Window(tokenizer, skip_special_tokens)
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._certain: list[str] = []
        self._num_released = 0
        self._held = ""
        self._ended = False

    @property
    def text(self) -> str:
        """The text so far, with what is held back; after the end the final text.

        Each call costs the text's length.
        """
        return "".join(self._certain) + self._held

    def append(self, token_id: int) -> str | None:
        """Take one more token; return the stop string that it completes, which ends the text."""
        assert not self._ended, "the text has ended"
        self._num_tokens += 1
        return self._accept(self._window.append(token_id)) if self._window else None

    def finish(self) -> str | None:
        """End the text for another reason than a stop string: hold nothing back any longer.

        Returns a stop string that the last characters complete, as `append` does.
        """
        assert not self._ended, "the text has ended"
        stop = self._accept(self._window.pending()) if self._window else None
        if stop is None:
            self._end(self._held)
        return stop

    def release(self) -> str:
        """The text that has become certain since the last call; all calls add up to the text."""
        news = "".join(self._certain[self._num_released :])
        self._num_released = len(self._certain)
        return news

    def _accept(self, news: str) -> str | None:
        text = self._held + news
        if self._num_tokens > self._min_tokens and self._stop:
            if match := _first_match(text, self._stop):
                end, stop = match
                self._end(text[: end - len(stop)])
                return stop
            start = _first_start(text, self._stop)
        else:
            start = len(text)
        self._certain.append(text[:start])
        self._held = text[start:]
        return None

    def _end(self, last: str) -> None:
        self._certain.append(last)
        self._held = ""
        self._ended = True


class _Window:
    """The last few tokens of a text: as many as decide what text the next token adds.

    Tokens that end inside a UTF-8 character are *open*: their text is not known yet. Those before
    them are context, without which decoders would treat the open ones as the start of a text and
    strip their space, say. `known` is the text of the window's tokens that was given out.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._num_context = 0
        self._known = ""

    def append(self, token_id: int) -> str:
        """The text that one more token adds or completes; empty while a character is open."""
        self._token_ids.append(token_id)
        news = self.pending()
        if not news or news.endswith(_BROKEN):
            return self._wait(token_id, news)
        self._token_ids = self._token_ids[self._num_context :]
        self._num_context = len(self._token_ids)
        self._known = self._decode(self._token_ids)
        return news

    def pending(self) -> str:
        """The text of the tokens that are still open, as it looks without any more of them."""
        text = self._decode(self._token_ids)
        if text.startswith(self._known):
            return text[len(self._known) :]
        return self._decode(self._token_ids[self._num_context :])

    def _wait(self, token_id: int, news: str) -> str:
        """What to give out after a token that adds no text, or ends inside a character."""
        if self._is_textless(token_id, news):
            self._token_ids.pop()  # lest a run of such tokens make the window long
            return ""
        if not news:
            self._num_context = len(self._token_ids)
            return ""
        return self._give_up(news)

    def _give_up(self, news: str) -> str:
        """What is certain of `news`, which ends inside a character.

        A character is open for at most 3 tokens. Where there are more, all but the last U+FFFD is
        broken for good, and that last one comes from the last 3 tokens alone.
        """
        tail = self._token_ids[-_MOST_OPEN:]
        num_open = len(self._token_ids) - self._num_context
        if num_open <= _MOST_OPEN or not self._decode(tail).endswith(_BROKEN):
            return ""
        self._token_ids, self._num_context = tail, 0
        self._known = self._decode(tail).removesuffix(_BROKEN)
        return news.removesuffix(_BROKEN)

    def _is_textless(self, token_id: int, news: str) -> bool:
        """Whether a token has no text for good: a skipped or unknown one.

        At the start of a text it may also be a space that the decoder strips, which matters to
        the tokens after it; that one has no text even where special tokens have.
        """
        if self._decode([token_id]):
            return False
        return bool(self._known or news or self._tokenizer.decode([token_id]))

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        assert isinstance(text, str)  # a list only for a batch
        return text


def _first_match(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """The end and the string of the match that is complete first, the longest if several are."""
    matches = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    return min(matches, key=lambda match: (match[0], -len(match[1])), default=None)


def _first_start(text: str, stops: tuple[str, ...]) -> int:
    """Where the longest end of `text` begins that a stop string begins with; its length if none."""
    longest = max(map(len, stops))
    candidates = range(max(0, len(text) - longest + 1), len(text))
    return next((i for i in candidates if any(s.startswith(text[i:]) for s in stops)), len(text))
