"""The sequences of one prompt, and what they give back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longspan.engine.request import Request
from longspan.outputs import CompletionOutput, Logprob, RequestOutput
from longspan.plan import TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class _Told:
    """What increments have given out of one sequence besides its text."""

    tokens: int = 0
    logprob: float = 0.0
    end: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """The `n` sequences of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    requests: list[Request]
    tokenizer: "PreTrainedTokenizerBase | None"
    _told: list[_Told] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._told.extend(_Told() for _ in self.requests)

    @property
    def finished(self) -> bool:
        return all(request.finish_reason for request in self.requests)

    @property
    def in_flight(self) -> bool:
        """Whether ranks are at work on it: even if it has ended, its pages are not free yet."""
        return any(request.in_flight for request in self.requests)

    def output(self) -> RequestOutput:
        """Everything so far, as users see it."""
        return self._output([self._completion(index) for index in range(len(self.requests))])

    def increment(self) -> RequestOutput | None:
        """What is new since the last call, as users see it; None if nothing is.

        It has only the sequences with something new. Their text is what no later token can
        change or make part of a stop string. All increments of a sequence add up to what
        `output` has of it at its end, and each costs no more than what is new. Only
        `cumulative_logprob` is that of all tokens so far.
        """
        news = (self._news(index) for index in range(len(self.requests)))
        completions = [completion for completion in news if completion is not None]
        return self._output(completions) if completions else None

    def _output(self, completions: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=completions,
            finished=self.finished,
            num_cached_tokens=self.requests[0].num_cached_tokens,
            metrics=self.requests[0].metrics,
        )

    def _completion(self, index: int) -> CompletionOutput:
        request = self.requests[index]
        return CompletionOutput(
            index=index,
            text=request.detokenizer.text,
            token_ids=list(request.output_token_ids),
            cumulative_logprob=(
                sum(drawn[0].logprob for drawn in request.logprobs) if request.logprobs else None
            ),
            logprobs=self._logprobs(request, 0),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def _news(self, index: int) -> CompletionOutput | None:
        """What is new of one sequence; remembers that it has been told."""
        request, told = self.requests[index], self._told[index]
        start, end = told.tokens, request.finish_reason is not None
        # Text can't be new alone: it comes with a token or with the end.
        if start == len(request.output_token_ids) and told.end == end:
            return None
        told.tokens, told.end = len(request.output_token_ids), end
        told.logprob += sum(drawn[0].logprob for drawn in request.logprobs[start:])
        return CompletionOutput(
            index=index,
            text=request.detokenizer.release(),
            token_ids=request.output_token_ids[start:],
            cumulative_logprob=told.logprob if request.logprobs else None,
            logprobs=self._logprobs(request, start),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def _logprobs(self, request: Request, start: int) -> list[dict[int, Logprob]] | None:
        if request.params.logprobs is None:
            return None
        return [self._position(drawn) for drawn in request.logprobs[start:]]

    def _position(self, tokens: Sequence[TokenLogprob]) -> dict[int, Logprob]:
        return {
            token.token_id: Logprob(token.logprob, token.rank, self._decode(token.token_id))
            for token in tokens
        }

    def _decode(self, token_id: int) -> str | None:
        return str(self.tokenizer.decode([token_id])) if self.tokenizer else None
