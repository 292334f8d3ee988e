"""What an exchange between ranks of this host takes over gloo and over MPI.

Real processes of one thread each. `hop`: so many bytes to the next rank of a ring and as many
from the one before; `all`: to and from every other rank. `beside`: a hop of 8 MB while the rank
multiplies matrices for about as long; `saved` is the part of the shorter one that was saved.
`late`: all ranks wait for 64 bytes from rank 0, which sleeps first: how late they have them, and
how much of a core each uses while it waits. `steps`: like decoding, half a millisecond of matrix
products and 4 KiB to every other rank, over and over; meanwhile this process asks another, over a
pipe, and waits for its answer, as the engine and its client would: `ask` is how long that takes,
also where ranks are more than cores.

Both fleets run all the time and take turns, `--turns` times; one that has no turn sleeps. Figures
are medians over all turns (hops: of rank 0's times); `worst` is the 0.99 quantile. The ceiling of a
large message is a copy in memory, which all ranks make at once. The last line is one JSON document.

    python benchmarks/transport.py [--ranks 2 3 4] [--turns 5] [--output FILE]
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from common import finish, print_table, quantile
from fleets import Ranks

from longspan.parallel.transport import Transport

BACKENDS = ("gloo", "mpi")
SIZES = (64, 1 << 10, 16 << 10, 256 << 10, 1 << 20, 8 << 20, 64 << 20)
SMALL = SIZES[:4]
BESIDE = 8 << 20
DELAYS = (0.0005, 0.005, 0.05)
"""Seconds that a message comes late."""
STEPS = 300
TURN_BYTES = 1 << 28
"""Bytes of a turn of messages of one size."""

Row = dict[str, Any]


def seconds_of(work: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return seconds


def exchanging(transport: Transport, kind: str, size: int) -> Callable[[], Callable[[], None]]:
    rank, ranks = transport.rank, transport.size
    others = [other for other in range(ranks) if other != rank]
    to, of = ([(rank + 1) % ranks], [(rank - 1) % ranks]) if kind == "hop" else (others, others)
    sent = torch.ones(size, dtype=torch.uint8)
    sends = [(peer, sent) for peer in to]
    receives = [(peer, torch.zeros_like(sent)) for peer in of]
    return lambda: transport.exchange("benchmark", sends, receives)


def exchanges(transport: Transport, kind: str, size: int, repeats: int) -> list[float]:
    """Seconds of each of some exchanges in a row."""
    start = exchanging(transport, kind, size)
    return seconds_of(lambda: start()(), repeats + 1)[1:]


def copies(_: Transport, size: int, repeats: int) -> list[float]:
    """Seconds of copies in memory by all ranks at once."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return seconds_of(lambda: target.copy_(source), repeats + 1)[1:]


def beside(transport: Transport, repeats: int) -> tuple[float, float, float]:
    """Median seconds of a large hop, of as much work, and of both at once."""
    start, meet = exchanging(transport, "hop", BESIDE), exchanging(transport, "all", 1)
    one = torch.ones(256, 256)

    def timed(exchange: bool, products: int) -> float:
        seconds = []
        for _ in range(repeats + 1):
            meet()()
            begun = time.perf_counter()
            wait = start() if exchange else lambda: None
            for _ in range(products):
                one @ one
            wait()
            seconds.append(time.perf_counter() - begun)
        return median(seconds[1:])

    hop = timed(True, 0)
    products = max(round(hop / timed(False, 20) * 20), 1)
    agreed = torch.tensor([products])
    shared = [(peer, agreed) for peer in range(1, transport.size)] if transport.rank == 0 else []
    transport.exchange("agree", shared, [(0, agreed)] if transport.rank else [])()
    return hop, timed(False, int(agreed)), timed(True, int(agreed))


def late(transport: Transport, late_seconds: float, repeats: int) -> list[tuple[float, float]]:
    """How late each message of rank 0's came, and the part of a core used to wait for it."""
    others = range(1, transport.size)
    sent = torch.zeros(8, dtype=torch.float64)
    meet = exchanging(transport, "all", 1)
    found = []
    for _ in range(repeats):
        meet()()
        if transport.rank == 0:
            time.sleep(late_seconds)
            sent[0] = time.monotonic()
            transport.exchange("late", [(peer, sent) for peer in others], [])()
        else:
            begun, used = time.monotonic(), time.process_time()
            transport.exchange("late", [], [(0, sent)])()
            came = time.monotonic()
            found.append((came - sent[0].item(), (time.process_time() - used) / (came - begun)))
    return found


