"""Which strategy a segment takes: the one that is predicted to be fastest. Pure Python."""

from collections.abc import Sequence
from typing import NamedTuple

from longspan.cost.model import CostModel, Prediction
from longspan.plan import Shard, Strategy

HYSTERESIS = 0.05
"""A request changes its strategy only for one that takes by so much less time."""

GATHER_BYTES = 64 * 2**20
"""gather-KV is for segments whose keys and values from other ranks need no more room in a layer."""


class Choice(NamedTuple):
    """What a request's last step took: for how many new tokens, over how many ranks."""

    strategy: Strategy
    tokens: int
    holders: int


def is_feasible(strategy: Strategy, shards: Sequence[Shard], model: CostModel) -> bool:
    """Whether a rank has room for what it receives at once."""
    if strategy != "gather_kv":
        return True
    held = [shard.num_keys for shard in shards]
    return (sum(held) - min(held)) * model.shape.key_bytes <= GATHER_BYTES


def predictions(
    shards: Sequence[Shard], model: CostModel, strategies: Sequence[Strategy] | None = None
) -> dict[Strategy, Prediction]:
    """What each feasible one of these strategies, or of all, costs a segment over several ranks."""
    asked = strategies or model.strategies
    return model.predict_each([one for one in asked if is_feasible(one, shards, model)], shards)


def choose(predicted: dict[Strategy, Prediction], last: Strategy | None = None) -> Strategy:
    """The strategy of least predicted seconds; of equals that of fewer calls, then of fewer bytes.

    `last`, the strategy of the request's last step, is kept unless another takes less time by
    `HYSTERESIS`, so that figures which are almost equal don't make it go back and forth.
    """
    best = min(
        predicted,
        key=lambda name: (
            predicted[name].seconds,
            sum(predicted[name].calls),
            sum(predicted[name].sent),
        ),
    )
    if last in predicted:
        kept = predicted[last].seconds * (1 - HYSTERESIS)
        if predicted[best].seconds >= kept:
            return last
    return best


def decide(
    shards: Sequence[Shard], model: CostModel, last: Choice | None, begins_page: bool
) -> Choice:
    """What a request's next step takes, after its last one.

    One that decodes on as many ranks as before chooses anew only with the first token of a page.
    """
    tokens, holders = sum(shard.num_queries for shard in shards), len(shards)
    if last and not begins_page and tokens == 1 and last[1:] == (1, holders):
        return last
    strategy = choose(predictions(shards, model), last.strategy if last else None)
    return Choice(strategy, tokens, holders)
