"""Where ranks are, and what joins them."""

import msgspec
import pytest

from longspan.topology import Topology


@pytest.mark.parametrize(("sizes", "hosts"), [([2], 1), ([2, 2], 2), ([3, 1, 2], 3)])
def test_hosts_and_ranks_are_counted(sizes: list[int], hosts: int) -> None:
    topology = Topology.of_hosts(sizes)
    assert topology.num_hosts == hosts
    assert topology.num_ranks == sum(sizes)
    assert [topology.hosts.count(host) for host in range(hosts)] == sizes


def test_links_are_of_three_kinds() -> None:
    topology = Topology(hosts=(0, 0, 0, 1), devices=(0, 0, 1, 0))
    assert topology.link(0, 1) == "device"
    assert topology.link(0, 2) == "host"
    assert topology.link(0, 3) == "network"
    assert Topology.of_hosts([2]).link(0, 1) == "host"
    assert Topology.of_hosts([2], shared_device=True).link(0, 1) == "device"


def test_it_travels_as_plain_data() -> None:
    topology = Topology.of_hosts([2, 1])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(topology), type=Topology) == topology
