"""tree: pass-Q whose partial states merge inside each host before they go to another one."""

from longspan.parallel.asking import ask
from longspan.parallel.exchange import Job, LayerExchange


def tree(layer: LayerExchange) -> Job:
    """The two-level merge of arXiv 2408.04093, for queries that are on some of the ranks only.

    A query goes once to each other host with keys, and one state comes back from it: with N hosts
    of r ranks a rank sends for even shares `(N - 1) * T / R` queries and as many states to other
    hosts, where pass-Q sends r times as many; inside its host it sends so much more. On one host it
    is pass-Q, message by message.
    """
    return ask(layer, "tree", layer.exchange.host_routes)
