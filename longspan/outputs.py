"""What a request gives back. Fields have vLLM's names and meanings."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Natural-log probability of one token under the model, before penalties and temperature.

    `rank` is 1 for the likeliest token of the vocabulary.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` completions of a request.

    `finish_reason` is "stop" (end-of-sequence token, stop token or stop string), "length"
    (`max_tokens` or the longest possible context), "abort", "error", or None while it runs.
    `stop_reason` is the stop string or stop token id that ended it, None for end-of-sequence.
    `logprobs[i]` maps token ids to their Logprob at output position i.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, increment: "CompletionOutput") -> None:
        """Append the increment of the same completion that follows in a stream."""
        self.text += increment.text
        self.token_ids += increment.token_ids
        if increment.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += increment.logprobs
        self.cumulative_logprob = increment.cumulative_logprob
        self.finish_reason, self.stop_reason = increment.finish_reason, increment.stop_reason


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the clock of `time.monotonic()`; of the first completion for n > 1.

    `kv_tokens[r]` is how many of the request's tokens had their K and V on rank r at its end.
    `degree` is how many ranks computed a chunk of its prompt together, at most.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    kv_tokens: list[int] = field(default_factory=list)
    degree: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token, or None before it."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds for each token after the first, or None for fewer than two tokens."""
        if self.finished_time is None or self.first_token_time is None:
            return None
        if self.num_generation_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (self.num_generation_tokens - 1)


@dataclass(slots=True)
class RequestOutput:
    """The outputs of one prompt; `error` tells why it was refused, if it was.

    `prompt_index` is the prompt's place among those of the call. In a stream, each output has what
    is new, of the completions that have anything new; all of one prompt's add up to the whole.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None
    prompt_index: int = 0

    def add(self, increment: "RequestOutput") -> None:
        """Append the increment of the same prompt that follows in a stream."""
        for new in increment.outputs:
            same = [completion for completion in self.outputs if completion.index == new.index]
            if not same:
                same = [CompletionOutput(new.index, "", [])]
                self.outputs = sorted([*self.outputs, *same], key=lambda known: known.index)
            same[0].add(new)
        self.finished = increment.finished
        self.num_cached_tokens, self.metrics = increment.num_cached_tokens, increment.metrics
