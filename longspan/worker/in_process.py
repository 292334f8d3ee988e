"""Ranks in this process: one for short contexts and small machines, several for tests."""

from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from transformers.utils import logging

from longspan.config import EngineConfig
from longspan.errors import EngineStoppedError, RankFailedError
from longspan.models import ModelSpec
from longspan.parallel.transport import ThreadTransport
from longspan.plan import RankPlan, RankResult
from longspan.worker.launch import device_of
from longspan.worker.model_runner import ModelRunner


class InProcessExecutor:
    """Runs each rank in a thread of its own, a single rank in the caller's."""

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        self._transports = ThreadTransport.connect(config.num_ranks)
        self._threads = ThreadPoolExecutor(config.num_ranks, thread_name_prefix="longspan-rank")
        self._closed = False
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self._runners = [
                ModelRunner(config, spec, transport, device_of(config, transport.rank))
                for transport in self._transports
            ]
        finally:
            if bars:
                logging.enable_progress_bar()
        self.num_pages = tuple(runner.pool.num_pages for runner in self._runners)

    def execute(self, plans: Mapping[int, RankPlan]) -> dict[int, RankResult]:
        if self._closed:
            raise EngineStoppedError("the engine has been closed; make a new one")
        if len(plans) == 1:
            return {rank: self._runners[rank].execute(plan) for rank, plan in plans.items()}
        return self._together(plans)

    def close(self) -> None:
        self._closed = True
        self._transports[0].stop()
        self._threads.shutdown(wait=True)
        self._runners = []

    def _together(self, plans: Mapping[int, RankPlan]) -> dict[int, RankResult]:
        futures = {
            self._threads.submit(self._runners[rank].execute, plan): rank
            for rank, plan in plans.items()
        }
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            if error := future.exception():
                self.close()
                raise RankFailedError(f"rank {futures[future]} failed: {error}") from error
        return {rank: future.result() for future, rank in futures.items()}
