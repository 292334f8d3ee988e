"""How the new tokens of one request are cut over ranks. Pure functions; no padding anywhere."""

from collections.abc import Sequence

from longspan.plan import Run


def fair_shares(total: int, capacities: Sequence[int]) -> list[int]:
    """Share `total` pages over ranks as evenly as their capacities allow.

    Shares differ by at most one page among the ranks whose capacity does not bind; earlier ranks
    get the odd pages. `total` must not exceed the sum of the capacities.
    """
    assert 0 <= total <= sum(capacities), (total, capacities)
    shares = [0] * len(capacities)
    open_ranks = [rank for rank, capacity in enumerate(capacities) if capacity > 0]
    while total:
        each = max(total // len(open_ranks), 1)
        for rank in open_ranks:
            more = min(each, capacities[rank] - shares[rank], total)
            shares[rank] += more
            total -= more
        open_ranks = [rank for rank in open_ranks if shares[rank] < capacities[rank]]
    return shares


def zigzag(shares: Sequence[int]) -> list[list[Run]]:
    """Cut `sum(shares)` consecutive pages so that rank r gets `shares[r]` of them.

    Each rank gets a piece from the front half, in rank order, and one from the back half, in
    reverse order: a rank whose first queries see few keys also has some that see many, so causal
    work is balanced (arXiv 2411.01783, section 3.5.1). Returns each rank's runs of pages,
    ascending, adjacent pieces joined, empty ones left out.
    """
    fronts = [(share + 1) // 2 for share in shares]
    pieces = [(rank, front) for rank, front in enumerate(fronts)]
    pieces += [(rank, shares[rank] - fronts[rank]) for rank in reversed(range(len(shares)))]
    runs: list[list[Run]] = [[] for _ in shares]
    start = 0
    for rank, length in pieces:
        if length and runs[rank] and runs[rank][-1].end == start:
            runs[rank][-1] = Run(runs[rank][-1].start, runs[rank][-1].length + length)
        elif length:
            runs[rank].append(Run(start, length))
        start += length
    return runs
