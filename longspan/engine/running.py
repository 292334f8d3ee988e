"""The requests that hold pages, and how they bind ranks together."""

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter

from longspan.engine.claims import Claims
from longspan.engine.ledger import Ledger
from longspan.engine.placement import Placement
from longspan.engine.prefix_cache import Hit, Place
from longspan.engine.request import Request
from longspan.engine.teams import Teams
from longspan.plan import Run

by_order = attrgetter("order")


class Running:
    """Keeps ledger, claims and teams in step with what running requests hold and need."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.requests: dict[Request, None] = {}
        self.prefilling: dict[Request, None] = {}
        """Those whose known tokens are still being computed; the others draw one in each step."""
        self.claims = Claims(ledger)
        self.teams = Teams(ledger.num_ranks)

    def cached(self, request: Request) -> list[Hit]:
        """Where a request's first pages already are; at least one token is left to compute."""
        page_size = self.ledger.page_size
        pages = (request.num_tokens - 1) // page_size
        return self.ledger.cache.find(request.page_hashes(pages, page_size))

    def start(self, request: Request, placement: Placement) -> None:
        """Give a request its ranks and the cached pages that it begins with."""
        request.ranks = self._by_homes(placement.ranks)
        for place in placement.places:
            self.ledger.share(place)
        request.adopt(placement.places, self.ledger.page_size)
        self.requests[request] = None
        self.prefilling[request] = None
        self.teams.add(request)
        self.claims.renew(request)
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = request.clock()
            request.num_cached_tokens = request.num_computed

    def release(self, request: Request) -> None:
        """Take a request and its keys from its ranks."""
        self.teams.remove(request)
        self.claims.drop(request)
        self.prefilling.pop(request, None)
        del self.requests[request]
        for rank, holding in request.holdings.items():
            self.ledger.release(rank, holding.extents)
        request.drop_keys(self.ledger.num_ranks)

    def last(self) -> Request:
        """The one that gives way when there is no page left: youngest of the lowest priority."""
        return max(self.requests, key=by_order)

    def rank_with_room(self, request: Request) -> int:
        """One of the request's ranks that has a free page; the emptiest of all joins if none."""
        free = self.ledger.free
        rank = max(request.ranks, key=lambda rank: free[rank])
        if not free[rank]:
            rank = max(range(len(free)), key=lambda rank: free[rank])
            request.ranks.append(rank)
            self.teams.add(request)
        return rank

    def part(self, request: Request) -> None:
        """Let a request leave the ranks that have none of its keys."""
        self.teams.remove(request)
        request.ranks = list(request.holdings)
        self.teams.add(request)
        self.claims.renew(request)

    def hold(self, request: Request, rank: int, runs: Sequence[Run]) -> None:
        """Give the request the pages that new tokens begin on one rank.

        Its claims are as before; they are to be renewed when all its ranks have been given theirs.
        """
        size = self.ledger.page_size
        begun = [page for run in runs for page in range(-(-run.start // size), -(-run.end // size))]
        if not begun:
            return
        holding = request.holding(rank)
        extents = self.ledger.allocate(rank, len(begun), holding.last_page)
        holding.add_pages(extents)
        taken = (page for extent in extents for page in range(extent.start, extent.end))
        for index, page in zip(begun, taken, strict=True):
            request.places[index] = Place(rank, page)

    def hold_next(self, request: Request, rank: int, position: int) -> None:
        """Give a decoding request the page for its next token, if that begins one."""
        if position % self.ledger.page_size == 0:
            self.hold(request, rank, [Run(position, 1)])
            self.claims.renew(request)

    def _by_homes(self, ranks: list[int]) -> list[int]:
        """The ranks in the order in which they should become its home: fewest homes first."""
        if len(ranks) == 1:
            return ranks
        homes = Counter(
            request.ranks[0] if request in self.prefilling else request.home
            for request in self.requests
        )
        return sorted(ranks, key=homes.__getitem__)
