"""Who owns which page on which rank. The only place where pages are taken and given back."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from longspan.plan import Extent


class Ledger:
    """The free pages of every rank, as extents.

    Pages are handed out in long extents where there are any, so that a request's keys on a rank
    can be read as a few large blocks without a copy.
    """

    def __init__(self, num_pages: Sequence[int], page_size: int) -> None:
        self.num_pages = tuple(num_pages)
        self.page_size = page_size
        self._free = [[Extent(0, pages)] if pages else [] for pages in num_pages]
        self._num_free = list(num_pages)

    @property
    def num_ranks(self) -> int:
        return len(self.num_pages)

    @property
    def num_tokens(self) -> int:
        """How many tokens' keys all ranks together can hold."""
        return sum(self.num_pages) * self.page_size

    def num_free(self, rank: int) -> int:
        return self._num_free[rank]

    def num_used(self, rank: int) -> int:
        return self.num_pages[rank] - self._num_free[rank]

    def pages_of(self, tokens: int) -> int:
        """How many pages so many consecutive tokens take."""
        return -(-tokens // self.page_size)

    def allocate(self, rank: int, pages: int, after: int | None = None) -> list[Extent]:
        """Take pages of one rank: those that follow page `after` first, else from long extents."""
        assert 0 < pages <= self._num_free[rank], (rank, pages, self._num_free[rank])
        self._num_free[rank] -= pages
        taken: list[Extent] = []
        while pages:
            extent = self._pick(rank, pages, after)
            part = Extent(extent.start, min(extent.length, pages))
            self._remove(rank, extent, part)
            taken.append(part)
            pages -= part.length
            after = part.end - 1
        return taken

    def release(self, rank: int, extents: Iterable[Extent]) -> None:
        """Give pages of one rank back."""
        for extent in extents:
            self._insert(rank, extent)
            self._num_free[rank] += extent.length
        assert self._num_free[rank] <= self.num_pages[rank], (rank, self._num_free[rank])

    def _pick(self, rank: int, pages: int, after: int | None) -> Extent:
        free = self._free[rank]
        if after is not None:
            at = bisect_left(free, after + 1, key=lambda extent: extent.start)
            if at < len(free) and free[at].start == after + 1:
                return free[at]
        for extent in free:
            if extent.length >= pages:
                return extent
        return max(free, key=lambda extent: extent.length)

    def _remove(self, rank: int, extent: Extent, part: Extent) -> None:
        free = self._free[rank]
        at = bisect_left(free, extent.start, key=lambda extent: extent.start)
        rest = extent.length - part.length
        free[at : at + 1] = [Extent(part.end, rest)] if rest else []

    def _insert(self, rank: int, extent: Extent) -> None:
        free = self._free[rank]
        at = bisect_left(free, extent.start, key=lambda extent: extent.start)
        start, end = extent.start, extent.end
        assert at == 0 or free[at - 1].end <= start, f"page {start} of rank {rank} freed twice"
        assert at == len(free) or end <= free[at].start, f"page {end} of rank {rank} freed twice"
        low, high = at, at
        if at and free[at - 1].end == start:
            low, start = at - 1, free[at - 1].start
        if at < len(free) and free[at].start == end:
            high, end = at + 1, free[at].end
        free[low:high] = [Extent(start, end - start)]