def steps(transport: Transport, repeats: int) -> list[float]:
    """Seconds of each of some steps like those of decoding."""
    start = exchanging(transport, "all", 4096)
    vector, matrix = torch.ones(1, 1024), torch.ones(1024, 1024)

    def step() -> None:
        vector @ matrix
        start()()

    return seconds_of(step, repeats)


def echo(connection: Connection) -> None:
    while True:
        connection.send_bytes(connection.recv_bytes())


class Echo:
    """A process that answers at once, if it is let."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=echo, args=[theirs], daemon=True)
        self._process.start()
        self.ask()

    def ask(self) -> float:
        """Seconds until the answer."""
        begun = time.perf_counter()
        self._connection.send_bytes(b"?")
        self._connection.recv_bytes()
        return time.perf_counter() - begun

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def steps_and_asks(ranks: Ranks, other: Echo) -> tuple[list[float], list[float]]:
    """Seconds of steps, and of answers of another process meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        at_work = thread.submit(ranks.run, steps, STEPS)
        asks = []
        while not at_work.done():
            asks.append(other.ask())
            time.sleep(2e-3)
        return at_work.result()[0], asks


def repeats_of(size: int) -> int:
    return max(min(200, TURN_BYTES // size), 3)


def turn(ranks: Ranks, other: Echo) -> dict[tuple[str, float], dict[str, list[float]]]:
    """All figures of a fleet, once, by kind and size or delay."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for kind, sizes in (("hop", SIZES), ("all", SMALL)):
        for size in sizes:
            [first, *_] = ranks.run(exchanges, kind, size, repeats_of(size))
            found[kind, size] = {"us": first}
    hop, work, both = ranks.run(beside, 5)[0]
    saved = (hop + work - both) / min(hop, work)
    found["beside", BESIDE] = {"us": [both], "alone": [hop], "saved": [saved]}
    for delay in DELAYS:
        [_, *waiting] = ranks.run(late, delay, round(max(0.3 / (delay + 0.003), 5)))
        each = [one for rank in waiting for one in rank]
        found["late", delay] = {
            "us": [late for late, _ in each],
            "cores": [used for _, used in each],
        }
    durations, asks = steps_and_asks(ranks, other)
    found["steps", 4096] = {"us": durations, "ask": asks}
    return found


def measure(size: int, turns: int) -> list[Row]:
    samples: dict[tuple[str, float], dict[str, dict[str, list[float]]]] = {}
    other = Echo()
    with Ranks([size], backend="gloo") as gloo, Ranks([size], backend="mpi") as mpi:
        for number in range(turns + 1):
            for backend, ranks in (("gloo", gloo), ("mpi", mpi)):
                for key, figures in turn(ranks, other).items():
                    of_key = samples.setdefault(key, {}).setdefault(backend, {})
                    for name, values in figures.items():
                        of_key.setdefault(name, []).extend(values if number else [])
        for nbytes in SIZES[-3:]:
            [copied, *_] = gloo.run(copies, nbytes, repeats_of(nbytes))
            samples["hop", nbytes]["copy"] = {"us": copied}
    other.close()
    return [row_of(size, kind, amount, by) for (kind, amount), by in samples.items()]


def row_of(size: int, kind: str, amount: float, by: dict[str, dict[str, list[float]]]) -> Row:
    """One row of the table; times in microseconds."""
    row: Row = {"kind": kind, "ranks": size, "bytes or s": amount}
    for backend in BACKENDS:
        figures = by[backend]
        row[f"{backend} us"] = 1e6 * median(figures["us"])
        row[f"{backend} worst"] = 1e6 * quantile(figures["us"], 0.99)
        for name in figures.keys() - {"us"}:
            scale = 1e6 if name in ("ask", "alone") else 1
            row[f"{backend} {name}"] = scale * median(figures[name])
            if name == "ask":
                row[f"{backend} ask worst"] = scale * quantile(figures[name], 0.99)
    row["times"] = row["gloo us"] / row["mpi us"]
    if kind == "hop" and amount >= 1 << 20:
        row |= {f"{backend} GB/s": amount / row[f"{backend} us"] / 1e3 for backend in BACKENDS}
    if "copy" in by:
        row["copy GB/s"] = amount / median(by["copy"]["us"]) / 1e9
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output")
    options = parser.parse_args()
    rows = []
    for size in options.ranks:
        found = measure(size, options.turns)
        for kind in dict.fromkeys(row["kind"] for row in found):
            print_table([row for row in found if row["kind"] == kind])
        rows += found
    finish("transport", rows, options.output)


if __name__ == "__main__":
    main()
