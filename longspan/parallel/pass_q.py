"""pass-Q: queries go to the keys' ranks, partial states come back (arXiv 2411.01783)."""

from longspan.parallel.asking import ask
from longspan.parallel.exchange import Job, LayerExchange


def pass_q(layer: LayerExchange) -> Job:
    """Two all-to-alls: every rank with queries asks every rank with keys for them.

    Sends for even shares `(R - 1) * T / R * H * D` numbers out and `(R - 1) * T / R * H * (D + 1)`
    float32 back. All queries of a step leave at once instead of going round a ring: the bytes are
    the same, and one token's query crosses one link instead of R - 1.
    """
    return ask(layer, "pass_q", layer.exchange.direct_routes)
