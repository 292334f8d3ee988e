"""Free pages that running requests are expected to need before they end."""

from longspan.engine.ledger import Ledger
from longspan.engine.request import Request
from longspan.engine.shard import fair_shares


class Claims:
    """How many pages each running request will still take, and on which ranks.

    A claim reserves nothing: it only keeps others from being admitted to pages that will be
    missing soon. It is told anew whenever its request takes a page.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._claimed = [0] * ledger.num_ranks
        self._claims: dict[Request, list[tuple[int, int]]] = {}

    def renew(self, request: Request) -> None:
        """Claim what a running request is expected to need from now on."""
        self.drop(request)
        pages = self._ledger.pages_of(request.expected_tokens) - len(request.places)
        ranks = request.ranks if request.num_pending > 1 or request.home is None else [request.home]
        each, odd = divmod(max(pages, 0), len(ranks))
        claims = [(rank, each + (place < odd)) for place, rank in enumerate(ranks)]
        for rank, share in claims:
            self._claimed[rank] += share
        self._claims[request] = claims

    def drop(self, request: Request) -> None:
        for rank, share in self._claims.pop(request, ()):
            self._claimed[rank] -= share

    def unclaimed(self) -> list[int]:
        """Each rank's free pages that nobody claims; what one rank lacks the others give."""
        left = [
            free - claimed for free, claimed in zip(self._ledger.free, self._claimed, strict=True)
        ]
        lack = -sum(pages for pages in left if pages < 0)
        room = [max(pages, 0) for pages in left]
        if lack:
            given = fair_shares(min(lack, sum(room)), room)
            room = [pages - share for pages, share in zip(room, given, strict=True)]
        return room
