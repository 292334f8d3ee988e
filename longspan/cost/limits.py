"""What takes time: found by predicting again for ranks to which some of it is free.

So it holds for whatever a cost model does with its rates, also where one thing hides another.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any, Literal, get_args

from longspan.cost.model import CostModel
from longspan.cost.rates import LinkRates, Rates
from longspan.topology import Link

Part = Literal["launches", "linear", "attention", "reading", "messages"]
Limit = Literal["compute", "memory", "link", "launches"]
"""What limits: operations, reading weights and keys, other ranks, or each step's fixed cost."""

ModelOf = Callable[[Rates], CostModel]
"""Makes the cost model of one model and its ranks, with these rates."""

_FREE: dict[Part, dict[str, Any]] = {
    "launches": {"step_seconds": 0.0, "attend_seconds": 0.0},
    "linear": {"linear_flops": inf},
    "attention": {"attention_flops": inf},
    "reading": {"memory_bytes": inf},
    "messages": {"links": dict.fromkeys(get_args(Link), LinkRates(0.0, inf)), "all_to_all": {}},
}
"""How rates are for which a part takes no time."""

LIMITS: dict[Limit, tuple[Part, ...]] = {
    "compute": ("linear", "attention"),
    "memory": ("reading",),
    "link": ("messages",),
    "launches": ("launches",),
}


def without(rates: Rates, *parts: Part) -> Rates:
    """The same ranks if these parts took no time."""
    return replace(rates, **{name: value for part in parts for name, value in _FREE[part].items()})


def only(rates: Rates, *parts: Part) -> Rates:
    """The same ranks if nothing but these parts took time."""
    return without(rates, *(part for part in _FREE if part not in parts))


def limit_of(
    model_of: ModelOf, rates: Rates, seconds_of: Callable[[CostModel], float]
) -> tuple[float, Limit]:
    """What a cost model predicts, and what would make it least if it took no time."""
    left = {limit: seconds_of(model_of(without(rates, *parts))) for limit, parts in LIMITS.items()}
    return seconds_of(model_of(rates)), min(left, key=left.__getitem__)
