"""Where a request's computation and keys go: pure functions of what is free."""

from collections.abc import Collection, Sequence

from longspan.engine.request import Request
from longspan.engine.shard import fair_shares, zigzag
from longspan.plan import Run


def choose_ranks(
    tokens: int,
    free_pages: Sequence[int],
    page_size: int,
    min_tokens_per_rank: int,
    holders: Collection[int] = (),
) -> list[int]:
    """The ranks over which a request's tokens are spread: holders first, then the emptiest.

    One rank for each `min_tokens_per_rank` tokens, so that a short request stays on one and talks
    to nobody; more if those have not pages enough together. `holders` have keys of it already.
    """
    ranks = range(len(free_pages))
    preferred = sorted(ranks, key=lambda rank: (rank not in holders, -free_pages[rank], rank))
    degree = min(max(tokens // min_tokens_per_rank, 1), len(preferred))
    pages = -(-tokens // page_size)
    while degree < len(preferred) and sum(free_pages[r] for r in preferred[:degree]) < pages:
        degree += 1
    return preferred[:degree]


def cut(
    request: Request, free_pages: Sequence[int], budgets: Sequence[int], page_size: int
) -> dict[int, list[Run]]:
    """Cut a request's next tokens over ranks: as many as free pages and budgets (tokens) allow.

    A page's tokens stay together, so the rest of a page that has been begun goes to its rank;
    the pages after it go zigzag over the request's ranks. When those are full the request spreads
    to others: that is how a context outgrows its device. Returns each rank's runs of positions,
    ascending; empty if nothing can be computed now.
    """
    runs: dict[int, list[Run]] = {}
    budgets = list(budgets)
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
    budgets: Sequence[int],
    page_size: int,
) -> list[tuple[int, Run]]:
    ranks, end = _open_ranks(request, free_pages), request.num_tokens
    pages = -(-(end - start) // page_size)
    capacities = [min(free_pages[rank], budgets[rank] // page_size) for rank in ranks]
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


def _open_ranks(request: Request, free_pages: Sequence[int]) -> list[int]:
    """The ranks that may take the request's next pages, the preferred one first.

    While decoding that is the home, else the request's own ranks, those with fewest of its keys
    first. Only when those have no page left come all others, the emptiest first: a request waits
    for its ranks' budget rather than to spread without need.
    """
    if request.num_pending == 1 and request.home is not None and free_pages[request.home]:
        return [request.home]
    own = sorted(request.ranks, key=request.num_keys)
    everyone = sorted(range(len(free_pages)), key=lambda rank: (-free_pages[rank], rank))
    return [r for r in own if free_pages[r]] or [r for r in everyone if free_pages[r]]


def _extend(runs: list[Run], run: Run) -> None:
    if runs and runs[-1].end == run.start:
        runs[-1] = Run(runs[-1].start, runs[-1].length + run.length)
    else:
        runs.append(run)
