"""Which queries see which keys, as a few rectangles and squares that need no mask."""

from collections.abc import Iterator
from itertools import accumulate

from longspan.attention.work import Tile
from longspan.plan import Run, Shard


def tiles(queries: Shard, keys: Shard) -> list[Tile]:
    """Cover exactly the pairs of a query and a key that it may see (key position <= its own).

    Cached keys precede all queries, so they need no mask. A run of queries sees a prefix of a
    shard whole, since keys ascend; what all later runs see too is one rectangle with them, so that
    keys are read once for as many queries as can be. Only where a run of keys overlaps the run of
    queries is there a triangle, and that is a causal square plus, below it, a full rectangle.
    """
    runs = queries.queries
    before = [_num_before(run, keys) for run in runs]
    common = list(accumulate(reversed(before), min))[::-1]
    found: list[Tile] = []
    row, shared, end = 0, 0, queries.num_queries
    for run, prefix, least in zip(runs, before, common, strict=True):
        every = slice(row, row + run.length)
        for tile in (
            Tile(slice(row, end), slice(shared, least), False),
            Tile(every, slice(least, prefix), False),
            *_overlap(run, row, keys),
        ):
            last = found[-1] if found else None
            if last and _continues(last, tile):
                found[-1] = Tile(last.rows, slice(last.keys.start, tile.keys.stop), False)
            elif tile.keys.start < tile.keys.stop:
                found.append(tile)
        row, shared = every.stop, least
    return found


def _num_before(run: Run, keys: Shard) -> int:
    """How many keys of a shard precede the whole run."""
    return keys.cached + sum(max(min(other.end, run.start) - other.start, 0) for other in keys.keys)


def _overlap(run: Run, row: int, keys: Shard) -> Iterator[Tile]:
    """Tiles of a run, whose first query is at `row`, over keys between its own positions."""
    offset = keys.cached
    for other in keys.keys:
        low, high = max(other.start, run.start), min(other.end, run.end)
        if low < high:
            square = slice(offset + low - other.start, offset + high - other.start)
            rows = slice(row + low - run.start, row + high - run.start)
            yield Tile(rows, square, high - low > 1)
            if high < run.end:
                yield Tile(slice(rows.stop, row + run.length), square, False)
        offset += other.length


def _continues(last: Tile, tile: Tile) -> bool:
    return (
        last.rows == tile.rows
        and not (last.causal or tile.causal)
        and last.keys.stop == tile.keys.start
    )
