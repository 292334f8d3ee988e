"""Ranks as actors of a Ray cluster. They connect to the engine as the ranks of other nodes do."""

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from longspan.config import EngineConfig
from longspan.errors import ConfigError, LongspanError, RankFailedError
from longspan.topology import Topology
from longspan.worker import rank as rank_process
from longspan.worker.channel import Attach
from longspan.worker.channel_executor import ChannelExecutor
from longspan.worker.control_port import PATIENCE_SECONDS, ControlPort
from longspan.worker.handshake import Unwelcome, dial
from longspan.worker.interface import interface_of

_PLACEMENT_SECONDS = 10.0
"""How long resources may take that others are just giving back."""


class RayExecutor(ChannelExecutor):
    """Places the ranks with a placement group and talks to each actor over a connection of its own.

    Uses the cluster that the process is connected to, or that Ray finds (RAY_ADDRESS, or one of
    this host), or starts one on this host that ends with the fleet. The secret that actors need is
    made for each fleet, and Ray brings it to them.
    """

    _actors: "_Actors"

    @property
    def pids(self) -> list[int]:
        """The processes of the ranks, on whatever hosts they are."""
        return [actor.pid for actor in self._actors.placed]

    def _start_ranks(self, config: EngineConfig) -> tuple[EngineConfig, str]:
        self._actors = _Actors(own_cluster=_connect(config.num_ranks))
        self._hosts.append(self._actors)
        if config.device == "auto":
            config = replace(config, device="cuda" if _resources().get("GPU") else "cpu")
        self._actors.place_all(_bundle(config), config.num_ranks)
        names = [actor.node_id for actor in self._actors.placed]
        sizes = [names.count(name) for name in dict.fromkeys(names)]
        self.topology = Topology.of_hosts(sizes, shared_device=config.device == "cpu")
        here = set(names) == {ray.get_runtime_context().get_node_id()}
        address = "127.0.0.1" if here else ray.util.get_node_ip_address()
        secret = secrets.token_bytes(32)
        with contextlib.closing(ControlPort(address, 0, secret)) as port:
            self._actors.run(port, secret)
            port.attach([self._actors], self._channels)
        return config, self._open_store(address)


class Rank:
    """The actor: one rank for the life of its process."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, rank: int, address: str, port: int, secret: bytes) -> None:
        """Connect to the engine and serve it."""
        try:
            channel = dial(address, port, secret)
        except (OSError, Unwelcome) as error:
            raise RankFailedError(f"can't connect to {address}:{port}: {error}") from None
        own_address = channel.connection.getsockname()[0]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(own_address))
        channel.send(Attach(rank))
        rank_process.serve(channel)


@dataclass
class _Placed:
    """An actor and what is known of it."""

    handle: Any
    node_id: str
    node: str
    pid: int = 0
    end: Any = None
    """Ray's promise of what `Rank.run` returns, which is never but an error."""


