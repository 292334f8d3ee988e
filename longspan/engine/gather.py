"""Pages of a request that lie on other ranks move to its home, so that it decodes there alone."""

from collections.abc import Sequence

from longspan.cost.model import CostModel
from longspan.engine.ledger import Ledger
from longspan.engine.prefix_cache import Place
from longspan.engine.request import Request, joined
from longspan.engine.step import Gathering
from longspan.plan import Extent

STEP_PART = 0.5
"""Pages travel beside a step's own messages: no more at once than take this part of its time."""


class Gatherer:
    """Decides when gathering pays, moves a few pages with each step, and keeps the books.

    A moved page is read where it was until its step is done, and where it is from then on. The
    request waits for nothing.
    """

    def __init__(self, cost: CostModel, ledger: Ledger) -> None:
        self.cost = cost
        self.ledger = ledger

    def begin(self, request: Request, room: int) -> None:
        """Let a decoding request's pages be gathered if its home has room and it will pay.

        It pays if what local attention saves over as many tokens as are expected to follow is
        more than the time that the pages take to travel.
        """
        assert request.home is not None
        size = self.ledger.page_size
        away = [rank for rank in request.holdings if rank != request.home]
        pages = sum(request.holdings[rank].tokens for rank in away) // size
        keys = [holding.tokens for holding in request.holdings.values()]
        saved = self.cost.decode_seconds(keys) - self.cost.decode_seconds([sum(keys)])
        following = request.expected_tokens - request.num_tokens
        if pages > room or saved * following <= self.cost.move_seconds(pages * size):
            return
        index_at = {place: index for index, place in request.places.items()}
        request.to_gather = [
            index_at[Place(rank, page)]
            for rank in away
            for extent in request.holdings[rank].extents
            for page in range(extent.start, extent.end)
        ]

    def next_pages(self, request: Request) -> Gathering | None:
        """Take room at home for the next few pages; None if there is none left."""
        home, size = request.home, self.ledger.page_size
        assert home is not None
        step = self.cost.decode_seconds([holding.tokens for holding in request.holdings.values()])
        count = max(int(STEP_PART * step / self.cost.move_seconds(size)), 1)
        count = min(count, len(request.to_gather), self.ledger.free[home])
        if not count:
            request.to_gather = []
            return None
        extents = self.ledger.allocate(home, count)
        places = [Place(home, page) for e in extents for page in range(e.start, e.end)]
        indices = request.to_gather[-count:]
        del request.to_gather[-count:]
        return Gathering(request, indices, places)

    def settle(self, gathering: Gathering) -> None:
        """The pages have arrived: give back those that they came from."""
        request, size = gathering.request, self.ledger.page_size
        home = request.holdings[gathering.places[0].rank]
        for index, place in reversed(list(zip(gathering.indices, gathering.places, strict=True))):
            old = request.places[index]
            request.places[index] = place
            holding = request.holdings[old.rank]
            holding.extents = _without_last(holding.extents, old.page)
            holding.tokens -= size
            if not holding.tokens:
                del request.holdings[old.rank]
            self._replace(old, place)
        # Before its other pages: the last one stays last, where the next tokens go.
        pages = [Extent(place.page, 1) for place in gathering.places]
        home.extents = joined((*joined(pages), *home.extents))
        home.tokens += size * len(pages)

    def _replace(self, old: Place, new: Place) -> None:
        cache = self.ledger.cache
        page_hash = None
        if old in cache and self.ledger.num_owners(old) == 1:
            page_hash = cache.forget(old)
        self.ledger.release(old.rank, [Extent(old.page, 1)])
        if page_hash is not None:
            cache.add(page_hash, new)


def _without_last(extents: Sequence[Extent], page: int) -> tuple[Extent, ...]:
    *others, last = extents
    assert last.end - 1 == page, (last, page)
    return (*others, Extent(last.start, last.length - 1)) if last.length > 1 else tuple(others)
