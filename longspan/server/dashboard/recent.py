"""The times of requests that have ended lately."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from longspan.server.record import Record

SECONDS = 300.0
"""For so long they are kept,"""

_MOST = 2_000
"""and no more than so many."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended: when, by `time.monotonic()`, and what its client has seen.

    Seconds; None where it has not come so far, or has several completions.
    """

    number: int
    at: float
    time_to_first_token: float | None
    time_per_output_token: float | None


class Recent:
    """Requests of the last minutes, numbered as they end."""

    def __init__(self) -> None:
        self._ended: deque[Ended] = deque(maxlen=_MOST)
        self.count = 0

    def add(self, record: Record) -> None:
        """Take a request whose end is known."""
        assert record.ended is not None
        times = record.time_to_first_token, record.time_per_output_token
        self._ended.append(Ended(self.count, record.ended, *times))
        self.count += 1
        while self._ended[0].at < record.ended - SECONDS:
            self._ended.popleft()

    def since(self, number: int) -> Iterator[Ended]:
        """Those with such a number or a higher one, as far as they are kept; newest first."""
        for ended in reversed(self._ended):
            if ended.number < number:
                return
            yield ended
