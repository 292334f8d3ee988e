"""Ranks are in one team exactly if requests connect them."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from longspan.engine.teams import Teams

NUM_RANKS = 6


@dataclass(eq=False)
class Asking:
    """Of a request teams need the ranks only."""

    ranks: list[int] = field(default_factory=list)


class Model:
    """Teams worked out anew each time."""

    def __init__(self, requests: list[Asking]) -> None:
        self.teams = [{rank} for rank in range(NUM_RANKS)]
        for request in requests:
            met = [team for team in self.teams if team & set(request.ranks)]
            others = [team for team in self.teams if team not in met]
            self.teams = [*others, set().union(*met)]


some_ranks = st.lists(st.integers(0, NUM_RANKS - 1), min_size=1, max_size=3, unique=True)
operations = st.lists(
    st.tuples(st.sampled_from(("add", "spread", "part", "remove")), st.integers(0, 99), some_ranks),
    max_size=30,
)


@given(operations)
def test_teams_are_what_requests_connect(done: list[tuple[str, int, list[int]]]) -> None:
    teams, requests = Teams(NUM_RANKS), list[Asking]()
    for what, which, ranks in done:
        request = requests[which % len(requests)] if requests else None
        if what == "add" or request is None:
            requests.append(Asking(ranks))
            teams.add(requests[-1])
        elif what == "spread":
            request.ranks += [rank for rank in ranks if rank not in request.ranks]
            teams.add(request)
        else:
            teams.remove(request)
            requests.remove(request)
            if what == "part":
                request.ranks = request.ranks[:1]
                teams.add(request)
                requests.append(request)
        expected = Model(requests).teams
        for rank in range(NUM_RANKS):
            team = teams.of(rank)
            assert team.ranks in expected
            assert rank in team.ranks
            assert set(team.requests) == {r for r in requests if team.ranks & set(r.ranks)}
            assert all(teams.of(other) is team for other in team.ranks)


def test_a_rank_is_alone_until_a_request_ties_it_to_another() -> None:
    teams = Teams(4)
    tie, local = Asking([0, 2]), Asking([2])
    teams.add(local)
    assert teams.of(2).ranks == {2}
    teams.add(tie)
    assert [teams.of(rank).ranks for rank in range(4)] == [{0, 2}, {1}, {0, 2}, {3}]
    teams.remove(tie)
    assert [teams.of(rank).ranks for rank in range(4)] == [{0}, {1}, {2}, {3}]
    assert list(teams.of(2).requests) == [local]
