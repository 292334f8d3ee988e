"""Real processes with gloo and MPI: attention over all ranks' keys is attention on one process.

Four processes start once for the whole file; two and three ranks are groups of theirs.
"""

import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, get_args

import pytest
import torch
import torch.distributed as dist
from fleet import SHARED, Request, Shape, assert_close, assert_expected, attend, layer_of, run_fleet
from torch import Tensor

from longspan.attention.state import AttentionState
from longspan.engine.shard import zigzag
from longspan.ops import Strategy as Travelling
from longspan.ops import attention, context_parallel_attention
from longspan.parallel import mpi_transport
from longspan.parallel.mpi_transport import MPI, MPITransport
from longspan.parallel.staged_transport import StagedTransport
from longspan.parallel.strategies import STRATEGIES, finish
from longspan.parallel.transport import TorchTransport, Transport
from longspan.plan import Run, Strategy, Traffic
from longspan.topology import Topology
from longspan.worker import mpi

torch.set_num_threads(1)

WORLD_SIZE = 4
MEMBERS = {2: (1, 3), 3: (1, 2, 3), 4: None}
"""The processes that make a group of so many ranks; None for the whole world."""
PATIENCE_S = 60.0

Result = TypeVar("Result")
Answer = tuple[Any, Exception | None]

each_size = pytest.mark.parametrize("size", [2, 3, 4])
each_backend = pytest.mark.parametrize("backend", ["gloo", "mpi"])
each_strategy = pytest.mark.parametrize("strategy", get_args(Travelling))


def serve(rank: int, size: int, store: str, connection: Connection) -> None:
    """One rank of a world: runs what it is sent and sends back the result or the error."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mpi.join(rank, Topology.of_hosts([size]), dist.FileStore(f"{store}-mpi", size))
    while True:
        work = pickle.loads(connection.recv_bytes())
        try:
            answer: Answer = work(), None
        except Exception as error:
            answer = None, error
        connection.send_bytes(pickle.dumps(answer))


class World:
    """The processes of a gloo group and an MPI world; they stay, since they start slowly."""

    def __init__(self, size: int, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.size = size
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, str(store), there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` returns on each rank; or the first rank's error."""
        for connection in self._connections:
            connection.send_bytes(pickle.dumps(work))
        answers = [self._answer(rank) for rank in range(self.size)]
        errors = [error for _, error in answers if error is not None]
        if errors:  # a rank that hears nothing is the consequence of another's error
            raise min(errors, key=lambda error: isinstance(error, TimeoutError))
        return [result for result, _ in answers]

    def _answer(self, rank: int) -> Answer:
        if not self._connections[rank].poll(PATIENCE_S):
            self.kill()
            return None, TimeoutError(f"rank {rank} did not answer within {PATIENCE_S:.0f} s")
        try:
            answer: Answer = pickle.loads(self._connections[rank].recv_bytes())
        except EOFError:
            return None, TimeoutError(f"rank {rank} is dead")
        return answer

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(WORLD_SIZE, tmp_path_factory.mktemp("world") / "store")
    yield world
    world.kill()


@cache
def group_of(size: int) -> dist.ProcessGroup | None:
    """Made once on each process, by all of them together; None stands for the world."""
    return None if MEMBERS[size] is None else dist.new_group(MEMBERS[size])


def in_group(size: int, work: Callable[[dist.ProcessGroup | None], Result]) -> Result | None:
    """What `work` returns on the ranks of a group; None on the others."""
    group = group_of(size)
    return work(group) if dist.get_rank(group) >= 0 else None


@cache
def communicator_of(ranks: tuple[int, ...]) -> MPI.Intracomm:
    """Made by all processes of a group together."""
    return MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.group.Incl(ranks))


def transport_of(
    backend: str, group: dist.ProcessGroup | None, topology: Topology | None = None
) -> Transport:
    if backend == "gloo":
        return TorchTransport(group, topology)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    return MPITransport(communicator_of(tuple(ranks)), topology)


def run_group(
    world: World, size: int, work: Callable[[dist.ProcessGroup | None], Result]
) -> list[Result]:
    """What `work` returns on each rank of a group."""
    results = world.run(partial(in_group, size, work))
    return [result for result in results if result is not None]


@dataclass(frozen=True)
class Layout:
    """The positions of each rank's queries and keys in one sequence."""

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    by_default: bool = False
    """Whether the ranks need not say so."""


