"""What each strategy computes and sends. Pure Python."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from longspan.cost.kv_shape import KVShape
from longspan.plan import Shard, Strategy
from longspan.topology import Topology


class Sent(NamedTuple):
    """Bytes that a rank sends to ranks of its own host, and to those of other hosts."""

    near: int
    far: int


class Calls(NamedTuple):
    """Exchanges one after the other; `far` are those with a message between hosts."""

    near: int
    far: int


def exchanged_bytes(
    strategy: Strategy, shards: Sequence[Shard], shape: KVShape, topology: Topology
) -> Sent:
    """Bytes that all ranks together send for one segment in one layer.

    For even shards over R ranks these are the known formulas (arXiv 2411.01783, table 2): a rank
    sends `(R - 1) * S / R` keys, or `(R - 1) * T / R` queries and as many states.
    """
    sent = sent_bytes(strategy, shards, shape, topology)
    return Sent(sum(near for near, _ in sent), sum(far for _, far in sent))


def sent_bytes(
    strategy: Strategy, shards: Sequence[Shard], shape: KVShape, topology: Topology
) -> list[Sent]:
    """Bytes that each rank sends for one segment in one layer, as `longspan.parallel` does.

    Shards are in the order of their ranks.
    """
    if strategy == "local":
        return [Sent(0, 0)] * len(shards)
    hosts = _by_host(shards, topology)
    if strategy == "pass_kv":
        return _ring(hosts, shape.key_bytes)
    if strategy == "gather_kv":
        return _gather(hosts, shape.key_bytes)
    if strategy == "tree":
        return _tree(hosts, shape.asked_bytes, shape.answered_bytes)
    return _queries(hosts, shape.asked_bytes, shape.answered_bytes)


def carried_bytes(
    sent: list[Sent],
    strategy: Strategy,
    shards: Sequence[Shard],
    shape: KVShape,
    topology: Topology,
) -> list[Sent]:
    """Bytes of one layer that a rank's links take as long for as for so many both ways.

    `sent` is what `sent_bytes` says. Only gather-KV brings a rank far more than it sends, the keys
    of all others to the home: over the network the way counts that has more, inside a host, where
    the same memory or cores copy both, half of all.
    """
    if strategy != "gather_kv":
        return sent
    received = _gathered(_by_host(shards, topology), shape.key_bytes)
    return [
        Sent((out.near + come.near) // 2, max(out.far, come.far))
        for out, come in zip(sent, received, strict=True)
    ]


@dataclass(slots=True)
class _Host:
    """The shards of one host: their ranks, the queries and keys on each, and how many these are.

    `new` are its queries, `askers` and `holders` its ranks with queries and with keys.
    """

    ranks: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    new: int = 0
    askers: int = 0
    holders: int = 0

    def add(self, shard: Shard) -> None:
        queries, keys = shard.num_queries, shard.num_keys
        self.ranks.append(shard.rank)
        self.asked.append(queries)
        self.held.append(keys)
        self.new += queries
        self.askers += bool(queries)
        self.holders += bool(keys)


def _by_host(shards: Sequence[Shard], topology: Topology) -> list[_Host]:
    hosts: dict[int, _Host] = {}
    for shard in shards:
        number = topology.hosts[shard.rank]
        host = hosts.get(number) or hosts.setdefault(number, _Host())
        host.add(shard)
    return list(hosts.values())


def _gather(hosts: Sequence[_Host], key: int) -> list[Sent]:
    """Keys go once to each rank with queries."""
    all_askers = sum(host.askers for host in hosts)
    return [
        Sent(keys * (askers - bool(queries)) * key, keys * (all_askers - askers) * key)
        for host in hosts
        for askers in (host.askers,)
        for queries, keys in zip(host.asked, host.held, strict=True)
    ]


def _gathered(hosts: Sequence[_Host], key: int) -> list[Sent]:
    """Keys come once from each other rank to one with queries."""
    all_held = sum(sum(host.held) for host in hosts)
    return [
        Sent((held - keys) * key, (all_held - held) * key) if queries else Sent(0, 0)
        for host in hosts
        for held in (sum(host.held),)
        for queries, keys in zip(host.asked, host.held, strict=True)
    ]


def _queries(hosts: Sequence[_Host], asked: int, answered: int) -> list[Sent]:
    """Queries go once to each rank with keys, and as many states come back."""
    all_new, all_holders = sum(host.new for host in hosts), sum(host.holders for host in hosts)
    sent = []
    for host in hosts:
        new, holders = host.new, host.holders
        for queries, keys in zip(host.asked, host.held, strict=True):
            to_near = queries * (holders - bool(keys)) * asked
            to_far = queries * (all_holders - holders) * asked
            if keys:
                to_near += (new - queries) * answered
                to_far += (all_new - new) * answered
            sent.append(Sent(to_near, to_far))
    return sent


def _tree(hosts: Sequence[_Host], asked: int, answered: int) -> list[Sent]:
    """Queries go once to each other host's gateway for them, which asks the others there."""
    all_new, holding_hosts = sum(host.new for host in hosts), sum(1 for h in hosts if h.holders)
    sent = []
    for host in hosts:
        holders, relayed = host.holders, _relayed(host, hosts)
        for rank, queries, keys in zip(host.ranks, host.asked, host.held, strict=True):
            relays = relayed.get(rank, 0)
            to_near = (queries * (holders - bool(keys)) + relays * max(holders - 1, 0)) * asked
            to_far = queries * (holding_hosts - bool(holders)) * asked + relays * answered
            if keys:
                to_near += (all_new - queries - relays) * answered
            sent.append(Sent(to_near, to_far))
    return sent


