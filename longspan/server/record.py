"""What is known of one request when it has ended: a line in the log, and the metrics' figures."""

import logging
import time
from dataclasses import dataclass, field

from longspan.outputs import RequestMetrics, RequestOutput
from longspan.server.answers import Usage

logger = logging.getLogger("longspan.request")


@dataclass(slots=True)
class Record:
    """A request from its arrival to its end. Times are in seconds; none of its text is kept.

    `metrics` are the engine's of the first completion of each prompt.
    """

    request_id: str
    endpoint: str
    usage: Usage
    arrived: float
    n: int = 1
    max_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)
    metrics: dict[int, RequestMetrics] = field(default_factory=dict)
    error: str | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None

    def count(self, output: RequestOutput) -> None:
        """Take an increment of one of its prompts."""
        now = time.monotonic()
        if any(one.token_ids for one in output.outputs):
            self.first_token = now if self.first_token is None else self.first_token
            self.last_token = now
        self.usage.count(output)
        if output.metrics is not None:
            self.metrics[output.prompt_index] = output.metrics
        self.finish_reasons += [one.finish_reason for one in output.outputs if one.finish_reason]

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def time_per_output_token(self) -> float | None:
        """Of one completion, when there is one: mean seconds for each token after the first."""
        tokens = self.usage.completion_tokens - 1
        if self.first_token is None or self.last_token is None or tokens < 1 or self.n > 1:
            return None
        return (self.last_token - self.first_token) / tokens

    @property
    def degree(self) -> int:
        return max((one.degree for one in self.metrics.values()), default=0)

    @property
    def num_holders(self) -> int:
        """The most ranks that held keys of one of its prompts at its end."""
        counts = (sum(map(bool, one.kv_tokens)) for one in self.metrics.values())
        return max(counts, default=0)

    @property
    def num_preemptions(self) -> int:
        return sum(one.num_preemptions for one in self.metrics.values())

    @property
    def outcome(self) -> str:
        """How it ended: its finish reasons, "error", or "gone" if its client went away."""
        if self.error is not None:
            return "error"
        return ",".join(sorted(set(self.finish_reasons))) or "gone"

    def end(self) -> None:
        """Note the end, and write the line."""
        self.ended = time.monotonic()
        figures: dict[str, object] = {
            "id": self.request_id,
            "endpoint": self.endpoint,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "output_tokens": self.usage.completion_tokens,
            "degree": self.degree,
            "holders": self.num_holders,
            "preemptions": self.num_preemptions,
            "ttft_ms": _milliseconds(self.time_to_first_token),
            "tpot_ms": _milliseconds(self.time_per_output_token),
            "total_ms": _milliseconds(self.ended - self.arrived),
            "finish": self.outcome,
        }
        line = " ".join(f"{name}={value}" for name, value in figures.items())
        logger.info("request %s", line + (f" error={self.error!r}" if self.error else ""))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"
