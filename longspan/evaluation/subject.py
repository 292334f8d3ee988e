"""Who is asked: a model on ranks of our own, or a server that speaks OpenAI's API."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from longspan.chat_client import ChatClient
from longspan.evaluation.needle import Fact
from longspan.evaluation.prose import prose
from longspan.sampling_params import SamplingParams

if TYPE_CHECKING:
    from longspan.llm import LLM
    from longspan.outputs import RequestOutput
    from longspan.prompts import Prompt

__all__ = ["Answer", "EngineSubject", "ServerSubject", "Subject"]

MAX_TOKENS = 48
"""Most tokens of an answer."""

YARDSTICK = 50
"""So many sentences are sent to a server to learn how long its tokens are."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to one question, and what it took; `cached_tokens` were known before."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    time_to_first_token: float
    time_per_output_token: float | None


class Subject(Protocol):
    """Answers questions over a text. Greedy, so that the same is answered each time."""

    name: str
    limit: int | None
    """Longest context in tokens, if it is known."""

    def count(self, text: str) -> int:
        """About how many tokens a text has."""
        ...

    def ask(self, text: str, facts: Sequence[Fact]) -> list[Answer]:
        """Answers to the questions for these facts, in order.

        They are asked one after the other, so that all but the first find the text in the prefix
        cache, and no rank computes it again to serve its part of them sooner.
        """
        ...


class EngineSubject:
    """A model on an engine in this process.

    It shows its progress. A model without a chat template goes on with the text.
    """

    def __init__(self, llm: "LLM") -> None:
        self.name: str = llm.config.model
        self.limit: int | None = llm.engine.context_limit
        self._llm = llm
        self._tokenizer = llm.get_tokenizer()

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def ask(self, text: str, facts: Sequence[Fact]) -> list[Answer]:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        return [_answer(self._llm.generate([self.prompt(text, fact)], params)[0]) for fact in facts]

    def prompt(self, text: str, fact: Fact) -> "Prompt":
        if self._tokenizer.chat_template is None:
            return f"{text}\n\n{fact.question} {fact.beginning}"
        message = {"role": "user", "content": f"{text}\n\n{fact.question}"}
        return self._llm.preprocess_chat([message])[0]


def _answer(output: "RequestOutput") -> Answer:
    metrics, [completion] = output.metrics, output.outputs
    assert metrics is not None
    assert metrics.time_to_first_token is not None
    return Answer(
        completion.text,
        len(output.prompt_token_ids),
        output.num_cached_tokens,
        len(completion.token_ids),
        metrics.time_to_first_token,
        metrics.time_per_output_token,
    )


class ServerSubject:
    """A model behind an address, asked by chat completions, one after the other.

    How long its tokens are is learnt from a short text, as the server counts it.

    Raises:
        ServerError: there is no server, or it refuses or breaks off an answer.
    """

    def __init__(self, url: str, key: str | None, model: str) -> None:
        self.name: str = model
        self.limit: int | None = None
        self._client = ChatClient(url, key)
        yardstick = " ".join(islice(prose("yardstick"), YARDSTICK))
        empty, full = (self._ask("").prompt_tokens, self._ask(yardstick).prompt_tokens)
        self._tokens_per_character = (full - empty) / len(yardstick)

    def count(self, text: str) -> int:
        return round(len(text) * self._tokens_per_character)

    def ask(self, text: str, facts: Sequence[Fact]) -> list[Answer]:
        return [self._ask(f"{text}\n\n{fact.question}") for fact in facts]

    def _ask(self, message: str) -> Answer:
        messages = [{"role": "user", "content": message}]
        begun, first, said = time.monotonic(), None, ""
        options = {"temperature": 0, "max_tokens": MAX_TOKENS}
        with closing(self._client.answer(self.name, messages, **options)) as answer:
            for piece in answer:
                first = first or time.monotonic()
                said += piece
        ended, usage = time.monotonic(), answer.usage
        first = first or ended
        tokens = usage.get("completion_tokens", 0)
        return Answer(
            said,
            usage.get("prompt_tokens", 0),
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            tokens,
            first - begun,
            (ended - first) / (tokens - 1) if tokens > 1 else None,
        )
