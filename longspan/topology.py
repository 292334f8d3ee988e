"""Which ranks share a host or a device, and what kind of link joins two of them. Plain data."""

from collections.abc import Sequence
from typing import Literal, Self

import msgspec

Link = Literal["device", "host", "network"]
"""What joins two ranks: memory of one device, links inside a host, or the network between hosts."""


class Topology(msgspec.Struct, frozen=True, array_like=True):
    """For each rank the number of its host, and of its device on that host.

    Ranks of one host follow each other. Several ranks may share a device, as processes on a CPU do.
    """

    hosts: tuple[int, ...]
    devices: tuple[int, ...]

    @classmethod
    def of_hosts(cls, sizes: Sequence[int], shared_device: bool = False) -> Self:
        """Hosts with so many ranks each, on a device each or all of a host on one."""
        hosts = tuple(host for host, size in enumerate(sizes) for _ in range(size))
        devices = tuple(0 if shared_device else place for size in sizes for place in range(size))
        return cls(hosts, devices)

    @property
    def num_ranks(self) -> int:
        return len(self.hosts)

    @property
    def num_hosts(self) -> int:
        return len(set(self.hosts))

    def num_ranks_beside(self, rank: int) -> int:
        """How many ranks a rank's host has, itself among them."""
        return self.hosts.count(self.hosts[rank])

    def link(self, one: int, other: int) -> Link:
        """What joins two ranks."""
        if self.hosts[one] != self.hosts[other]:
            return "network"
        return "device" if self.devices[one] == self.devices[other] else "host"