UNEVEN = {2: (0, 41), 3: (29, 0, 12), 4: (5, 20, 0, 16)}
"""Shares of 41 tokens, one of them empty."""
LAST = {2: (5, 7), 3: (5, 0, 7), 4: (0, 5, 3, 4)}
"""Shares of the last 12 of them."""

LAYOUTS = [
    "in rank order by default",
    "queries and keys cut apart by default",
    "queries of the last tokens by default",
    "zigzag",
    "striped",
    "unsorted keys and positions with gaps",
    "one query over everything",
]


def layout_of(name: str, size: int) -> Layout:
    line = range(41)
    shares, other_shares = UNEVEN[size], UNEVEN[size][::-1]
    in_order = cut(line, shares)
    if name == "in rank order by default":
        return Layout(in_order, in_order, by_default=True)
    if name == "queries and keys cut apart by default":
        return Layout(in_order, cut(line, other_shares), by_default=True)
    if name == "queries of the last tokens by default":
        return Layout(cut(line[-12:], LAST[size]), in_order, by_default=True)
    if name == "zigzag":
        turned = tuple(
            tuple(position for run in runs for position in range(run.start, run.end))
            for runs in zigzag(shares)
        )
        return Layout(turned, turned)
    if name == "striped":
        stripes = tuple(tuple(range(rank, 41, size)) for rank in range(size))
        return Layout(stripes, stripes)
    if name == "unsorted keys and positions with gaps":
        shuffled = torch.randperm(41, generator=torch.Generator().manual_seed(size)) * 3
        return Layout(cut(range(1, 123, 3), shares), cut(shuffled.tolist(), other_shares))
    assert name == "one query over everything"
    return Layout(cut([40], [0] * (size - 1) + [1]), in_order)


