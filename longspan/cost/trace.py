"""Which requests came when, as JSON lines: of a real day or an imagined one."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import msgspec
from msgspec import Meta

from longspan.errors import InvalidRequestError

if TYPE_CHECKING:
    from longspan.outputs import RequestOutput

_AtLeastNone = Annotated[int, Meta(ge=0)]
_AtLeastOne = Annotated[int, Meta(ge=1)]


class Arrival(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One request of a trace: `n` sequences of one prompt, each with `output_tokens` tokens.

    `time` is in seconds since the trace began, `prompt` a number of tokens or the token ids.
    The engine is told that outputs have no more than `max_tokens` tokens; without it, no more
    than `output_tokens`. Prompts of one `prefix` begin alike, with its first `prefix_tokens`
    tokens; all else that is not given as token ids is different in each request.

    Raises:
        ValueError: fields contradict each other.
    """

    time: Annotated[float, Meta(ge=0)]
    prompt: _AtLeastOne | tuple[_AtLeastNone, ...]
    output_tokens: _AtLeastOne
    max_tokens: _AtLeastOne | None = None
    priority: int = 0
    n: _AtLeastOne = 1
    prefix: str | None = None
    prefix_tokens: _AtLeastNone = 0

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < self.output_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} is less than output_tokens={self.output_tokens}"
            )
        if self.prefix_tokens and self.prefix is None:
            raise ValueError(f"prefix_tokens={self.prefix_tokens} needs a prefix")
        if self.prefix is not None and not isinstance(self.prompt, int):
            raise ValueError(f"prefix={self.prefix!r} needs a prompt that is a number of tokens")
        if self.prefix_tokens > self.num_prompt_tokens:
            raise ValueError(
                f"prefix_tokens={self.prefix_tokens} is more than the prompt's "
                f"{self.num_prompt_tokens} tokens"
            )

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt if isinstance(self.prompt, int) else len(self.prompt)


_decoder = msgspec.json.Decoder(Arrival)


class Trace:
    """Arrivals in the order of their times."""

    def __init__(self, arrivals: Iterable[Arrival]) -> None:
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival.time)
        names = dict.fromkeys(arrival.prefix for arrival in self.arrivals)
        self._prefixes = {name: number for number, name in enumerate(names)}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file with one arrival in each line, as `save` writes it.

        Raises:
            InvalidRequestError: names the first wrong line and its wrong field.
        """
        arrivals = []
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        arrivals.append(_decoder.decode(line))
                    except msgspec.DecodeError as error:
                        raise InvalidRequestError(f"{path}, line {number}: {error}") from None
        return cls(arrivals)

    def save(self, path: str | Path) -> None:
        """Write one line of JSON for each arrival, without the fields that are as by default."""
        Path(path).write_bytes(msgspec.json.Encoder().encode_lines(self.arrivals))

    @classmethod
    def of(cls, outputs: "Iterable[RequestOutput]", token_ids: bool = True) -> Self:
        """The trace of requests that have been served; those that were refused are left out.

        Without `token_ids` it tells nothing of the prompts but their lengths, and so nothing of
        what they had in common.
        """
        served = [(out, out.metrics.arrival_time) for out in outputs if out.metrics is not None]
        begin = min((time for _, time in served), default=0.0)
        return cls(
            Arrival(
                time=time - begin,
                prompt=tuple(out.prompt_token_ids) if token_ids else len(out.prompt_token_ids),
                output_tokens=max(max(len(one.token_ids) for one in out.outputs), 1),
                n=len(out.outputs),
            )
            for out, time in served
        )

    def prompt(self, index: int, vocab_size: int) -> list[int]:
        """The token ids of one arrival's prompt; made up, the same each time, if not given."""
        arrival = self.arrivals[index]
        if not isinstance(arrival.prompt, int):
            return list(arrival.prompt)
        own = _digits(2 * index + 1, arrival.prompt - arrival.prefix_tokens, vocab_size)
        if not arrival.prefix_tokens:
            return own
        number = 2 * self._prefixes[arrival.prefix]
        return _digits(number, arrival.prefix_tokens, vocab_size) + own


def _digits(number: int, length: int, base: int) -> list[int]:
    """So many digits of a number, the lowest first: different numbers soon differ."""
    digits = [0] * length
    for place in range(length):
        if not number:
            break
        number, digits[place] = divmod(number, base)
    return digits
