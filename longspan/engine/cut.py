"""Which new tokens of a request each of its ranks computes in a step. A pure function."""

from collections.abc import Mapping, Sequence

from longspan.engine.request import Request
from longspan.engine.shard import fair_shares, zigzag
from longspan.plan import Run


def cut(
    request: Request, free_pages: Sequence[int], budgets: Mapping[int, int], page_size: int
) -> dict[int, list[Run]]:
    """Cut a request's next tokens over its ranks: as many as pages and each rank's tokens allow.

    A page's tokens stay together, so the rest of a page that has been begun goes to its rank;
    the pages after it go zigzag over the request's ranks that have room. Returns each rank's runs
    of positions, ascending; empty if nothing can be computed now.
    """
    runs: dict[int, list[Run]] = {}
    budgets = dict(budgets)
    start, end = request.num_computed, request.num_tokens
    if start % page_size:
        assert request.home is not None
        length = min(page_size - start % page_size, end - start, budgets[request.home])
        if length:
            runs[request.home] = [Run(start, length)]
            budgets[request.home] -= length
            start += length
        if start % page_size:
            return runs
    if start < end:
        for rank, run in _cut_pages(request, start, free_pages, budgets, page_size):
            _extend(runs.setdefault(rank, []), run)
    return runs


def _cut_pages(
    request: Request,
    start: int,
    free_pages: Sequence[int],
    budgets: Mapping[int, int],
    page_size: int,
) -> list[tuple[int, Run]]:
    """Whole pages, and the rest that is less than one if it ends the request's tokens.

    The ranks with fewest of its keys come first, but for the last chunk: zigzag gives the first
    rank the last page, and with it the decode tokens that follow.
    """
    end = request.num_tokens
    pages = -(-(end - start) // page_size)
    room = {rank: min(free_pages[rank], budgets[rank] // page_size) for rank in request.ranks}
    ranks = sorted((r for r in request.ranks if free_pages[r]), key=request.num_keys)
    home = request.ranks[0]
    if room[home] and sum(room.values()) >= pages:
        others = [rank for rank in ranks if room[rank] and rank != home]
        # Where there is no more than a page for each, the last page is that of the last rank.
        ranks = [home, *others] if pages > len(others) + 1 else [*others[: pages - 1], home]
    capacities = [room[rank] for rank in ranks]
    if pages > 1 and any(capacities):
        shares = fair_shares(min(pages, sum(capacities)), capacities)
        runs = []
        for rank, page_runs in zip(ranks, zigzag(shares), strict=True):
            for run in page_runs:
                first, last = (start + page * page_size for page in (run.start, run.end))
                runs.append((rank, Run(first, min(last, end) - first)))
        return runs
    for rank in ranks:
        if budgets[rank]:
            return [(rank, Run(start, min(end - start, page_size, budgets[rank])))]
    return []


def _extend(runs: list[Run], run: Run) -> None:
    if runs and runs[-1].end == run.start:
        runs[-1] = Run(runs[-1].start, runs[-1].length + run.length)
    else:
        runs.append(run)
