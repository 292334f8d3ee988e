"""Which messages of an exchange travel behind which attention, as the strategies are written."""

from typing import NamedTuple

from longspan.cost.curve import Curve
from longspan.cost.kv_shape import KVShape
from longspan.cost.rates import LinkRates
from longspan.cost.strategy import Calls, Sent
from longspan.plan import Strategy


class Hidden(NamedTuple):
    """What the messages of pass-Q travel behind, as parts of a rank's attention.

    Here all queries leave at once and answers are computed when they have come: queries hide
    behind nothing of their own segment, answers behind attention to a rank's own keys. In arXiv
    2411.01783 queries go round a ring behind attention to those before them, and the final
    all-to-all of answers is waited for: `Hidden(queries=1, answers=0)`.
    """

    queries: float = 0.0
    answers: float = 1.0


HERE = Hidden()


class Leg(NamedTuple):
    """Messages of an exchange that one rank waits for together, over all layers.

    They take `start` seconds and so many for each byte that the rank sends in a layer inside its
    host and to other hosts. Meanwhile the rank attends: `own` and `rest` are the parts of its
    attention over its own keys and of all other, `local` that of segments without any exchange.
    """

    start: float
    near: float
    far: float
    overlap: float
    own: float
    rest: float
    local: float

    def seconds(self, sent: Sent) -> float:
        return self.start + self.near * sent.near + self.far * sent.far

    def exposed(self, sent: Sent, own: float, rest: float, local: float = 0.0) -> float:
        """Seconds that are left of the messages when that attention is done."""
        seconds = self.seconds(sent)
        behind = self.own * own + self.rest * rest + self.local * local
        return seconds - self.overlap * min(seconds, behind)

    def curves(self, sent: Sent, cached: int, degree: int) -> list[tuple[Curve, float]]:
        """What is left of the messages of a chunk that is even over so many ranks.

        `sent` is what the rank sends if one token of each rank travels; `cached` tokens travel
        beside the new ones. It is the highest of these curves of the new tokens, each less so many
        times the rank's attention: of a leg of `t` seconds behind attention `b` the higher of
        `(1 - overlap) t` and `t - overlap b`.
        """
        byte = (self.near * sent.near + self.far * sent.far) / degree
        whole = Curve(0.0, byte, self.start + byte * cached)
        part = self.overlap * (self.own + (degree - 1) * self.rest) / degree
        if not part:
            return [(whole, 0.0)]
        return [(whole, part), (whole.times(1 - self.overlap), 0.0)]


class Shared:
    """What a rank does for the segments of one exchange: its attention, and bytes in a layer."""

    __slots__ = ("far", "legs", "near", "own", "rest")

    def __init__(self, legs: list[Leg]) -> None:
        self.legs = legs
        self.own = self.rest = 0.0
        self.near = self.far = 0

    def seconds(self, local: float) -> float:
        """With so much attention of segments without any exchange beside it."""
        sent = Sent(self.near, self.far)
        exposed = sum(leg.exposed(sent, self.own, self.rest, local) for leg in self.legs)
        return self.own + self.rest + exposed


def legs(
    strategy: Strategy,
    size: int,
    calls: Calls,
    near: LinkRates,
    far: LinkRates,
    shape: KVShape,
    hidden: Hidden,
    handling: float,
) -> list[Leg]:
    """The legs of an exchange over `size` ranks.

    pass-KV: each hop travels behind attention to the block that is held, one of `size`, and each
    crossing to the next host behind attention to all blocks that go round this one meanwhile.
    gather-KV: everything travels behind local attention and that over the rank's own keys.
    pass-Q: queries travel behind local attention, answers behind that over the rank's own keys.
    Beside the links' latency a ring's hops take `handling` seconds each, for the block that is
    cut and handed on, and so does every answer, which is merged.
    """
    layers = shape.num_layers
    near_byte, far_byte = layers / near.bytes, layers / far.bytes
    each = handling if strategy == "pass_kv" else 0.0
    near_start = layers * calls.near * (near.seconds + each)
    far_start = layers * calls.far * (far.seconds + each)
    overlap = (far if calls.far else near).overlap
    if strategy == "pass_kv":
        round_host = calls.near / (calls.far + 1) + 1
        part, crossing = calls.near / size, calls.far * round_host / size
        return [
            Leg(near_start, near_byte, 0.0, near.overlap, part, part, 0.0),
            Leg(far_start, 0.0, far_byte, far.overlap, crossing, crossing, 0.0),
        ]
    start = near_start + far_start
    if strategy == "gather_kv":
        return [Leg(start, near_byte, far_byte, overlap, 1.0, 0.0, 1.0)]
    out = shape.asked_bytes / shape.query_bytes
    back = 1 - out
    return [
        Leg(start / 2, near_byte * out, far_byte * out, overlap, 0.0, hidden.queries, 1.0),
        Leg(
            start / 2 + layers * handling * (size - 1),
            near_byte * back,
            far_byte * back,
            overlap,
            hidden.answers,
            0.0,
            0.0,
        ),
    ]
