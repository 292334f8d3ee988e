"""The way of keys round all ranks: from rank to rank inside a host, and from host to host."""

from collections.abc import Sequence
from itertools import groupby

from longspan.plan import Segment

Stage = tuple[int, int]
"""How far keys have come: so many crossings to the next host, then so many hops inside it."""


class Ring:
    """Where each rank's block of keys is at each stage, and which segments' keys are still in it.

    After `lap` crossings a host has the blocks of the host so many places before it. They come in
    at its ranks in turn, one for each or several or none, and go round these ranks while they
    cross to the next host: so a block crosses into each other host once. On one host that is the
    ring of arXiv 2310.01889.

    `ranks` ascend; those of a host follow each other, and `hosts[r]` is rank r's. `rank` is one
    of them.
    """

    def __init__(
        self, segments: Sequence[Segment], ranks: Sequence[int], hosts: Sequence[int], rank: int
    ) -> None:
        self._hosts = [list(group) for _, group in groupby(ranks, key=lambda rank: hosts[rank])]
        self._places = {
            rank: (number, place)
            for number, host in enumerate(self._hosts)
            for place, rank in enumerate(host)
        }
        self._rank = rank
        shards = [segment.shards for segment in segments]
        self._asking = [{shard.rank for shard in each if shard.num_queries} for each in shards]
        self._holding = [{shard.rank for shard in each if shard.num_keys} for each in shards]
        self._travellers: dict[tuple[int, Stage], list[int]] = {}

    @property
    def num_hosts(self) -> int:
        return len(self._hosts)

    @property
    def num_near(self) -> int:
        """How many ranks of this rank's host are in the ring."""
        return len(self._near(self._rank, 0))

    def rank_at(self, origin: int, stage: Stage) -> int:
        """Who has the keys of `origin` at a stage."""
        (_, place), (lap, hop) = self._places[origin], stage
        near = self._near(origin, lap)
        return near[(place + hop) % len(near)]

    def origins(self, stage: Stage) -> list[int]:
        """Whose keys this rank has at a stage."""
        candidates = self._near(self._rank, -stage[0])
        return [origin for origin in candidates if self.rank_at(origin, stage) == self._rank]

    def travellers(self, origin: int, stage: Stage) -> list[int]:
        """The segments whose keys on `origin` come as far as a stage; all that leave, for (0, 0).

        Keys cross no further than to the last host with queries for them, and inside a host hop
        no further than to the last rank. Those that hop furthest come first, so that a block is
        cut from its end as it goes round a host.
        """
        key = origin, stage
        if key not in self._travellers:
            lap, hop = stage
            hops = {
                index: self._last_hop(index, origin, lap)
                for index, holding in enumerate(self._holding)
                if origin in holding
            }
            going = [
                index
                for index, last_hop in hops.items()
                if (last_hop >= hop if hop else self._arrives(index, origin, lap, last_hop))
            ]
            self._travellers[key] = sorted(going, key=lambda index: (-hops[index], index))
        return self._travellers[key]

    def _near(self, origin: int, lap: int) -> list[int]:
        """The ranks of the host that has the keys of `origin` after so many crossings."""
        number, _ = self._places[origin]
        return self._hosts[(number + lap) % len(self._hosts)]

    def _arrives(self, index: int, origin: int, lap: int, last_hop: int) -> bool:
        last_lap = self._last_lap(index, origin)
        return last_lap >= lap if lap else last_lap + last_hop > 0

    def _last_lap(self, index: int, origin: int) -> int:
        asking, laps = self._asking[index], range(1, len(self._hosts))
        return max(
            (lap for lap in laps if not asking.isdisjoint(self._near(origin, lap))), default=0
        )

    def _last_hop(self, index: int, origin: int, lap: int) -> int:
        asking, hops = self._asking[index], range(len(self._near(origin, lap)))
        return max((hop for hop in hops if self.rank_at(origin, (lap, hop)) in asking), default=0)
