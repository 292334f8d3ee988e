"""Who asks whom: the way of queries to the ranks that hold their keys."""

from collections.abc import Mapping, Sequence

from longspan.plan import Segment

Question = tuple[int, int]
"""The queries of one segment on one rank: the rank, and the segment's index."""

Route = Mapping[int, Sequence[Question]]
"""The questions that travel to or from other ranks, in the order in which a message has them."""


class Routes:
    """What one rank asks others and is asked by them, directly or through a gateway.

    On its own host a rank asks all holders of keys. On each other host it asks one of them, the
    gateway, which asks the others there and answers for all. The gateway is the holder whose place
    among them is the asking rank's number, modulo how many they are: so a rank sends one message
    to a host, and the ranks of a host share the gateway's work. Where every rank is a host of its
    own there are no gateways.

    `asks` are this rank's own questions, by the rank that it asks, and `asked` those that others
    ask it; `relays` are others' that it relays as a gateway, and `relayed` those that it gets from
    gateways. `hosts[r]` is rank r's host.
    """

    def __init__(self, segments: Sequence[Segment], rank: int, hosts: Sequence[int]) -> None:
        self.asks: dict[int, list[Question]] = {}
        self.asked: dict[int, list[Question]] = {}
        self.relays: dict[int, list[Question]] = {}
        self.relayed: dict[int, list[Question]] = {}
        for index, segment in enumerate(segments):
            shards = sorted(segment.shards, key=lambda shard: shard.rank)
            holders: dict[int, list[int]] = {}
            for shard in shards:
                if shard.num_keys:
                    holders.setdefault(hosts[shard.rank], []).append(shard.rank)
            for asker in (shard.rank for shard in shards if shard.num_queries):
                self._add((asker, index), holders, rank, hosts)

    def _add(
        self,
        question: Question,
        holders: Mapping[int, Sequence[int]],
        rank: int,
        hosts: Sequence[int],
    ) -> None:
        """Add a question that is for all `holders`, by host, where `rank` has to do with it."""
        asker, _ = question
        for host, near in holders.items():
            if asker != rank and host != hosts[rank]:
                continue
            gateway = near[asker % len(near)]
            for holder in near:
                if holder == asker:
                    continue
                if host == hosts[asker] or holder == gateway:
                    sender, out, come = asker, self.asks, self.asked
                else:
                    sender, out, come = gateway, self.relays, self.relayed
                if sender == rank:
                    out.setdefault(holder, []).append(question)
                elif holder == rank:
                    come.setdefault(sender, []).append(question)
