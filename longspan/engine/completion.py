"""The sequences of one prompt, and what they give back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longspan.engine.request import Request
from longspan.outputs import CompletionOutput, Logprob, RequestOutput
from longspan.plan import TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Group:
    """The `n` sequences of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    requests: list[Request]
    tokenizer: "PreTrainedTokenizerBase | None"

    @property
    def finished(self) -> bool:
        return all(request.finish_reason for request in self.requests)

    def output(self) -> RequestOutput:
        """Everything so far, as users see it."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[self._completion(index) for index in range(len(self.requests))],
            finished=self.finished,
            num_cached_tokens=self.requests[0].num_cached_tokens,
            metrics=self.requests[0].metrics,
        )

    def _completion(self, index: int) -> CompletionOutput:
        request = self.requests[index]
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = [self._position(drawn) for drawn in request.logprobs]
        return CompletionOutput(
            index=index,
            text=request.detokenizer.text,
            token_ids=list(request.output_token_ids),
            cumulative_logprob=(
                sum(drawn[0].logprob for drawn in request.logprobs) if logprobs else None
            ),
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def _position(self, tokens: Sequence[TokenLogprob]) -> dict[int, Logprob]:
        return {
            token.token_id: Logprob(token.logprob, token.rank, self._decode(token.token_id))
            for token in tokens
        }

    def _decode(self, token_id: int) -> str | None:
        return str(self.tokenizer.decode([token_id])) if self.tokenizer else None
