"""The next steps of idle ranks while they are being decided."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import inf

from longspan.config import EngineConfig
from longspan.cost.model import CostModel
from longspan.engine.request import Request
from longspan.engine.step import Chunk, Gathering, Step
from longspan.engine.teams import Team, Teams

MAX_SHARES = 4
"""Prompts too long for what is left of a step share it, but not among more than so many."""


def lone_factor(degree: int) -> int:
    """How many times as long a prompt over so many ranks may take that keeps nobody waiting.

    Longer steps cost less, the more so where ranks wait for each other in each layer.
    """
    return 8 if degree == 1 else 16


class Draft:
    """What each idle rank has left to give in its next step, and what is taken so far.

    Decode tokens are taken first. Prefill gets the tokens that are left and the time until
    `max_step_time`, but at least as long as a step takes anyhow, so that it always goes on. A
    prompt that is alone on its ranks may take longer.
    """

    def __init__(
        self,
        idle: Iterable[int],
        num_ranks: int,
        config: EngineConfig,
        cost: CostModel,
    ) -> None:
        self.idle = set(idle)
        self.cost = cost
        self.page_size = config.page_size
        self.max_seconds = inf if config.max_step_time is None else config.max_step_time
        self.tokens = [0] * num_ranks
        for rank in self.idle:
            self.tokens[rank] = config.max_num_batched_tokens
        self.decode_seconds = [0.0] * num_ranks
        self.prefill_seconds = [0.0] * num_ranks
        self.prefilling: list[Request] = []
        self.num_prompts = [0] * num_ranks
        self.degrees = [1] * num_ranks
        """Over how many ranks the prompt is that came last, for each of its ranks."""
        self.num_prefilling: Counter[tuple[int, int]] = Counter()
        """How many prompts of each priority are still to get their part, by priority and rank."""
        self.chunks: list[Chunk] = []
        self.gatherings: list[Gathering] = []

    def prefill_time(self, rank: int) -> float:
        """How many seconds prefill may take on a rank."""
        base, alone = self.cost.base_seconds, not self.decode_seconds[rank]
        is_only = alone and self.num_prompts[rank] == 1
        most = self.max_seconds * (lone_factor(self.degrees[rank]) if is_only else 1)
        return max(most - base - self.decode_seconds[rank], base)

    @property
    def _all_are_idle(self) -> bool:
        return len(self.idle) == len(self.tokens)

    @property
    def has_room(self) -> bool:
        """Whether any rank has a token left."""
        return any(self.tokens[rank] for rank in self.idle)

    def has_room_for(self, tokens: int, cached: int, ranks: Sequence[int], priority: int) -> bool:
        """Whether a new prompt's fair share of the step is all that it needs, or much of it.

        Nobody's share is to be less than a page because of it, or it might never get one.
        """
        need = -(-tokens // len(ranks))
        seconds = self.cost.prefill_seconds(tokens, cached, len(ranks))
        before = [(other, rank) for other, rank in self.num_prefilling if other <= priority]
        for rank in self.idle.intersection(ranks):
            shares = 1 + sum(self.num_prefilling[key] for key in before if key[1] == rank)
            all_it_needs = (
                self.tokens[rank] >= need * shares and self.prefill_time(rank) >= seconds * shares
            )
            much = shares <= MAX_SHARES and self.tokens[rank] >= self.page_size * shares
            if not (all_it_needs or much or shares == 1):
                return False
        return True

    def add_prefilling(self, request: Request) -> None:
        self.prefilling.append(request)
        for rank in request.ranks:
            self.num_prefilling[request.order[0], rank] += 1
            self.num_prompts[rank] += 1
            self.degrees[rank] = len(request.ranks)

    def remove_prefilling(self, request: Request, ranks: Sequence[int]) -> None:
        """A prompt has got its part on these ranks, or none."""
        for rank in ranks:
            self.num_prefilling[request.order[0], rank] -= 1

    def fair_budgets(self, request: Request) -> dict[int, int]:
        """The tokens that a prefilling request may take on each of its ranks.

        What is left of a rank's tokens and time is shared evenly among the prompts of a priority;
        those that need least come first and leave what they don't need. Ranks wait for each other
        in every layer, so the one with least time counts for all. A part is at least a page, if
        there are so many tokens.
        """
        shares = {
            rank: max(self.num_prefilling[request.order[0], rank], 1) for rank in request.ranks
        }
        tokens, degree = request.num_pending, len(request.ranks)
        if self.max_seconds < inf:
            seconds = min(
                (self.prefill_time(rank) - self.prefill_seconds[rank]) / shares[rank]
                for rank in request.ranks
            )
            tokens = self.cost.tokens_within(max(seconds, 0.0), request.num_computed, degree)
        most = max(-(-tokens // degree), self.page_size)
        budgets = {}
        for rank in request.ranks:
            left = self.tokens[rank]
            budgets[rank] = min(max(left // shares[rank], min(self.page_size, left)), most)
        return budgets

    def take_prefill(self, chunk: Chunk) -> None:
        request = chunk.request
        begun = request.num_computed
        seconds = self.cost.prefill_seconds(chunk.end - begun, begun, len(request.ranks))
        for shard in chunk.segment.shards:
            self.tokens[shard.rank] -= shard.num_queries
            self.prefill_seconds[shard.rank] += seconds
        self.chunks.append(chunk)

    def take_decode(self, chunk: Chunk) -> None:
        holdings = chunk.request.holdings
        seconds = self.cost.decode_seconds([holding.tokens for holding in holdings.values()])
        for rank in holdings:
            self.decode_seconds[rank] += seconds
        assert chunk.request.home is not None
        self.tokens[chunk.request.home] -= 1
        self.chunks.append(chunk)

    def steps(self, teams: Teams, numbers: Iterator[int]) -> list[Step]:
        """One step for each team that has anything to do, with its plans.

        If all ranks are idle and only decode, it is one joint step, whose number is the next of
        `numbers`.
        """
        whole = Step(self.chunks, self.gatherings)
        if self.chunks and self.cost.joins and whole.can_be_joint and self._all_are_idle:
            whole.make_joint_plans(tuple(sorted(self.idle)), next(numbers))
            whole.seconds = self.cost.base_seconds + max(self.decode_seconds)
            return [whole]
        steps: dict[Team, Step] = {}
        for chunk in self.chunks:
            rank = chunk.segment.shards[0].rank
            step = steps.setdefault(teams.of(rank), Step())
            step.chunks.append(chunk)
        for gathering in self.gatherings:
            steps[teams.of(gathering.places[0].rank)].gatherings.append(gathering)
        for step in steps.values():
            step.make_plans()
            step.seconds = self.cost.base_seconds + max(
                self.decode_seconds[rank] + self.prefill_seconds[rank] for rank in step.plans
            )
        return list(steps.values())
