"""Which ranks step together: those that have a request in common, and no others."""

from collections.abc import Set
from dataclasses import dataclass, field

from longspan.engine.request import Request


@dataclass(slots=True, eq=False)
class Team:
    """Ranks that step together, and the running requests on them."""

    ranks: set[int]
    requests: dict[Request, None] = field(default_factory=dict)


class Teams:
    """Every rank is in one team, alone unless a request lies on it and on another."""

    def __init__(self, num_ranks: int) -> None:
        self._team_of = [Team({rank}) for rank in range(num_ranks)]

    def of(self, rank: int) -> Team:
        return self._team_of[rank]

    def without(self, busy: Set[int]) -> list[int]:
        """The ranks of the teams in which nobody is busy."""
        teams = enumerate(self._team_of)
        return [rank for rank, team in teams if team.ranks.isdisjoint(busy)]

    def add(self, request: Request) -> None:
        """Put a request on its ranks, or on more of them than before."""
        self._joined(request.ranks).requests[request] = None

    def remove(self, request: Request) -> None:
        """Take a request from its ranks, which may then go separate ways."""
        team = self._team_of[request.ranks[0]]
        del team.requests[request]
        if len(request.ranks) > 1:
            for rank in team.ranks:
                self._team_of[rank] = Team({rank})
            for other in team.requests:
                self.add(other)

    def _joined(self, ranks: list[int]) -> Team:
        team = self._team_of[ranks[0]]
        for rank in ranks[1:]:
            other = self._team_of[rank]
            if other is not team:
                if len(other.requests) > len(team.requests):
                    team, other = other, team
                team.ranks |= other.ranks
                team.requests |= other.requests
                for moved in other.ranks:
                    self._team_of[moved] = team
        return team
