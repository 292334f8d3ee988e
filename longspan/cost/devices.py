"""What devices have and do: vendors' figures and the part of them that is assumed, or measured.

No GPU was measured for this table. Memory is in vendors' gigabytes of 10^9 bytes, rates are a
second's: dense (not sparse) floating point operations, bytes one way.
"""

import difflib
from dataclasses import dataclass, replace
from math import inf

from longspan.cost.calibration import Calibration
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device, which is one rank: bytes of memory, and what it and its links do.

    `half` is with numbers of bfloat16 or float16, `single` with float32. `source` says where that
    is from, `calibration` from which file if any; `gpu`, which part of its memory an engine fills.
    """

    name: str
    memory_bytes: float
    half: Rates
    single: Rates
    source: str
    gpu: bool = True
    calibration: str | None = None

    def rates(self, dtype: str) -> Rates:
        """What it and its links do with numbers of this type."""
        return self.single if dtype == "float32" else self.half


def _gpu(
    name: str,
    memory_bytes: float,
    half_flops: float,
    single_flops: float,
    memory_rate: float,
    host_link: float,
    network: float,
) -> Device:
    """A GPU as its vendor describes it: operations with tensor cores in half precision, without in
    single; bytes from memory, to another device of its host, and its part of the host's network."""

    def assumed(flops: float) -> Rates:
        far = NETWORK_PART * network
        return Rates(
            step_seconds=STEP_SECONDS,
            linear_flops=FLOPS_PART * flops,
            attention_flops=FLOPS_PART * flops,
            memory_bytes=MEMORY_PART * memory_rate,
            links={
                "host": LinkRates(HOST_LINK_SECONDS, HOST_LINK_PART * host_link),
                "network": LinkRates(NETWORK_SECONDS, far),
            },
            all_to_all={"network": LinkRates(ALL_TO_ALL_SECONDS, far)},
        )

    return Device(
        name=name,
        memory_bytes=memory_bytes,
        half=assumed(half_flops),
        single=assumed(single_flops),
        source=(
            "Times are predicted from what vendors say of a device and the part of it that a good "
            f"kernel is assumed to reach. No {name} was measured, and Longspan's own attention on "
            "GPUs has not been measured on any."
        ),
    )


CPU_THREADS = 16
"""So many threads of a server CPU are what is called a cpu here, with 64e9 bytes of free memory."""

_PCIE_4 = 32e9  # 16 lanes
_NVLINK_3, _NVLINK_4, _NVLINK_5 = 300e9, 450e9, 900e9
_HDR, _NDR = 25e9, 50e9  # InfiniBand of 200 and 400 Gb/s

_DEVICES = (
    # NVIDIA A100 datasheet (SXM); DGX A100 has one 200 Gb/s port for each GPU.
    _gpu("a100-40", 40e9, 312e12, 19.5e12, 1.555e12, _NVLINK_3, _HDR),
    _gpu("a100-80", 80e9, 312e12, 19.5e12, 2.039e12, _NVLINK_3, _HDR),
    # NVIDIA H100 and H200 datasheets (SXM); bfloat16 is 1,979e12 with sparsity. DGX H100 and H200
    # have one 400 Gb/s port for each GPU.
    _gpu("h100", 80e9, 989e12, 67e12, 3.35e12, _NVLINK_4, _NDR),
    _gpu("h200", 141e9, 989e12, 67e12, 4.8e12, _NVLINK_4, _NDR),
    # NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W; DGX B200: 1,440 GB of 8 GPUs, and
    # one 400 Gb/s port for each.
    _gpu("b200", 180e9, 2250e12, 80e12, 8e12, _NVLINK_5, _NDR),
    # NVIDIA L40S datasheet; it has no NVLink. One 100 Gb/s port for each is an assumption.
    _gpu("l40s", 48e9, 362e12, 91.6e12, 0.864e12, _PCIE_4, 12.5e9),
    # AMD Instinct MI300X data sheet. Two of a host's devices are joined by one Infinity Fabric
    # link, 128e9 bytes/s both ways; a ring uses one, an all-to-all seven. 400 Gb/s for each is an
    # assumption. Longspan was not tried on ROCm.
    _gpu("mi300x", 192e9, 1307e12, 163.4e12, 5.3e12, 64e9, _NDR),
    # In half precision attention is computed in float32.
    Device(
        name="cpu",
        memory_bytes=64e9,
        half=CPU_THREAD.of_threads(CPU_THREADS),
        single=CPU_THREAD.of_threads(CPU_THREADS),
        source=(
            f"Times are predicted for {CPU_THREADS} threads, as if each did what one was measured "
            "to do alone."
        ),
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


def planned_device(name: str | None, calibration: str | None, memory_gb: float | None) -> Device:
    """What each rank is planned with: a kind of device, or what a fleet measured of its own.

    A calibration's rates are taken instead of the vendor's; it does not tell how much memory there
    is, so that is the kind's, or as given.

    Raises:
        ConfigError: too little is given, or it contradicts itself; the file can't be read.
    """
    if memory_gb is not None and not 0 < memory_gb < inf:
        raise ConfigError(f"memory={memory_gb} must be above 0 GB")
    device = None if name is None else device_named(name)
    if calibration is not None:
        device = _measured(device, calibration, memory_gb)
    if device is None:
        raise ConfigError(f"device or calibration must be given; devices: {', '.join(DEVICES)}")
    return device if memory_gb is None else replace(device, memory_bytes=memory_gb * 1e9)


def _measured(device: Device | None, file: str, memory_gb: float | None) -> Device:
    measured = Calibration.load(file)
    gpu = not measured.device.endswith("CPU")
    if device is not None and device.gpu != gpu:
        raise ConfigError(
            f"device={device.name!r} contradicts calibration={file!r}, which was measured on "
            f"{measured.device!r}; leave device out and give memory"
        )
    if device is None and memory_gb is None:
        raise ConfigError(
            f"calibration={file!r} does not tell how much memory a device has; give memory (GB), "
            "or device"
        )
    ranks = " + ".join(map(str, measured.ranks_per_host))
    return Device(
        name=measured.device if device is None else device.name,
        memory_bytes=0.0 if device is None else device.memory_bytes,
        half=measured.rates,
        single=measured.rates,
        source=(
            f"Times are predicted from {file}: {measured.device}, {ranks} ranks, measured on "
            f"{measured.date[:10]} with {measured.model}. Another model, number type or number of "
            "ranks on a host has other rates."
        ),
        gpu=gpu,
        calibration=file,
    )