class _Actors:
    """All actors of a fleet by rank, those of a node one after the other, and their placement."""

    def __init__(self, own_cluster: bool) -> None:
        self.placed: list[_Placed] = []
        self._own_cluster = own_cluster
        self._group: PlacementGroup | None = None

    @property
    def ranks(self) -> range:
        return range(len(self.placed))

    def place(self, rank: int) -> str:
        return f" on Ray node {self.placed[rank].node}"

    def place_all(self, bundle: dict[str, int], num_ranks: int) -> None:
        """Have Ray find room for all ranks, and start an actor in each place.

        Raises:
            ConfigError: the cluster has not so much, or it is not free.
        """
        [(kind, amount)] = bundle.items()
        needed = f"{num_ranks} ranks need {amount * num_ranks} {kind}s of the Ray cluster"
        remedy = "lower context_parallel_size" + (" or set device='cpu'" if kind == "GPU" else "")
        if (found := _resources().get(kind, 0)) < amount * num_ranks:
            raise ConfigError(f"{needed}, which has {found:g}; add nodes to it or {remedy}")
        self._group = placement_group([bundle] * num_ranks, strategy="PACK")
        if not self._group.wait(_PLACEMENT_SECONDS):
            free = ray.available_resources().get(kind, 0)
            raise ConfigError(
                f"{needed}, {amount} together for each; of its {found:g}, {free:g} are free; end "
                f"what else runs there or {remedy}"
            )
        places: dict[int, str] = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        own = ray.get_runtime_context().get_node_id()
        for index, node_id in sorted(places.items(), key=lambda item: (item[1] != own, item[1])):
            node = nodes[node_id]
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            self.placed.append(_Placed(self._start(bundle, index), node_id, name))

    def _start(self, bundle: dict[str, int], index: int) -> Any:
        assert self._group is not None
        return (
            ray.remote(Rank)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            )
            .remote()
        )

    def run(self, port: ControlPort, secret: bytes) -> None:
        """Let each actor be its rank, and connect to a port."""
        pids = [actor.handle.pid.remote() for actor in self.placed]
        for rank, actor in enumerate(self.placed):
            actor.end = actor.handle.run.remote(rank, port.address, port.port, secret)
        for actor, pid in zip(self.placed, pids, strict=True):
            with contextlib.suppress(ray.exceptions.RayError):  # `lost` tells of it
                actor.pid = ray.get(pid, timeout=PATIENCE_SECONDS)

    def lost(self) -> LongspanError | None:
        ends = {actor.end: rank for rank, actor in enumerate(self.placed)}
        ended, _ = ray.wait([*ends], num_returns=len(ends), timeout=0)
        for end in ended:
            return self._reason(ends[end])
        return None

    def _reason(self, rank: int) -> LongspanError:
        actor = self.placed[rank]
        name = f"rank {rank}{self.place(rank)} (pid {actor.pid})"
        try:
            ray.get(actor.end)
        except ray.exceptions.RayTaskError as error:
            return RankFailedError(f"{name} failed: {error.cause}")
        except ray.exceptions.RayError as error:
            said = str(error)
            said = said.partition("The actor is dead because ")[2] or said
            return RankFailedError(f"{name} died: {' '.join(said.split())}")
        return RankFailedError(f"{name} ended")

    def stop(self) -> None:
        """End all actors and give back their places; disconnect from Ray if we have connected."""
        if not ray.is_initialized():  # and with it the actors have ended
            return
        for actor in self.placed:
            ray.kill(actor.handle)
        if self._group is not None:
            remove_placement_group(self._group)
        if self._own_cluster:
            ray.shutdown(wait_for_processes=True)


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.cluster_resources()
    return found


def _bundle(config: EngineConfig) -> dict[str, int]:
    """What a rank needs: a GPU, or as many CPUs as it is to have threads."""
    if config.device == "cuda":
        return {"GPU": 1}
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads):
        return {"CPU": int(threads)}
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return {"CPU": cpus_each(cpus, config.num_ranks)}


def cpus_each(cpus: Sequence[int], num_ranks: int) -> int:
    """The most CPUs that each rank can have on nodes with so many; 1 if there are too few."""
    most = max(cpus, default=1)
    fitting = (n for n in range(most, 0, -1) if sum(each // n for each in cpus) >= num_ranks)
    return next(fitting, 1)


def _connect(num_ranks: int) -> bool:
    """Connect to a Ray cluster, if that has not been done. Returns whether it was done here.

    Raises:
        ConfigError: nobody listens at RAY_ADDRESS, or it is for Ray's client only.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "auto")
    _check_reachable(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _quiet():
        if address != "local":
            with contextlib.suppress(ConnectionError):  # then there is none on this host
                ray.init(address=address, **options)
                return True
        # CPUs only count places here: ranks may share them, as processes do.
        cpus = max(os.cpu_count() or 1, num_ranks)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    return True


def _check_reachable(address: str) -> None:
    """Ray itself was still trying after seven minutes."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address} is for programs outside the cluster; run this on one of its "
            "nodes, with RAY_ADDRESS=HOST:PORT of its head or without"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ConfigError(
                f"RAY_ADDRESS={address}: {error.strerror or error}; give the HOST:PORT that "
                "`ray start --head` printed, or unset it"
            ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Ray says of its start."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
