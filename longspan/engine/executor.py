"""The seam between deciding and computing."""

from collections.abc import Mapping
from typing import Protocol

from longspan.cost.rates import Rates
from longspan.plan import RankPlan, RankResult
from longspan.topology import Topology


class Executor(Protocol):
    """A fleet of ranks that run plans. `num_pages[r]` is the size of rank r's pool.

    `rates` are what a rank's device and links do, `topology` is where the ranks are, and `joins`
    tells whether any of them can compute joint steps. If it `queues`, ranks at work can be given
    one more step, which they begin when they are done.

    Ranks work independently of each other, unless their plans have segments or moves in common:
    those must be started together.
    """

    num_pages: tuple[int, ...]
    rates: Rates
    topology: Topology
    joins: bool
    queues: bool

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        """Begin a step on ranks that are not at work, or queue it.

        Raises:
            RankFailedError: a rank died or raised; the fleet has been stopped.
            EngineStoppedError: the fleet has been stopped before.
        """
        ...

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        """Results of the ranks that are done; waits for the first of those at work.

        Each rank's come one by one, in the order of its steps. Empty if no rank is at work, or none
        is done in `timeout` seconds.

        Raises:
            RankFailedError: a rank died or raised; the fleet has been stopped.
        """
        ...

    def close(self) -> None:
        """End every rank. Safe to call twice."""
        ...
