"""What kinds of devices have and do: vendors' figures, and the part of them that is assumed.

No GPU was measured for this table. Memory is in vendors' gigabytes of 10^9 bytes, rates are a
second's: dense (not sparse) floating point operations, bytes one way.
"""

import difflib
from dataclasses import dataclass

from longspan.cost.rates import CPU_THREAD, LinkRates, Rates
from longspan.errors import ConfigError

FLOPS_PART = 0.5
"""Part of the vendor's operations that linear layers and attention reach.

arXiv 2411.01783 reports 502e12 a second for an H100 in long prefills, of the vendor's 989e12.
"""

MEMORY_PART = 0.8
"""Part of the vendor's memory bandwidth that reading weights and keys reaches. A guess."""

HOST_LINK_PART = 0.65
"""Part of the links inside a host. A guess, after large NCCL messages over NVLink."""

NETWORK_PART = 0.52
"""Part of the network: 26e9 of 50e9 bytes a second in arXiv 2411.01783, table 5."""

STEP_SECONDS = 5e-3
"""A step's launches in an uncompiled model of some 30 layers. A guess."""

HOST_LINK_SECONDS = 20e-6
"""A small collective inside a server. A guess."""

NETWORK_SECONDS = 35e-6
"""A small message in a ring between servers over RDMA: arXiv 2411.01783, table 8."""

ALL_TO_ALL_SECONDS = 80e-6
"""A small all-to-all between servers: the same table."""


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device, as its vendor describes it.

    `half_flops` are those in bfloat16 and float16 with tensor cores, `float32_flops` those without.
    `host_link` joins two devices of one host, `network` is a device's part of its host's network.
    `gpu` tells which part of its memory an engine fills by default.
    """

    name: str
    memory_bytes: float
    half_flops: float
    float32_flops: float
    memory_rate: float
    host_link: float
    network: float
    gpu: bool = True

    def flops(self, dtype: str) -> float:
        """Its vendor's operations a second with numbers of this type."""
        return self.float32_flops if dtype == "float32" else self.half_flops

    def rates(self, dtype: str) -> Rates:
        """What it and its links are assumed to do with numbers of this type."""
        if not self.gpu:
            return CPU_THREAD.of_threads(CPU_THREADS)
        return Rates(
            step_seconds=STEP_SECONDS,
            linear_flops=FLOPS_PART * self.flops(dtype),
            attention_flops=FLOPS_PART * self.flops(dtype),
            memory_bytes=MEMORY_PART * self.memory_rate,
            links={
                "host": LinkRates(HOST_LINK_SECONDS, HOST_LINK_PART * self.host_link),
                "network": LinkRates(NETWORK_SECONDS, NETWORK_PART * self.network),
            },
            all_to_all={
                "network": LinkRates(ALL_TO_ALL_SECONDS, NETWORK_PART * self.network),
            },
        )


CPU_THREADS = 16
"""So many threads of a server CPU are what is called a cpu here, with 64e9 bytes of free memory."""

_PCIE_4 = 32e9  # 16 lanes
_NVLINK_3, _NVLINK_4, _NVLINK_5 = 300e9, 450e9, 900e9
_HDR, _NDR = 25e9, 50e9  # InfiniBand of 200 and 400 Gb/s

_DEVICES = (
    # NVIDIA A100 datasheet (SXM); DGX A100 has one 200 Gb/s port for each GPU.
    Device("a100-40", 40e9, 312e12, 19.5e12, 1.555e12, _NVLINK_3, _HDR),
    Device("a100-80", 80e9, 312e12, 19.5e12, 2.039e12, _NVLINK_3, _HDR),
    # NVIDIA H100 and H200 datasheets (SXM); bfloat16 is 1,979e12 with sparsity. DGX H100 and H200
    # have one 400 Gb/s port for each GPU.
    Device("h100", 80e9, 989e12, 67e12, 3.35e12, _NVLINK_4, _NDR),
    Device("h200", 141e9, 989e12, 67e12, 4.8e12, _NVLINK_4, _NDR),
    # NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W; DGX B200: 1,440 GB of 8 GPUs, and
    # one 400 Gb/s port for each.
    Device("b200", 180e9, 2250e12, 80e12, 8e12, _NVLINK_5, _NDR),
    # NVIDIA L40S datasheet; it has no NVLink. One 100 Gb/s port for each is an assumption.
    Device("l40s", 48e9, 362e12, 91.6e12, 0.864e12, _PCIE_4, 12.5e9),
    # AMD Instinct MI300X data sheet. Two of a host's devices are joined by one Infinity Fabric
    # link, 128e9 bytes/s both ways; a ring uses one, an all-to-all seven. 400 Gb/s for each is an
    # assumption. Longspan was not tried on ROCm.
    Device("mi300x", 192e9, 1307e12, 163.4e12, 5.3e12, 64e9, _NDR),
    # Threads as `CPU_THREAD` was measured; in half precision attention is computed in float32.
    Device(
        "cpu",
        64e9,
        CPU_THREADS * CPU_THREAD.linear_flops,
        CPU_THREADS * CPU_THREAD.linear_flops,
        CPU_THREADS * CPU_THREAD.memory_bytes,
        CPU_THREAD.hop("host").bytes,
        CPU_THREAD.hop("network").bytes,
        gpu=False,
    ),
)

DEVICES = {device.name: device for device in _DEVICES}


def device_named(name: str) -> Device:
    """The kind of device of this name, in capitals or not.

    Raises:
        ConfigError: there is none in the table; the message names the nearest, or all.
    """
    if device := DEVICES.get(name.lower()):
        return device
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known devices: {', '.join(DEVICES)}"
    raise ConfigError(f"device={name!r} is unknown; {hint}")
