"""What a request may ask about sampling. Names, defaults and meanings are vLLM's."""

import dataclasses
import difflib
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from longspan.errors import InvalidRequestError

_LARGEST = sys.float_info.max

_REALS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x <= _LARGEST, "a finite number of at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x <= _LARGEST, "a finite number above 0"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2"),
}

_LEAST = {"n": 1, "top_k": -1, "seed": -(2**63), "max_tokens": 1, "min_tokens": 0, "logprobs": -1}
_MOST = 2**63 - 1  # plans carry these numbers to the ranks as 64-bit integers
_MAY_BE_NONE = ("seed", "max_tokens", "logprobs")
_FLAGS = ("ignore_eos", "skip_special_tokens")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends. All lengths are in tokens.

    `temperature` 0 is greedy. `top_k` 0 or -1 and `min_p` 0 switch those filters off.
    `max_tokens` None goes on until the context is full. `logprobs` is how many of the likeliest
    tokens are reported at each position besides the drawn one, -1 for the whole vocabulary.
    `seed` None leaves the seed to the engine. Lists are kept as tuples.

    Raises:
        InvalidRequestError: a parameter is unknown, wrongly typed, outside its limits or
            contradicts another; the message names parameter, value and limit in one line.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    skip_special_tokens: bool = True

    def __new__(cls, **parameters: object) -> Self:
        """Refuse unknown names here, before the generated `__init__` makes a TypeError of them."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in parameters.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known parameters: {known}"
                raise InvalidRequestError(
                    f"unknown sampling parameter {name}={_shown(value)}; {hint}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _REALS:
            self._check_real(name)
        for name in _LEAST:
            self._check_whole(name)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        self._check_stop()
        self._check_stop_token_ids()
        self._check_contradictions()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty if there is none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check_vocab(self, vocab_size: int) -> None:
        """Check what depends on the model, which has token ids 0 .. vocab_size - 1.

        Raises:
            InvalidRequestError: a stop token id is none of the model's, or more logprobs are
                asked for than there are tokens.
        """
        for token_id in self.stop_token_ids or ():
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids contains {token_id}; "
                    f"the model's token ids are 0 to {vocab_size - 1}"
                )
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise InvalidRequestError(
                f"logprobs={self.logprobs} must be at most the vocabulary's {vocab_size}; "
                "-1 reports all of it"
            )

    def _check_real(self, name: str) -> None:
        value = getattr(self, name)
        is_within, limit = _REALS[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_within(value):
            _refuse(name, value, limit)
        object.__setattr__(self, name, float(value))

    def _check_whole(self, name: str) -> None:
        value, least = getattr(self, name), _LEAST[name]
        if value is None and name in _MAY_BE_NONE:
            return
        or_none = " or None" if name in _MAY_BE_NONE else ""
        if not _is_whole(value) or value < least:
            _refuse(name, value, f"a whole number of at least {least}{or_none}")
        if value > _MOST:
            _refuse(name, value, f"at most {_MOST}{or_none}")

    def _check_stop(self) -> None:
        limit = "a string or a list of strings, none of them empty"
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if not isinstance(self.stop, str | tuple | None):
            _refuse("stop", self.stop, limit)
        for string in self.stop_strings:
            if not isinstance(string, str) or not string:
                _refuse("stop", self.stop, limit)

    def _check_stop_token_ids(self) -> None:
        limit = "a list of token ids, whole numbers of at least 0"
        given = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(given, list | tuple):
            _refuse("stop_token_ids", given, limit)
        for token_id in given:
            if not _is_whole(token_id) or token_id < 0:
                _refuse("stop_token_ids", given, limit)
        object.__setattr__(self, "stop_token_ids", tuple(given))

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise InvalidRequestError(
                f"n={self.n} must be 1 with temperature=0, as all completions would be the same; "
                "give a temperature above 0"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(name: str, value: object, limit: str) -> None:
    raise InvalidRequestError(f"{name}={_shown(value)} must be {limit}")


def _shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())
