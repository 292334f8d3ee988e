"""What one rank's device and its links do: the constants of the cost model. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from longspan.topology import Link


@dataclass(frozen=True, slots=True)
class LinkRates:
    """One kind of link: seconds of a message however small, and bytes a second that a rank sends.

    `overlap` is the part of a message's time during which the rank computes as fast as without it:
    1 where the link's own hardware carries it, 0 where the same cores copy it.
    """

    seconds: float
    bytes: float
    overlap: float = 1.0


WIDER: Mapping[Link, tuple[Link, ...]] = {
    "device": ("device", "host", "network"),
    "host": ("host", "network"),
    "network": ("network",),
}
"""Whose figures a kind of link takes: its own, else those of the next wider kind that is known."""

ETHERNET = LinkRates(seconds=150e-6, bytes=2.5e9, overlap=0.5)
"""A link of which nothing is known: TCP over 25 GbE at 80 % of its 3.1e9 bytes/s. A guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one rank's device and its links do.

    `step_seconds` is a step's fixed cost (plan, launches), `attend_seconds` that of the attention
    of one segment's queries over one rank's keys in one layer (launches, merge). Others are per
    second: floating point operations in linear layers and in attention, bytes of weights or KV
    that are read. `links` are those of a message to one rank, as in a ring; `all_to_all` those of
    an exchange with several ranks at once, where it differs.
    """

    step_seconds: float
    linear_flops: float
    attention_flops: float
    memory_bytes: float
    attend_seconds: float = 0.0
    links: Mapping[Link, LinkRates] = field(default_factory=dict)
    all_to_all: Mapping[Link, LinkRates] = field(default_factory=dict)

    def hop(self, kind: Link) -> LinkRates:
        """A message to one rank; for a kind that is not known, see `WIDER` and `ETHERNET`."""
        return next((self.links[wide] for wide in WIDER[kind] if wide in self.links), ETHERNET)

    def exchange(self, kind: Link) -> LinkRates:
        """Messages to several ranks at once; where that is not known, as to one."""
        return self.all_to_all.get(kind) or self.hop(kind)

    def of_threads(self, threads: int) -> Self:
        """A device that computes and reads with so many threads; its links stay what they are."""
        return replace(
            self,
            linear_flops=self.linear_flops * threads,
            attention_flops=self.attention_flops * threads,
            memory_bytes=self.memory_bytes * threads,
        )


CPU_THREAD = Rates(
    step_seconds=2e-3,
    linear_flops=90e9,
    attention_flops=90e9,
    memory_bytes=20e9,
    attend_seconds=60e-6,
    links={"host": LinkRates(seconds=110e-6, bytes=2.4e9, overlap=0.0), "network": ETHERNET},
)
"""One thread of a server CPU, measured in float32 on 2 cores of an AMD EPYC (AVX-512).

Linear layers of 512 to 1536 numbers: 93e9 flops/s for 512 tokens, 77e9 for 64. Attention (8 query
heads, 2 KV heads, size 64) of 512 tokens over 8192 cached ones: 90e9; among 512 new ones, of which
half is masked: 63e9. One token's over few keys takes some 60 us with all that Python does for it;
it reads 32768 tokens' KV at 20e9 to 27e9 bytes/s, its linear layers weights at 20e9. An exchange
between two processes over gloo takes 100 to 160 us, and 1 MiB or more each way 2.0e9 to
2.6e9 bytes/s; the cores that compute copy it, so nothing overlaps. A step of one token through a
model of tiny layers takes 0.85 ms with 3 of them and 2.7 ms with 12. Between hosts see `ETHERNET`.
"""

CPU_THREAD_IN_PAIRS = replace(CPU_THREAD, linear_flops=200e9, attention_flops=180e9)
"""The same in bfloat16 on a CPU that multiplies pairs of it (AVX-512 BF16).

Attention of 8192 tokens over as many: 184e9 flops/s with heads of 64, 198e9 with heads of 128;
linear layers of 512 to 1408 numbers 190e9 to 207e9 for 2048 tokens."""

CUDA = Rates(
    step_seconds=5e-3,
    linear_flops=500e12,
    attention_flops=500e12,
    memory_bytes=2.8e12,
    links={
        "host": LinkRates(seconds=20e-6, bytes=300e9),
        "network": LinkRates(seconds=35e-6, bytes=26e9),
    },
    all_to_all={"network": LinkRates(seconds=80e-6, bytes=26e9)},
)
"""One datacentre GPU of NVIDIA's Hopper generation in bfloat16, its links NVLink. Guesses.

Flops are those that arXiv 2411.01783 reports for an H100 in long prefills, 502e12 a second of all
and 540e12 of attention alone. Memory and links inside a host reach 80 % and 65 % of the vendor's
3.35e12 and 450e9 bytes/s; latency is that of a small NCCL collective in one server. Between hosts
400 Gb/s RDMA for each GPU, as that paper measured it: 16 MB in 627 us (its table 5), 32 to 35 us
for a small message in a ring and 80 us for a small all-to-all (table 8). A step of an uncompiled
model of some 30 layers is a thousand launches of about 5 us, those of attention among them.
"""
