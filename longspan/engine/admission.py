"""Where waiting requests go, one after the other, in one round of scheduling."""

from collections.abc import Sequence

from longspan.engine.ledger import Ledger
from longspan.engine.placement import Fleet, Placement, Placer
from longspan.engine.prefix_cache import Hit
from longspan.engine.request import Request
from longspan.engine.shard import fair_shares


class Admission:
    """The ranks as they will be once the requests placed so far have begun.

    Prompts that wait together share the ranks by their lengths: one has no more of them than its
    part of `waiting_tokens`, unless it needs their pages.
    """

    def __init__(
        self,
        placer: Placer,
        ledger: Ledger,
        free: Sequence[int],
        delays: Sequence[float],
        waiting_tokens: int,
    ) -> None:
        self._placer = placer
        self._ledger = ledger
        self._free = list(free)
        self._delays = list(delays)
        self._waiting_tokens = waiting_tokens

    def place(self, request: Request, hits: Sequence[Hit]) -> Placement | None:
        """Ranks for a request, whose pages and time are theirs from now on.

        None if the pages that nobody claims are fewer than it is expected to need.
        """
        ledger = self._ledger
        fleet = Fleet(self._free, self._delays, ledger.is_idle)
        tokens = request.num_tokens
        most = fair_degree(len(self._free), tokens, self._waiting_tokens)
        placement = self._placer.place(tokens, hits, fleet, most)
        if placement is None:
            return None
        pages = ledger.pages_of(request.expected_tokens) - fleet.num_owned(placement.places)
        if pages > sum(self._free):
            return None
        self._claim(placement.ranks, pages)
        for rank in placement.ranks:
            self._delays[rank] = placement.seconds
        return placement

    def _claim(self, ranks: Sequence[int], pages: int) -> None:
        """Take so many pages: from these ranks first, then from all."""
        for preferred in (ranks, range(len(self._free))):
            room = [self._free[rank] for rank in preferred]
            shares = fair_shares(min(max(pages, 0), sum(room)), room)
            for rank, share in zip(preferred, shares, strict=True):
                self._free[rank] -= share
            pages -= sum(shares)


def fair_degree(num_ranks: int, tokens: int, waiting_tokens: int) -> int:
    """A prompt's part of all ranks: that which its tokens are of all that wait."""
    return max(round(num_ranks * tokens / max(waiting_tokens, tokens)), 1)
