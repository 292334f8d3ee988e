"""Ranks in this process: one for short contexts and small machines, several for tests."""

from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from transformers.utils import logging

from longspan.config import EngineConfig
from longspan.cost.samples import Samples
from longspan.errors import EngineStoppedError, RankFailedError
from longspan.models import ModelSpec
from longspan.parallel.transport import ThreadTransport
from longspan.plan import RankPlan, RankResult
from longspan.topology import Topology
from longspan.worker.launch import device_of, kind_of_device, rates_of
from longspan.worker.measure import measure
from longspan.worker.model_runner import ModelRunner


class InProcessExecutor:
    """Runs each rank in a thread of its own, a single rank in the caller's, when it waits.

    `topology` places the ranks on hosts, of which each is but a part of this one: their strategies
    are then those of several. By default it is one host.
    """

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, topology: Topology | None = None
    ) -> None:
        on_cpu = kind_of_device(config.device) == "cpu"
        self.topology = topology or Topology.of_hosts([config.num_ranks], shared_device=on_cpu)
        assert self.topology.num_ranks == config.num_ranks, (topology, config.num_ranks)
        self._transports = ThreadTransport.connect(self.topology)
        self._threads = ThreadPoolExecutor(config.num_ranks, thread_name_prefix="longspan-rank")
        self._at_work: dict[Future[RankResult], int] = {}
        self._plan_of_single: RankPlan | None = None
        self._closed = False
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self._runners = [
                ModelRunner(config, spec, transport, device_of(config, self.topology, rank))
                for rank, transport in enumerate(self._transports)
            ]
        finally:
            if bars:
                logging.enable_progress_bar()
        self.num_pages = tuple(runner.pool.num_pages for runner in self._runners)
        self.joins = False  # a thread that waits for one that failed could not be ended
        self.queues = False
        self.rates = rates_of(self._runners[0].device, self._runners[0].dtype)

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        """Begin a step on ranks that are not at work.

        Raises:
            EngineStoppedError: the fleet has been stopped before.
        """
        if self._closed:
            raise EngineStoppedError("the engine has been closed; make a new one")
        for rank, plan in plans.items():
            if len(self._runners) == 1:
                self._plan_of_single = plan
            else:
                future = self._threads.submit(self._runners[rank].execute, plan)
                self._at_work[future] = rank

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        """Results of the ranks that are done, at least of one, or none after `timeout` seconds.

        A single rank takes the time that it needs.

        Raises:
            RankFailedError: a rank raised; the fleet has been stopped.
        """
        try:
            if self._plan_of_single is not None:
                plan, self._plan_of_single = self._plan_of_single, None
                return {0: _result(0, partial(self._runners[0].execute, plan))}
            done = futures.wait(self._at_work, timeout, futures.FIRST_COMPLETED).done
            return {
                rank: _result(rank, future.result)
                for rank, future in [(self._at_work.pop(future), future) for future in done]
            }
        except BaseException:  # also Ctrl-C: ranks in the middle of a step can't be used again
            self.close()
            raise

    def measure(self) -> list[Samples]:
        """What each rank measures of itself, all at the same time; before any plan."""
        return list(self._threads.map(measure, self._runners))

    def close(self) -> None:
        self._closed = True
        self._transports[0].stop()
        self._threads.shutdown(wait=True)
        self._at_work.clear()
        self._plan_of_single = None
        self._runners = []


def _result(rank: int, result: Callable[[], RankResult]) -> RankResult:
    try:
        return result()
    except Exception as error:
        raise RankFailedError(f"rank {rank} failed: {error}") from error
