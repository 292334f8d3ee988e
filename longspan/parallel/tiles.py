"""Which queries see which keys, as a few rectangles and squares that need no mask."""

from typing import NamedTuple

from longspan.plan import Run, Shard


class Tile(NamedTuple):
    """Queries `rows` of one shard over keys `keys` of another: all, or a causal square."""

    rows: slice
    keys: slice
    causal: bool


def tiles(queries: Shard, keys: Shard) -> list[Tile]:
    """Cover exactly the pairs of a query and a key that it may see (key position <= its own).

    Cached keys precede all queries, so they need no mask. A run of queries sees a prefix of a
    shard whole, since keys ascend; only where a run of keys overlaps the run of queries is there
    a triangle, and that is a causal square plus, below it, a full rectangle.
    """
    found: list[Tile] = []
    row = 0
    for run in queries.queries:
        for tile in _tiles_of_run(run, row, keys):
            last = found[-1] if found else None
            if last and _continues(last, tile):
                found[-1] = Tile(last.rows, slice(last.keys.start, tile.keys.stop), False)
            else:
                found.append(tile)
        row += run.length
    return found


def _tiles_of_run(run: Run, row: int, keys: Shard) -> list[Tile]:
    every = slice(row, row + run.length)
    found = [Tile(every, slice(0, keys.cached), False)] if keys.cached else []
    offset = keys.cached
    for key_run in keys.keys:
        before = min(key_run.end, run.start) - key_run.start
        if before > 0:
            found.append(Tile(every, slice(offset, offset + before), False))
        low, high = max(key_run.start, run.start), min(key_run.end, run.end)
        if low < high:
            square = slice(offset + low - key_run.start, offset + high - key_run.start)
            rows = slice(row + low - run.start, row + high - run.start)
            found.append(Tile(rows, square, high - low > 1))
            if high < run.end:
                found.append(Tile(slice(rows.stop, every.stop), square, False))
        offset += key_run.length
    return found


def _continues(last: Tile, tile: Tile) -> bool:
    return (
        last.rows == tile.rows
        and not (last.causal or tile.causal)
        and last.keys.stop == tile.keys.start
    )