def cut(positions: Sequence[int], shares: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    parts = torch.split(torch.tensor(positions), list(shares))
    return tuple(tuple(part.tolist()) for part in parts)


def by_position(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of every position of a sequence."""
    generator = torch.Generator().manual_seed(shape.heads)
    q = torch.randn(128, shape.heads, shape.head_dim, generator=generator)
    k, v = torch.randn(2, 128, shape.kv_heads, shape.head_dim, generator=generator)
    return q.to(shape.dtype), k.to(shape.dtype), v.to(shape.dtype)


def on_this_rank(
    layout: Layout,
    shape: Shape,
    strategy: Travelling,
    causal: bool,
    group: dist.ProcessGroup | None,
) -> AttentionState:
    rank = dist.get_rank(group)
    at_q, at_kv = list(layout.queries[rank]), list(layout.keys[rank])
    q, k, v = by_position(shape)
    given = not layout.by_default
    return context_parallel_attention(
        q[at_q],
        k[at_kv],
        v[at_kv],
        group=group,
        strategy=strategy,
        causal=causal,
        q_positions=torch.tensor(at_q).long() if given else None,
        kv_positions=torch.tensor(at_kv).long() if given else None,
    )


def on_one_process(layout: Layout, shape: Shape, causal: bool) -> list[AttentionState]:
    """The state of each rank's queries over all ranks' keys."""
    q, k, v = by_position(shape)
    at_kv = torch.tensor([position for positions in layout.keys for position in positions])
    return [
        attention(
            q[at_q],
            k[at_kv],
            v[at_kv],
            causal=causal,
            q_positions=at_q,
            kv_positions=at_kv,
        )
        for at_q in (torch.tensor(positions).long() for positions in layout.queries)
    ]


def assert_group_agrees(
    world: World, layout: Layout, shape: Shape, strategy: Travelling, causal: bool = True
) -> None:
    work = partial(on_this_rank, layout, shape, strategy, causal)
    states = run_group(world, len(layout.queries), work)
    for state, expected in zip(states, on_one_process(layout, shape, causal), strict=True):
        assert_close(state, expected, shape.dtype)


@each_strategy
@each_size
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_attention_on_one_process(
    world: World, name: str, causal: bool, size: int, strategy: Travelling
) -> None:
    assert_group_agrees(world, layout_of(name, size), Shape(), strategy, causal)


@each_strategy
@each_size
@pytest.mark.parametrize(
    "shape",
    [Shape(32, 8, 128), Shape(14, 2, 64), Shape(8, 1, 80), Shape(dtype=torch.bfloat16)],
    ids=lambda shape: f"{shape.heads}_{shape.kv_heads}_{shape.head_dim}_{shape.dtype}",
)
def test_any_heads_and_types(world: World, shape: Shape, size: int, strategy: Travelling) -> None:
    assert_group_agrees(world, layout_of("zigzag", size), shape, strategy)


@each_strategy
def test_a_process_outside_the_group_takes_no_part(world: World, strategy: Travelling) -> None:
    work = partial(on_this_rank, layout_of("zigzag", 3), Shape(), strategy, True)
    states = world.run(partial(in_group, 3, work))
    assert [state is None for state in states] == [True, False, False, False]


SPREAD = ((Run(0, 8), Run(20, 4)), (Run(8, 12),), ())
REQUESTS = [
    Request(ranks=(0, 1, 2), cached=(50, 3, 11), queries=SPREAD, keys=SPREAD),
    Request(ranks=(0, 2), cached=(0, 33), queries=((Run(0, 1),), ()), keys=((Run(0, 1),), ())),
]


def started_together(
    backend: str, topology: Topology, group: dist.ProcessGroup | None
) -> tuple[list[AttentionState], dict[str, Traffic]]:
    """Every strategy starts before any ends."""
    transport = transport_of(backend, group, topology)
    jobs = [STRATEGIES[s](layer_of(REQUESTS, s, transport, Shape())) for s in SHARED]
    for job in jobs:
        next(job)
    return [state for job in jobs for state in finish(job)], transport.take_traffic()


@each_backend
@pytest.mark.parametrize("hosts", [(3,), (2, 1), (1, 2), (1, 1, 1)], ids=str)
def test_exchanges_under_way_at_once_and_their_traffic_are_those_of_threads(
    world: World, hosts: Sequence[int], backend: str
) -> None:
    topology = Topology.of_hosts(hosts)
    together = partial(started_together, backend, topology)
    by_rank, traffic_by_rank = zip(*run_group(world, sum(hosts), together), strict=True)
    for index, states in enumerate(zip(*by_rank, strict=True)):
        assert_expected(REQUESTS[index % 2], states, Shape())
    for strategy in SHARED:
        of_threads = run_fleet(topology, partial(traffic_of_attention, strategy))
        assert [traffic[strategy] for traffic in traffic_by_rank] == of_threads


def traffic_of_attention(strategy: Strategy, transport: Transport) -> Traffic:
    attend(REQUESTS, strategy, transport, Shape())
    return transport.take_traffic()[strategy]


def staged(group: dist.ProcessGroup | None) -> list[list[AttentionState]]:
    transport = StagedTransport(group)
    return [attend(REQUESTS, strategy, transport, Shape()) for strategy in SHARED]


def test_messages_that_are_copied_first_arrive_as_others_do(world: World) -> None:
    """As ranks that share a GPU send them; here the copies are from the host's memory to itself."""
    for states_by_rank in zip(*run_group(world, 3, staged), strict=True):
        for request, states in zip(REQUESTS, zip(*states_by_rank, strict=True), strict=True):
            assert_expected(request, states, Shape())


def waited_for_backwards(backend: str, group: dist.ProcessGroup | None) -> list[float]:
    transport = transport_of(backend, group)
    after, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    received = torch.zeros(3)
    waits = [
        transport.exchange(
            "ring",
            [(after, torch.tensor([10.0 * transport.rank + number]))],
            [(before, received[number : number + 1])],
        )
        for number in range(3)
    ]
    for wait in reversed(waits):
        wait()
    return received.tolist()


@each_backend
@each_size
def test_receives_fill_in_the_order_in_which_they_start_whichever_is_waited_for_first(
    world: World, size: int, backend: str
) -> None:
    backwards = partial(waited_for_backwards, backend)
    for rank, numbers in enumerate(run_group(world, size, backwards)):
        before = 10.0 * ((rank - 1) % size)
        assert numbers == [before, before + 1, before + 2]


MESSAGES = [
    torch.arange(5, dtype=torch.int64),
    torch.empty(0, 4),
    torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    torch.tensor(True),
    torch.arange(100_000, dtype=torch.int32).to(torch.float64).view(10, -1),
    torch.arange(-100, 101, dtype=torch.int8),
]


def passed_round(
    backend: str, max_bytes: int, group: dist.ProcessGroup | None
) -> list[tuple[bool, int]]:
    """Whether messages from the rank before came as they were sent, and how many were counted."""
    transport = transport_of(backend, group)
    after, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    rooms = [torch.zeros_like(message) for message in MESSAGES]
    usual, mpi_transport.MAX_BYTES = mpi_transport.MAX_BYTES, max_bytes
    wait = transport.exchange("x", [(after, m) for m in MESSAGES], [(before, r) for r in rooms])
    mpi_transport.MAX_BYTES = usual
    wait()
    count = transport.take_traffic()["x"].messages
    return [(torch.equal(*pair), count) for pair in zip(rooms, MESSAGES, strict=True)]


@each_backend
@each_size
@pytest.mark.parametrize("max_bytes", [1 << 30, 4096])
def test_messages_of_any_type_and_size_come_as_they_are(
    world: World, size: int, backend: str, max_bytes: int
) -> None:
    """Also when each is sent in several pieces; an empty one is not sent."""
    work = partial(passed_round, backend, max_bytes)
    assert run_group(world, size, work) == [[(True, len(MESSAGES) - 1)] * len(MESSAGES)] * size


def used_by_waiting(group: dist.ProcessGroup | None) -> float:
    """The part of a core that a rank uses while it waits for rank 0, which sleeps."""
    transport = transport_of("mpi", group)
    message = torch.zeros(1)
    if transport.rank == 0:
        time.sleep(1)
        transport.exchange("x", [(rank, message) for rank in range(1, transport.size)], [])()
        return 0.0
    begun, used = time.monotonic(), time.process_time()
    transport.exchange("x", [], [(0, message)])()
    return (time.process_time() - used) / (time.monotonic() - begun)


def test_ranks_that_wait_for_mpi_leave_their_cores_to_others(world: World) -> None:
    assert max(run_group(world, 4, used_by_waiting)) < 0.4


def names_of_shared_memory() -> list[str]:
    return re.findall(r"/dev/shm/mpich_.*", Path("/proc/self/maps").read_text())


def test_what_ranks_share_over_mpi_has_no_name_that_could_stay(world: World) -> None:
    for names in world.run(names_of_shared_memory):
        assert names
        assert all(name.endswith("(deleted)") for name in names)


def test_mpi_is_for_ranks_of_one_host() -> None:
    assert "2 hosts" in mpi.obstacle(Topology.of_hosts([1, 1]))


def one_position_twice(strategy: Travelling) -> None:
    q, k, v = (x[:4] for x in by_position(Shape()))
    context_parallel_attention(q, k, v, strategy=strategy, kv_positions=torch.tensor([0, 1, 2, 1]))


@each_strategy
def test_a_position_twice_is_refused_and_the_ranks_live_on(
    world: World, strategy: Travelling
) -> None:
    with pytest.raises(ValueError, match=r"kv_positions .* twice"):
        world.run(partial(one_position_twice, strategy))
    assert_group_agrees(world, layout_of("zigzag", WORLD_SIZE), Shape(), strategy)


def refusal_of_a_position_on_two_ranks(strategy: Travelling) -> str:
    q, k, v = (x[:4] for x in by_position(Shape()))
    positions = torch.arange(4) + 3 * dist.get_rank()
    try:
        context_parallel_attention(q, k, v, strategy=strategy, kv_positions=positions)
    except ValueError as error:
        return str(error)
    return "nothing"


@each_strategy
def test_a_position_on_two_ranks_is_refused_by_all(world: World, strategy: Travelling) -> None:
    for refusal in world.run(partial(refusal_of_a_position_on_two_ranks, strategy)):
        assert "kv_positions" in refusal


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown strategy": ({"strategy": "ring"}, r"strategy='ring' .*gather_kv.*pass_kv.*pass_q"),
    "a strategy for several hosts": ({"strategy": "tree"}, r"strategy='tree' must be one of"),
    "the strategy of one rank": ({"strategy": "local"}, "strategy='local'"),
    "q of 2 dimensions": ({"q": torch.ones(5, 64)}, r"q \[5, 64\] must be \[T, H, D\]"),
    "v shorter than k": ({"v": torch.ones(8, 2, 64)}, r"v \[8, 2, 64\]"),
    "heads that don't divide": ({"q": torch.ones(5, 3, 64)}, "multiple of key heads"),
    "types that differ": ({"k": torch.ones(9, 2, 64).half()}, r"k \(torch.float16\)"),
    "too few q_positions": ({"q_positions": torch.arange(4)}, r"q_positions \[4\] must be \[5\]"),
    "too many kv_positions": ({"kv_positions": torch.arange(10)}, r"kv_positions \[10\]"),
}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """This process as a group of one."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    changed, message = WRONG[name]
    fitting = {"q": torch.ones(5, 4, 64), "k": torch.ones(9, 2, 64), "v": torch.ones(9, 2, 64)}
    with pytest.raises(ValueError, match=message):
        context_parallel_attention(**(fitting | changed))
