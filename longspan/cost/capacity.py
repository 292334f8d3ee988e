"""How many devices a context needs, and what they will do: from a model's config alone.

Every rank is one device and holds all weights; what is left of the part of its memory that an
engine fills is its KV pool. Times are forecasts, see `cost/forecast.py`.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, inf
from typing import TYPE_CHECKING

from longspan.config import CPU_MEMORY_UTILIZATION, GPU_MEMORY_UTILIZATION, EngineConfig
from longspan.cost.capacity_plan import CapacityPlan, DeviceFigures, Fewest, Row
from longspan.cost.devices import DEVICES, Device
from longspan.cost.explain import Choice, explain
from longspan.cost.forecast import Forecast, Forecaster
from longspan.cost.kv_shape import KVShape
from longspan.cost.model import CostModel
from longspan.cost.rates import WIDER
from longspan.errors import ConfigError
from longspan.token_count import show_tokens
from longspan.topology import Link, Topology

if TYPE_CHECKING:
    from longspan.models import ModelSpec

MAX_DEVICES = MAX_BATCH = 1024
"""No more devices, and requests at once, are planned with."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be planned: devices, and how many requests at once; targets in seconds.

    Raises:
        ConfigError: a number is outside its limits.
    """

    device: Device
    count: int
    nodes: int = 1
    batch: int = 1
    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name in ("count", "nodes", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("ttft", "tpot"):
            target = getattr(self, name)
            if target is not None and not 0 < target < inf:
                raise ConfigError(f"{name}={target} must be above 0 seconds and finite")
        if self.batch > MAX_BATCH:
            raise ConfigError(f"batch={self.batch} is above {MAX_BATCH}, the most to plan for")
        if self.num_ranks > MAX_DEVICES:
            raise ConfigError(
                f"count={self.count} x nodes={self.nodes} are {self.num_ranks} devices; plan with "
                f"no more than {MAX_DEVICES}"
            )

    @property
    def num_ranks(self) -> int:
        return self.count * self.nodes

    @property
    def has_targets(self) -> bool:
        return self.ttft is not None or self.tpot is not None

    def missed(self, ttft: float, tpot: float) -> float:
        """By how many times the worse of these times misses its target; 1 or less meets it."""
        pairs = ((ttft, self.ttft), (tpot, self.tpot))
        return max(seconds / target for seconds, target in pairs if target is not None)


class Planner:
    """Plans one model on one kind of device."""

    def __init__(self, spec: "ModelSpec", num_parameters: int, wanted: Wanted) -> None:
        self.spec = spec
        self.wanted = wanted
        self.shape = KVShape.of(spec)
        self.num_parameters = num_parameters
        self.weights_bytes = num_parameters * self.shape.itemsize
        self.config = EngineConfig(model=spec.name)
        self.page_size = self.config.page_size
        self.pool_bytes = pool_bytes(wanted.device, self.weights_bytes)
        self.pages_per_rank = self._pages_per_rank(wanted.device)
        self._forecasts: dict[tuple[int, int], Forecast] = {}

    def plan(self, context: int) -> CapacityPlan:
        """All answers, for contexts up to this one.

        Raises:
            ConfigError: the weights leave no room for keys in one device's memory.
        """
        if self.pages_per_rank < 1:
            raise ConfigError(self._too_large(context))
        spec, wanted, device = self.spec, self.wanted, self.wanted.device
        tokens_per_rank = self.pages_per_rank * self.page_size
        pages = self.pages_per_rank * wanted.num_ranks
        per_request = pages // wanted.batch * self.page_size
        return CapacityPlan(
            model=spec.name,
            architecture=spec.architecture,
            dtype=spec.dtype,
            device=DeviceFigures(
                device.name,
                int(device.memory_bytes),
                device.calibration,
                device.rates(spec.dtype),
            ),
            devices_per_node=wanted.count,
            nodes=wanted.nodes,
            ranks=wanted.num_ranks,
            context=context,
            batch=wanted.batch,
            max_model_len=spec.max_model_len,
            parameters=self.num_parameters,
            active_parameters=spec.num_active_parameters,
            weights_bytes=self.weights_bytes,
            kv_bytes_per_token=self.shape.token_bytes,
            kv_pool_bytes=self.pool_bytes,
            tokens_per_rank=tokens_per_rank,
            tokens_in_all=tokens_per_rank * wanted.num_ranks,
            tokens_per_request=per_request,
            max_context=min(per_request, spec.max_model_len),
            fewest=self.fewest(context),
            rows=[self.row(length) for length in ladder(context)],
            choices=self.choices(context),
            notes=list(self._notes(per_request)),
        )

    def _pages_per_rank(self, device: Device) -> int:
        """Pages of the model's keys that one device has room for; less than 1 if for none."""
        page_bytes = self.page_size * self.shape.token_bytes
        return pool_bytes(device, self.weights_bytes) // page_bytes

    def devices_for(self, context: int, device: Device | None = None) -> int:
        """The fewest devices whose pools hold the batch: those wanted, or of another kind."""
        pages = ceil(context / self.page_size) * self.wanted.batch
        each = self.pages_per_rank if device is None else self._pages_per_rank(device)
        return ceil(pages / each)

    def row(self, context: int) -> Row:
        needed = self.devices_for(context)
        kv_bytes = self.wanted.batch * context * self.shape.token_bytes
        if needed > self.wanted.num_ranks:
            return Row(context, kv_bytes, needed, fits=False)
        forecast = self._forecast(context, self.wanted.num_ranks)
        return Row(context, kv_bytes, needed, True, **forecast._asdict())

    def choices(self, context: int) -> list[Choice]:
        """Degrees and strategies of one request of this length; none if it does not fit."""
        if self.devices_for(context) > self.wanted.num_ranks:
            return []
        forecaster = self._forecaster(self.wanted.num_ranks)
        return explain(forecaster, context, self._forecast(context, self.wanted.num_ranks).degree)

    def fewest(self, context: int) -> Fewest:
        """The fewest devices for a context; for targets numbers are tried a quarter apart."""
        wanted, least = self.wanted, self.devices_for(context)
        if not wanted.has_targets or least > MAX_DEVICES:
            return Fewest(least, wanted.ttft, wanted.tpot)

        @cache
        def missed(ranks: int) -> float:
            return wanted.missed(*self.seconds(context, ranks))

        tried, ranks = [least], least
        while missed(ranks) > 1 and ranks < MAX_DEVICES:
            ranks = min(ranks + max(ranks // 4, 1), MAX_DEVICES)
            tried.append(ranks)
        found = None
        if missed(ranks) <= 1:
            between = range(tried[-2] + 1 if len(tried) > 1 else ranks, ranks + 1)
            found = between[bisect_left(between, True, key=lambda number: missed(number) <= 1)]
        nearest = found or min(tried, key=missed)
        forecast = self._forecast(context, nearest)
        return Fewest(
            for_memory=least,
            ttft_target=wanted.ttft,
            tpot_target=wanted.tpot,
            for_targets=found,
            searched=MAX_DEVICES,
            nearest=nearest,
            ttft=forecast.ttft,
            ttft_limit=forecast.ttft_limit,
            tpot=forecast.tpot,
            tpot_limit=forecast.tpot_limit,
        )

    def seconds(self, context: int, num_ranks: int) -> tuple[float, float]:
        """TTFT and TPOT of the batch on so many devices, which must have room for it."""
        return self._forecaster(num_ranks).seconds(context, self.wanted.batch)

    def _forecast(self, context: int, num_ranks: int) -> Forecast:
        key = context, num_ranks
        if key not in self._forecasts:
            forecaster = self._forecaster(num_ranks)
            self._forecasts[key] = forecaster.forecast(context, self.wanted.batch)
        return self._forecasts[key]

    def _forecaster(self, num_ranks: int) -> Forecaster:
        """The one place that knows how a cost model of so many devices is made.

        As in the engine, ranks of a host are on a device each, or on CPUs all on one.
        """
        whole, rest = divmod(num_ranks, self.wanted.count)
        sizes = [self.wanted.count] * whole + [rest] * bool(rest)
        topology = Topology.of_hosts(sizes, shared_device=not self.wanted.device.gpu)
        return Forecaster(
            partial(CostModel.of, self.spec, topology=topology),
            self.wanted.device.rates(self.spec.dtype),
            EngineConfig(model=self.spec.name, context_parallel_size=num_ranks),
            self.pages_per_rank,
        )

    def _notes(self, per_request: int) -> Iterator[str]:
        spec, wanted, most = self.spec, self.wanted, self.config.max_num_seqs
        yield wanted.device.source
        known = wanted.device.rates(spec.dtype).links
        several = wanted.has_targets or wanted.nodes > 1
        kinds: dict[Link, bool] = {"host": wanted.num_ranks > 1, "network": several}
        for kind, needed in kinds.items():
            if needed and known.keys().isdisjoint(WIDER["device" if kind == "host" else kind]):
                where = "inside a host" if kind == "host" else "between hosts"
                yield f"It knows no link {where}; one of TCP over 25 GbE is assumed."
        if wanted.batch > most:
            yield f"{wanted.batch:,} at once need max_num_seqs={wanted.batch}, by default {most}."
        if spec.max_model_len < per_request:
            yield (
                f"The model's own limit of {spec.max_model_len:,} tokens is less than the "
                f"{per_request:,} that fit."
            )

    def _too_large(self, context: int) -> str:
        spec, device = self.spec, self.wanted.device
        fewest = sorted(
            (self.devices_for(context, other), other.name)
            for other in DEVICES.values()
            if other.gpu == device.gpu and self._pages_per_rank(other) >= 1
        )
        fitting = [f"{count:,} {name}" for count, name in fewest[:3]]
        batch = "" if self.wanted.batch == 1 else f"{self.wanted.batch:,} x "
        remedy = (
            f"take larger devices: {' or '.join(fitting)} hold {batch}{show_tokens(context)} tokens"
            if fitting
            else "no known device is large enough"
        )
        part = f", of which {GPU_MEMORY_UTILIZATION:.0%} are filled" if device.gpu else ""
        return (
            f"model={spec.name!r} in {spec.dtype} needs {self.weights_bytes / 1e9:.1f} GB for "
            f"weights, all of them on every rank, and device={device.name!r} has "
            f"{device.memory_bytes / 1e9:g} GB{part}. Longspan has no tensor parallelism; {remedy}"
        )


def pool_bytes(device: Device, weights_bytes: int) -> int:
    """What an engine takes for a rank's KV pool, if it is told nothing; below 0 if there is none.

    A part of a GPU's memory is filled with weights and pool; on a CPU the pool takes a part of
    what the weights leave.
    """
    if device.gpu:
        return int(device.memory_bytes * GPU_MEMORY_UTILIZATION) - weights_bytes
    return int((device.memory_bytes - weights_bytes) * CPU_MEMORY_UTILIZATION)


def ladder(context: int) -> list[int]:
    """Context lengths from 1K to this one, each twice the one before."""
    lengths = [1024]
    while 2 * lengths[-1] < context:
        lengths.append(2 * lengths[-1])
    return [length for length in lengths if length < context] + [context]