def _relayed(host: _Host, hosts: Sequence[_Host]) -> dict[int, int]:
    """How many queries of other hosts reach each rank of a host as their gateway."""
    holders = [rank for rank, keys in zip(host.ranks, host.held, strict=True) if keys]
    relayed = dict.fromkeys(holders, 0)
    for other in hosts:
        if other is not host and other.new and holders:
            for rank, queries in zip(other.ranks, other.asked, strict=True):
                relayed[holders[rank % len(holders)]] += queries
    return relayed


def _ring(hosts: Sequence[_Host], key: int) -> list[Sent]:
    """Keys cross from host to host, and inside each go from where they come in to the last query.

    The keys that come in at a rank go round with its own.
    """
    entering = [list(host.held) for host in hosts]
    crossing = [[0] * len(host.held) for host in hosts]
    asking = [bool(host.new) for host in hosts]
    for number, host in enumerate(hosts):
        following = [(number + lap) % len(hosts) for lap in range(1, len(hosts))]
        while following and not asking[following[-1]]:
            following.pop()
        for place, keys in enumerate(host.held):
            before = number
            for after in following:
                crossing[before][place % len(crossing[before])] += keys
                entering[after][place % len(entering[after])] += keys
                before = after
    return [
        Sent(near * key, far * key)
        for host, held, crossed in zip(hosts, entering, crossing, strict=True)
        for near, far in zip(_passed_on(host.asked, held), crossed, strict=True)
    ]


def _passed_on(asked: Sequence[int], held: Sequence[int]) -> list[int]:
    """Keys that each rank sends to the next in a ring: a block goes as far as the last query."""
    size = len(held)
    last = max((place for place, queries in enumerate(asked) if queries), default=None)
    if last is None:
        return [0] * size
    # By how much more keys are sent at a place than at the one before. The ring is laid out twice,
    # so that a block that goes past its end needs no other care.
    change = [0] * (2 * size)
    for place, keys in enumerate(held):
        change[place] += keys
        change[place + (last - place) % size] -= keys
        if asked[place]:
            last = place
    sent = list(accumulate(change))
    return [first + second for first, second in zip(sent[:size], sent[size:], strict=True)]


def seen_keys(strategy: Strategy, shards: Sequence[Shard]) -> list[tuple[int, int]]:
    """Pairs of a query and a key it sees that each rank computes for a segment; keys it reads.

    They are of its queries and all keys; for pass-Q and tree, of all queries and its keys. The
    segment's new tokens are consecutive, and a rank that has the query of one has its key.
    """
    start = min(shard.queries[0].start for shard in shards if shard.queries)
    asked = [shard.num_queries for shard in shards]
    new, cached = sum(asked), sum(shard.cached for shard in shards)
    seen = []
    for shard, queries in zip(shards, asked, strict=True):
        if strategy in ("pass_q", "tree"):
            pairs = new * shard.cached
            for run in shard.keys:  # the last key of a run is seen by so many queries more
                later = start + new - run.start - run.length
                pairs += run.length * later + run.length * (run.length + 1) // 2
            seen.append((pairs, shard.cached + queries))
        else:
            pairs = queries * cached
            for run in shard.queries:
                earlier = run.start - start
                pairs += run.length * earlier + run.length * (run.length + 1) // 2
            seen.append((pairs, cached + new if queries else 0))
    return seen


def num_calls(
    strategy: Strategy,
    ranks: Sequence[int],
    topology: Topology,
    asking: Sequence[int] | None = None,
) -> Calls:
    """How many exchanges a segment over some ranks takes in one layer, one after the other.

    If every rank has keys, and queries, unless `asking` says which have; a rank that has no part in
    one makes fewer. A ring's keys cross to the next host while they go round this one, so its far
    calls hide near ones. A tree's gateways relay if they are not alone on their host.
    """
    if len(ranks) == 1 or strategy == "local":
        return Calls(0, 0)
    sizes = Counter(topology.hosts[rank] for rank in ranks)
    most, crossings = max(sizes.values()), len(sizes) - 1
    if strategy == "pass_kv":
        return Calls(len(sizes) * (most - 1), crossings)
    calls = 1 if strategy == "gather_kv" else 2
    if not crossings:
        return Calls(calls, 0)
    if strategy != "tree":
        return Calls(0, calls)
    homes = {topology.hosts[rank] for rank in (ranks if asking is None else asking)}
    relays = any(size > 1 and homes != {host} for host, size in sizes.items())
    return Calls(2 if relays else 0, calls)
