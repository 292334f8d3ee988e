"""Which queries see which keys, and where those keys lie: what a kernel is given to do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

MIN_VIEW_KEYS = 256
"""Ranges shorter than this on average are copied together: a call for each would cost more."""


class Tile(NamedTuple):
    """Queries `rows` of one shard over keys `keys` of another: all, or a causal square."""

    rows: slice
    keys: slice
    causal: bool


class Share(NamedTuple):
    """Some queries over one shard's keys.

    `tiles` count queries from `row` and keys in the shard's order; the shard's keys lie at
    `ranges`, one after the other.
    """

    row: int
    tiles: Sequence[Tile]
    ranges: Sequence[slice]

    def placed(self) -> Iterator[Tile]:
        """The same tiles with rows and keys as they lie; a causal square is cut where keys are.

        Of the keys `a .. b - 1` of a square, queries a to b - 1 see a smaller causal square, and
        all later ones the whole.
        """
        for rows, keys, causal in self.tiles:
            first, last = rows.start + self.row, rows.stop + self.row
            start, stop = keys.start, keys.stop
            for piece in self.ranges:
                length = piece.stop - piece.start
                low, high = max(start, 0), min(stop, length)
                if low < high:
                    where = slice(piece.start + low, piece.start + high)
                    if causal:
                        top, bottom = first + low - start, first + high - start
                        yield Tile(slice(top, bottom), where, high - low > 1)
                        if bottom < last:
                            yield Tile(slice(bottom, last), where, False)
                    else:
                        yield Tile(slice(first, last), where, False)
                start, stop = start - length, stop - length


MIN_SHARED_KEYS = 16
"""Fewer are read again for each query sooner than they are brought into one place for all."""

Item = tuple[int, int, int, int, int]
"""First row, rows, first key, keys, whether causal."""


@dataclass(frozen=True)
class Work:
    """Shares that one call of a kernel computes; the same in every layer of a step."""

    shares: Sequence[Share]

    @cached_property
    def tables(self) -> list[Tensor]:
        """The placed tiles as tables of items, int64 [N, 5], to be merged one after the other.

        Where requests decode side by side that begin with the same pages, the first table has
        those once for all of them (as in arXiv 2402.05099): keys are read once, not once each.
        """
        items = [
            (r.start, r.stop - r.start, k.start, k.stop - k.start, int(causal))
            for share in self.shares
            for r, k, causal in share.placed()
        ]
        shared = list(_shared(items))
        rest = set(_single(shared))
        own = [item for item in items if item not in rest]
        return [torch.tensor(table, dtype=torch.int64) for table in (shared, own) if table]


def _shared(items: Sequence[Item]) -> Iterator[Item]:
    """Runs of neighbouring rows that see the same keys, each as one item."""
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, rows, key, keys, _ in items:
        if rows == 1 and keys >= MIN_SHARED_KEYS:
            rows_of.setdefault((key, keys), []).append(row)
    for (key, keys), seeing in rows_of.items():
        first = last = seeing[0]
        for row in (*seeing[1:], -1):
            if row != last + 1:
                if last > first:
                    yield first, last - first + 1, key, keys, 0
                first = row
            last = row


def _single(shared: Sequence[Item]) -> Iterator[Item]:
    """The items that shared ones stand for."""
    for first, rows, key, keys, _ in shared:
        for row in range(first, first + rows):
            yield row, 1, key, keys, 0
