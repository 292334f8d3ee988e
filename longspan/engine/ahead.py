"""When the step after one that is under way is known, whatever tokens that one draws."""

from collections import Counter

from longspan.engine.running import Running
from longspan.engine.step import Chunk, Step


def goes_on(step: Step, running: Running) -> bool:
    """Whether all that its ranks will do next is to decode its requests on where they are.

    A token may turn out to be the last of its request. Then what the next step computes for it is
    lost, and nothing else.
    """
    free, page_size = running.ledger.free, running.ledger.page_size
    teams = {running.teams.of(rank) for rank in step.plans}
    num_requests = sum(len(team.requests) for team in teams)
    if num_requests > len(step.chunks) or step.gatherings:
        return False
    if not all(_goes_on(c, page_size) for c in step.chunks):
        return False
    homes = (request.home for request, end, _ in step.chunks if end % page_size == 0)
    return all(home is not None and free[home] >= n for home, n in Counter(homes).items())


def _goes_on(chunk: Chunk, page_size: int) -> bool:
    """Whether a request's next token is to be computed as the last one was.

    With a page of its own, one that lies on several ranks may begin to move to its home.
    """
    request, end, segment = chunk
    stays = len(request.holdings) == 1 or end % page_size > 0
    settled = len(request.ranks) == len(request.holdings) and not request.to_gather
    return segment.draws and stays and settled and request.goes_on
