"""The steps that ranks are at, and those that are queued behind them."""

from collections.abc import Iterator, Mapping

from longspan.engine.step import Step
from longspan.plan import RankResult


class UnderWay:
    """For each busy rank the step that it is at, and perhaps the next one."""

    def __init__(self) -> None:
        self._steps: dict[int, list[Step]] = {}

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def ranks(self) -> set[int]:
        return set(self._steps)

    @property
    def last(self) -> list[Step]:
        """The steps behind which none is queued on any rank, so that all could take another one."""
        first = dict.fromkeys(steps[0] for steps in self._steps.values())
        return [step for step in first if all(len(self._steps[rank]) == 1 for rank in step.plans)]

    @property
    def seconds(self) -> dict[int, float]:
        """How long each busy rank is predicted to be at work."""
        return {rank: sum(step.seconds for step in steps) for rank, steps in self._steps.items()}

    def begin(self, step: Step) -> None:
        for rank in step.plans:
            self._steps.setdefault(rank, []).append(step)

    def take(self, results: Mapping[int, RankResult]) -> Iterator[Step]:
        """The steps that are done with these results, each of its rank's first step without one."""
        for rank in sorted(results):
            step = next(step for step in self._steps[rank] if rank not in step.results)
            step.results[rank] = results[rank]
            if len(step.results) == len(step.plans):
                for done in step.plans:
                    self._steps[done].remove(step)
                    if not self._steps[done]:
                        del self._steps[done]
                yield step
