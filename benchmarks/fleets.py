"""Fleets for benchmarks: ranks on this host, or over hosts that are joined by shaped links."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "hosts"))

from netns import Hosts, unavailable
from ranks import Ranks

__all__ = ["Ranks", "fleet", "unavailable"]


@contextmanager
def fleet(sizes: Sequence[int], gbit: float | None) -> Iterator[Ranks]:
    """`sizes[h]` ranks on host h, whose link carries so many Gbit/s; None is for one host."""
    if gbit is None:
        with Ranks(sizes) as ranks:
            yield ranks
    else:
        with Hosts(len(sizes), gbit) as hosts, Ranks(sizes, hosts) as ranks:
            yield ranks
