"""Answers to completions and chats, whole and in chunks: what they say, as OpenAI says it."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from longspan.outputs import CompletionOutput, Logprob, RequestOutput

_LEAST_LOGPROB = -9999.0
"""What is said instead of minus infinity, which JSON has no number for."""


@dataclass(slots=True)
class Usage:
    """Tokens of a request; a prompt counts once, whatever its `n`."""

    prompt_tokens: int
    cached: dict[int, int] = field(default_factory=dict)
    """For each prompt, how many of its tokens the prefix cache had."""
    completion_tokens: int = 0

    def count(self, output: RequestOutput) -> None:
        self.cached[output.prompt_index] = output.num_cached_tokens
        self.completion_tokens += sum(len(one.token_ids) for one in output.outputs)

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())

    def document(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choices(Protocol):
    """What one kind of answer makes of the engine's outputs."""

    object: str
    chunk_object: str

    def chunk(self, index: int, new: CompletionOutput) -> dict[str, Any] | None:
        """What an increment of a choice says; None if that is nothing."""
        ...

    def whole(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        """A choice that has ended."""
        ...


class Answer:
    """An answer of some choices: the documents that a client gets."""

    def __init__(
        self, choices: Choices, request_id: str, model: str, n: int, usage: Usage, *, usages: bool
    ) -> None:
        self._choices = choices
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._n = n
        self._usage = usage
        self._usages = {"usage": None} if usages else {}

    def chunks(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What an increment says, in a chunk for each choice that has anything new."""
        for new in output.outputs:
            index = output.prompt_index * self._n + new.index
            choice = self._choices.chunk(index, new)
            if choice is not None:
                yield self._document(self._choices.chunk_object, [choice], self._usages)

    def last_chunk(self) -> dict[str, Any]:
        """The usage of a stream that has ended."""
        usage = {"usage": self._usage.document()}
        return self._document(self._choices.chunk_object, [], usage)

    def document(self, outputs: Iterable[RequestOutput]) -> dict[str, Any]:
        """The whole answer, of all prompts' outputs."""
        choices = [
            self._choices.whole(output.prompt_index * self._n + completion.index, completion)
            for output in sorted(outputs, key=lambda output: output.prompt_index)
            for completion in output.outputs
        ]
        return self._document(self._choices.object, choices, {"usage": self._usage.document()})

    def _document(
        self, kind: str, choices: Sequence[Any], usage: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **usage}


class TextChoices:
    """The choices of /v1/completions. With `echoes`, choice i begins with prompt i // n's text."""

    object = chunk_object = "text_completion"

    def __init__(self, n: int, echoes: Sequence[str] | None = None) -> None:
        self._n = n
        self._echoes = echoes
        self._offsets: dict[int, int] = {}
        """How far the text of each choice is, as its tokens' own texts add up."""

    def chunk(self, index: int, new: CompletionOutput) -> dict[str, Any] | None:
        first = index not in self._offsets
        choice = self._choice(index, new, self._echo(index) if first else "")
        return choice if choice["text"] or choice["logprobs"] or new.finish_reason else None

    def whole(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        return self._choice(index, completion, self._echo(index))

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n] if self._echoes else ""

    def _choice(self, index: int, new: CompletionOutput, echo: str) -> dict[str, Any]:
        self._offsets.setdefault(index, len(echo))
        return {
            "index": index,
            "text": echo + new.text,
            "logprobs": self._logprobs(index, new.logprobs),
            "finish_reason": new.finish_reason,
            "stop_reason": new.stop_reason,
        }

    def _logprobs(
        self, index: int, positions: Sequence[Mapping[int, Logprob]] | None
    ) -> dict[str, Any] | None:
        if positions is None:
            return None
        said: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for position in positions:
            drawn = next(iter(position.values()))
            token = drawn.decoded_token or ""
            said["tokens"].append(token)
            said["token_logprobs"].append(_number(drawn))
            tops = {one.decoded_token or "": _number(one) for one in position.values()}
            said["top_logprobs"].append(tops)
            said["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(token)
        return said


class ChatChoices:
    """The choices of /v1/chat/completions, with `top_logprobs` tokens at each position."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, top_logprobs: int) -> None:
        self._top_logprobs = top_logprobs
        self._begun: set[int] = set()

    def chunk(self, index: int, new: CompletionOutput) -> dict[str, Any] | None:
        delta: dict[str, Any] = {}
        if index not in self._begun:
            delta["role"] = "assistant"
        if new.text or delta:
            delta["content"] = new.text
        logprobs = self._logprobs(new.logprobs)
        if not (new.text or logprobs or new.finish_reason):
            return None
        self._begun.add(index)
        return {"index": index, "delta": delta, "logprobs": logprobs, **_end(new)}

    def whole(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        logprobs = self._logprobs(completion.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, **_end(completion)}

    def _logprobs(self, positions: Sequence[Mapping[int, Logprob]] | None) -> dict[str, Any] | None:
        if positions is None:
            return None
        return {"content": [self._position(position) for position in positions], "refusal": None}

    def _position(self, position: Mapping[int, Logprob]) -> dict[str, Any]:
        by_rank = sorted(position.values(), key=lambda one: one.rank)
        tops = [_token(one) for one in by_rank if one.rank <= self._top_logprobs]
        return {**_token(next(iter(position.values()))), "top_logprobs": tops}


def _end(completion: CompletionOutput) -> dict[str, Any]:
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}


def _token(one: Logprob) -> dict[str, Any]:
    text = one.decoded_token or ""
    return {"token": text, "logprob": _number(one), "bytes": list(text.encode(errors="replace"))}


def _number(one: Logprob) -> float:
    return max(one.logprob, _LEAST_LOGPROB)
