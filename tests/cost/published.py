"""What arXiv 2411.01783 measured of Llama-3 405B on nodes of 8 H100, and what follows for Longspan.

A rank is a node, whose 8 GPUs are one tensor-parallel group: the model's shape is that on one GPU,
and so are all rates. K is 1000 tokens, as in the paper's table 4 and in its appendix A.
"""

from typing import NamedTuple

from longspan.cost.fit import fit
from longspan.cost.kv_shape import KVShape
from longspan.cost.model import CostModel
from longspan.cost.overlap import Hidden
from longspan.cost.rates import LinkRates, Rates
from longspan.plan import Run, Shard
from longspan.topology import Topology

LAYERS, HEADS, HEAD_DIM = 126, 128 // 8, 128
PARAMETERS = 405_000_000_000 // 8
MEMORY_BYTES = 2.4e12
"""Peak of the memory, section 4.1."""


class _Shape(KVShape):
    """The paper's partial outputs travel in bfloat16."""

    @property
    def answered_bytes(self) -> int:
        return self.num_heads * (self.head_dim + 1) * 2


SHAPE = _Shape(LAYERS, HEADS, num_kv_heads=1, head_dim=HEAD_DIM, itemsize=2)

PAPER = Hidden(queries=1.0, answers=0.0)
"""Queries go round a ring behind attention; the final all-to-all is waited for (section 3.5.3)."""


class Row(NamedTuple):
    """Table 4: new tokens of 128,000 on 4 ranks, milliseconds to the first token."""

    new: int
    pass_kv: float
    pass_q: float

    @property
    def cached(self) -> int:
        return 128_000 - self.new


TABLE_4 = [
    Row(1280, 1023.39, 898.71),
    Row(3200, 1110.18, 1046.43),
    Row(4160, 1298.92, 1280.1),
    Row(6400, 1305.56, 1302.01),
    Row(12800, 2080.67, 2205.27),
    Row(25600, 3353.02, 3617.02),
    Row(38400, 4629.23, 4922.52),
    Row(51200, 5745.08, 6217.83),
    Row(64000, 6845.21, 7367.99),
    Row(76800, 7890.35, 8468.66),
    Row(89600, 8697.27, 9666.62),
    Row(102400, 10105.78, 10652.39),
    Row(115200, 11136.4, 11571.62),
    Row(128000, 11462.15, 12360.57),
]

TABLE_5 = {  # new tokens: microseconds of one hop with keys, with queries, attention, all-to-all
    3200: (627, 166, 414, 424),
    12800: (631, 544, 1608, 1023),
}

TABLE_6 = {  # ranks, tokens: milliseconds to the first token
    (1, 8000): 1740,
    (1, 32_000): 7658,
    (2, 8000): 999,
    (2, 32_000): 4015,
}

TIMES = {  # ranks, tokens: seconds to the first token; tables 6 and 7, sections 4.2.1 and 4.2.3
    (1, 128_000): 42.010,
    (2, 128_000): 21.042,
    (4, 128_000): 10.950,
    (8, 128_000): 5.85,
    (16, 128_000): 3.8,
    (16, 1_000_000): 77.0,
}


def attention_flops() -> float:
    """From table 5: a rank's queries over one of four blocks."""
    rows, seconds = [], []
    for new, (_, _, attention, _) in TABLE_5.items():
        pairs = new * (128_000 - new) + new * (new + 1) / 2
        rows.append([4 * HEADS * HEAD_DIM * pairs / 16])
        seconds.append(attention * 1e-6)
    (second_per_flop,) = fit(rows, seconds)
    return 1 / second_per_flop


def ring_link() -> LinkRates:
    """From table 5: hops with 32,000 tokens' keys, or with a quarter of the queries."""
    rows, seconds = [], []
    for new, (keys, queries, _, _) in TABLE_5.items():
        rows += [[1, 32_000 * SHAPE.key_bytes], [1, new // 4 * SHAPE.asked_bytes]]
        seconds += [keys * 1e-6, queries * 1e-6]
    latency, byte = fit(rows, seconds)
    return LinkRates(latency, 1 / byte)


def all_to_all_link() -> LinkRates:
    """From table 5: states of a quarter of the queries to each of three other ranks."""
    rows = [[1, 3 * (new // 4) * SHAPE.answered_bytes] for new in TABLE_5]
    latency, byte = fit(rows, [row[3] * 1e-6 for row in TABLE_5.values()])
    return LinkRates(latency, 1 / byte)


def rates_of_table_5() -> Rates:
    """All that the choice of a strategy needs."""
    return Rates(
        step_seconds=0.0,
        linear_flops=1e30,
        attention_flops=attention_flops(),
        memory_bytes=MEMORY_BYTES,
        links={"network": ring_link()},
        all_to_all={"network": all_to_all_link()},
    )


def model(rates: Rates, ranks: int) -> CostModel:
    return CostModel(SHAPE, PARAMETERS, rates, Topology.of_hosts([1] * ranks), PAPER)


def zigzag(ranks: int, new: int, cached: int) -> list[Shard]:
    """Rank r has the blocks r and -1 - r of `2 * ranks` blocks of the new tokens."""
    block = new // (2 * ranks)
    shards = []
    for rank in range(ranks):
        blocks = (rank, 2 * ranks - 1 - rank)
        runs = tuple(Run(cached + number * block, block) for number in blocks)
        shards.append(Shard(rank, runs, cached // ranks, runs))
    return shards
