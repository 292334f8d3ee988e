"""Pages on their way from one rank's pool to another's, while the ranks compute a step."""

from collections.abc import Callable, Sequence

from longspan.parallel.transport import Transport
from longspan.plan import Move
from longspan.worker.kv_pool import KVPool


def start_moves(moves: Sequence[Move], pool: KVPool, transport: Transport) -> Callable[[], None]:
    """Send copies of the pages that leave `pool`, and post receives for those that come.

    Each move is one message, counted under "move". Ranks match messages by order: all start their
    moves before anything else of the step. Returns a function that waits for all of them and
    writes what has come.
    """
    rank = transport.rank
    coming = [(move, pool.empty_pages(move.targets)) for move in moves if move.target == rank]
    finish = transport.exchange(
        "move",
        sends=[
            (move.target, pool.read_pages(move.sources)) for move in moves if move.source == rank
        ],
        receives=[(move.source, pages) for move, pages in coming],
    )

    def wait() -> None:
        finish()
        for move, pages in coming:
            pool.write_pages(move.targets, pages)

    return wait
