"""Who owns which page on which rank. The only place where pages are taken and given back."""

from bisect import bisect_left
from collections.abc import Sequence

from longspan.engine.prefix_cache import Place, PrefixCache
from longspan.plan import Extent


class Ledger:
    """Every rank's pages: free ones as extents, owned ones with their number of owners.

    Free pages are handed out in long extents where there are any, so that a request's keys on a
    rank can be read as a few large blocks without a copy. A full page that the prefix cache knows
    stays in the pool without an owner until its room is needed; the page that has been idle for
    longest goes first. Idle pages count as free.
    """

    def __init__(self, num_pages: Sequence[int], page_size: int) -> None:
        self.num_pages = tuple(num_pages)
        self.page_size = page_size
        self.cache = PrefixCache()
        self._free = [[Extent(0, pages)] if pages else [] for pages in num_pages]
        self.free = list(num_pages)
        """How many pages each rank can give: those without an owner, idle ones included."""
        self._owners = [[0] * pages for pages in num_pages]
        self._idle: list[dict[int, None]] = [{} for _ in num_pages]

    @property
    def num_ranks(self) -> int:
        return len(self.num_pages)

    @property
    def num_tokens(self) -> int:
        """How many tokens' keys all ranks together can hold."""
        return sum(self.num_pages) * self.page_size

    def num_used(self, rank: int) -> int:
        return self.num_pages[rank] - self.free[rank]

    def num_idle(self, rank: int) -> int:
        """How many of a rank's free pages hold keys that the cache knows."""
        return len(self._idle[rank])

    def is_idle(self, place: Place) -> bool:
        """Whether a page in the cache has no owner."""
        return place.page in self._idle[place.rank]

    def num_owners(self, place: Place) -> int:
        return self._owners[place.rank][place.page]

    def pages_of(self, tokens: int) -> int:
        """How many pages so many consecutive tokens take."""
        return -(-tokens // self.page_size)

    def allocate(self, rank: int, pages: int, after: int | None = None) -> list[Extent]:
        """Take pages of one rank: first those that follow page `after`, the owner's last one.

        A request that can't go on there starts in the middle of the longest free extent, so that
        requests that decode side by side don't grow into each other.
        """
        assert 0 < pages <= self.free[rank], (rank, pages, self.free[rank])
        self._evict(rank, pages - (self.free[rank] - len(self._idle[rank])))
        self.free[rank] -= pages
        taken = []
        if after is not None and (next_to := self._starting_at(rank, after + 1)):
            taken.append(Extent(next_to.start, min(next_to.length, pages)))
            self._remove(rank, next_to, taken[0])
            pages -= taken[0].length
        if pages:
            taken += self._take(rank, pages, growing=after is not None)
        for extent in taken:
            self._owners[rank][extent.start : extent.end] = [1] * extent.length
        return taken

    def share(self, place: Place) -> None:
        """Give a page of the cache one more owner."""
        if place.page in self._idle[place.rank]:
            del self._idle[place.rank][place.page]
            self.free[place.rank] -= 1
        self._owners[place.rank][place.page] += 1

    def release(self, rank: int, extents: Sequence[Extent]) -> None:
        """Take one owner from pages of one rank; without an owner they are idle or free."""
        owners = self._owners[rank]
        # The last pages of a request become idle, and so are evicted, before its first.
        for extent in reversed(extents):
            assert extent.end <= len(owners), (rank, extent, len(owners))
            for page in reversed(range(extent.start, extent.end)):
                assert owners[page] > 0, f"page {page} of rank {rank} freed twice"
                owners[page] -= 1
                if owners[page]:
                    continue
                self.free[rank] += 1
                if Place(rank, page) in self.cache:
                    self._idle[rank][page] = None
                else:
                    self._insert(rank, Extent(page, 1))

    def _evict(self, rank: int, pages: int) -> None:
        for _ in range(pages):
            page = next(iter(self._idle[rank]))
            del self._idle[rank][page]
            self.cache.forget(Place(rank, page))
            self._insert(rank, Extent(page, 1))

    def _take(self, rank: int, pages: int, growing: bool) -> list[Extent]:
        """So many pages from one extent that has them, else from the longest ones."""
        free = self._free[rank]
        if growing:
            longest = max(free, key=lambda extent: extent.length)
            if longest.length >= pages:
                start = longest.start + (longest.length - pages) // 2
                part = Extent(start, pages)
                self._remove(rank, longest, part)
                return [part]
        fitting = next((extent for extent in free if extent.length >= pages), None)
        chosen = [fitting] if fitting else sorted(free, key=lambda extent: -extent.length)
        taken: list[Extent] = []
        for extent in chosen:
            part = Extent(extent.start, min(extent.length, pages))
            self._remove(rank, extent, part)
            taken.append(part)
            pages -= part.length
            if not pages:
                break
        return taken

    def _starting_at(self, rank: int, page: int) -> Extent | None:
        free = self._free[rank]
        at = bisect_left(free, page, key=lambda extent: extent.start)
        return free[at] if at < len(free) and free[at].start == page else None

    def _remove(self, rank: int, extent: Extent, part: Extent) -> None:
        free = self._free[rank]
        at = bisect_left(free, extent.start, key=lambda extent: extent.start)
        before = Extent(extent.start, part.start - extent.start)
        behind = Extent(part.end, extent.end - part.end)
        free[at : at + 1] = [rest for rest in (before, behind) if rest.length]

    def _insert(self, rank: int, extent: Extent) -> None:
        free = self._free[rank]
        at = bisect_left(free, extent.start, key=lambda extent: extent.start)
        start, end = extent.start, extent.end
        low, high = at, at
        if at and free[at - 1].end == start:
            low, start = at - 1, free[at - 1].start
        if at < len(free) and free[at].start == end:
            high, end = at + 1, free[at].end
        free[low:high] = [Extent(start, end - start)]
