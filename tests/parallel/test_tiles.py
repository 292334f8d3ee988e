"""Tiles cover what a query may see: each pair of a query and a visible key once, nothing else."""

from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.engine.shard import zigzag
from longspan.parallel.tiles import Tile, tiles
from longspan.plan import Run, Shard

quick = settings(deadline=None, max_examples=500)

Pairs = Counter[tuple[int, int]]

lengths = st.one_of(st.just(1), st.integers(1, 9))


@st.composite
def ascending_runs(draw: st.DrawFn) -> tuple[Run, ...]:
    """Runs with gaps between them, also gaps of nothing."""
    runs: list[Run] = []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 6), lengths), max_size=5)):
        runs.append(Run((runs[-1].end if runs else 0) + gap, length))
    return tuple(runs)


any_runs = st.lists(st.builds(Run, st.integers(0, 40), lengths), max_size=5).map(tuple)
"""Runs in any order, which may overlap and repeat."""

key_shards = st.builds(Shard, st.just(0), st.just(()), st.integers(0, 9), ascending_runs())
query_shards = st.builds(Shard, st.just(1), any_runs, st.integers(0, 9), ascending_runs())


def positions(runs: tuple[Run, ...]) -> list[int]:
    return [position for run in runs for position in range(run.start, run.end)]


def visible(queries: Shard, keys: Shard) -> Pairs:
    """Cached keys precede every query; of the others a query sees those up to its position."""
    return Counter(
        (row, key)
        for row, position in enumerate(positions(queries.queries))
        for key, key_position in enumerate([-1] * keys.cached + positions(keys.keys))
        if key_position <= position
    )


def pairs(tile: Tile) -> Iterator[tuple[int, int]]:
    rows, keys = (range(part.start, part.stop) for part in (tile.rows, tile.keys))
    for i, row in enumerate(rows):
        for key in keys[: i + 1] if tile.causal else keys:
            yield row, key


def covered(found: list[Tile]) -> Pairs:
    return Counter(pair for tile in found for pair in pairs(tile))


@given(query_shards, key_shards)
@quick
def test_tiles_cover_each_visible_pair_once_and_nothing_else(queries: Shard, keys: Shard) -> None:
    assert covered(tiles(queries, keys)) == visible(queries, keys)


@given(query_shards, key_shards)
@quick
def test_every_tile_is_a_full_rectangle_or_a_causal_square(queries: Shard, keys: Shard) -> None:
    for rows, seen, causal in tiles(queries, keys):
        assert 0 <= rows.start < rows.stop <= queries.num_queries
        assert 0 <= seen.start < seen.stop <= keys.num_keys
        assert rows.step is seen.step is None
        if causal:
            assert rows.stop - rows.start == seen.stop - seen.start > 1


@given(query_shards, key_shards)
@quick
def test_tiles_are_few(queries: Shard, keys: Shard) -> None:
    """Per run of queries one for the cache, and per pair of runs one before, on and below."""
    found = tiles(queries, keys)
    assert len(found) <= len(queries.queries) * (1 + 3 * len(keys.keys))


@given(query_shards, st.integers(0, 9), st.integers(0, 9))
@quick
def test_a_cache_is_one_tile_for_all_queries(queries: Shard, cached: int, after: int) -> None:
    future = Run(max((run.end for run in queries.queries), default=0) + after, 3)
    found = tiles(queries, Shard(0, (), cached, (future,)))
    every = slice(0, queries.num_queries)
    whole = [Tile(every, slice(0, cached), False)] if cached and queries.queries else []
    assert found == whole


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 9))
@quick
def test_the_ranks_of_a_zigzag_together_cover_the_causal_triangle(
    shares: list[int], cached: int
) -> None:
    shards = [Shard(r, tuple(runs), cached, tuple(runs)) for r, runs in enumerate(zigzag(shares))]
    total = sum(shares)
    count = sum(
        sum(covered(tiles(queries, keys)).values()) for queries in shards for keys in shards
    )
    assert count == total * (total + 1) // 2 + total * cached * len(shards)


def test_one_token_over_its_cache_and_itself_is_one_rectangle() -> None:
    shard = Shard(0, (Run(100, 1),), 100, (Run(100, 1),))
    assert tiles(shard, shard) == [Tile(slice(0, 1), slice(0, 101), False)]


def test_a_chunk_over_its_cache_and_itself_is_a_rectangle_and_a_square() -> None:
    shard = Shard(0, (Run(100, 8),), 100, (Run(100, 8),))
    assert tiles(shard, shard) == [
        Tile(slice(0, 8), slice(0, 100), False),
        Tile(slice(0, 8), slice(100, 108), True),
    ]


def test_keys_after_every_query_are_not_looked_at() -> None:
    assert tiles(Shard(0, (Run(0, 8),), 0, ()), Shard(1, (), 0, (Run(8, 8), Run(40, 1)))) == []
