"""The seam between deciding and computing."""

from collections.abc import Mapping
from typing import Protocol

from longspan.plan import RankPlan, RankResult


class Executor(Protocol):
    """A fleet of ranks that runs plans. `num_pages[r]` is the size of rank r's pool."""

    num_pages: tuple[int, ...]

    def execute(self, plans: Mapping[int, RankPlan]) -> dict[int, RankResult]:
        """Run one step on the ranks that have a plan, all at once.

        Raises:
            RankFailedError: a rank died or raised; the fleet has been stopped.
        """
        ...

    def close(self) -> None:
        """End every rank. Safe to call twice."""
        ...
