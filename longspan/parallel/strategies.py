"""The strategies by name, and how several of them run beside local work."""

from collections.abc import Callable, Mapping

from longspan.attention.state import AttentionState
from longspan.parallel.exchange import Job, LayerExchange
from longspan.parallel.gather_kv import gather_kv
from longspan.parallel.pass_kv import pass_kv
from longspan.parallel.pass_q import pass_q
from longspan.parallel.tree import tree

STRATEGIES: Mapping[str, Callable[[LayerExchange], Job]] = {
    "pass_kv": pass_kv,
    "gather_kv": gather_kv,
    "pass_q": pass_q,
    "tree": tree,
}


def finish(job: Job) -> list[AttentionState]:
    """Run a job to its end, from wherever it stands."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            states: list[AttentionState] = end.value
            return states
