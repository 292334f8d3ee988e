"""What an engine would do with a trace: its own scheduler and ledger, in predicted time.

Nothing is computed and nothing waits: a clock of its own jumps from the end of one step to that
of the next. So hundreds of ranks and hours of traffic take seconds, on any machine.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from longspan.config import EngineConfig
from longspan.cost.calibration import Calibration
from longspan.cost.model import CostModel
from longspan.cost.rates import CUDA, Rates
from longspan.cost.trace import Arrival, Trace
from longspan.cost.virtual import Plans, VirtualExecutor
from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, InvalidRequestError
from longspan.plan import Sampling
from longspan.sampling_params import SamplingParams
from longspan.topology import Topology

if TYPE_CHECKING:
    from longspan.models import ModelSpec

END_ID = 0
"""The token that ends a simulated output before its `max_tokens`; no other one draws it."""


class RequestFigures(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one arrival. Times are in seconds, `finish` like `arrival` on the clock.

    `ttft`, `tpot` (None for fewer than two tokens) and `cached_tokens` are those of the first of
    `n` sequences, `output_tokens` and `preemptions` of all. `degree` is the most ranks that held
    keys of one sequence at the same time. A request that was refused has an `error` instead.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int = 0
    ttft: float | None = None
    tpot: float | None = None
    finish: float | None = None
    degree: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    error: str | None = None


class RankFigures(msgspec.Struct, frozen=True):
    """One rank: seconds with work of its own, and their part of the whole time; pages at most."""

    busy_seconds: float
    use: float
    peak_pages: int
    num_pages: int


class SimulationResult(msgspec.Struct, frozen=True):
    """What a simulated engine did: with each arrival in order, and on each rank.

    `seconds` is the time of the last end, `prompt_tokens` and `output_tokens` count those of
    requests that were served, `tokens_per_second` both together.
    """

    seconds: float
    num_steps: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    requests: list[RequestFigures]
    ranks: list[RankFigures]

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


def percentile(values: Iterable[float | None], percent: float) -> float | None:
    """The value that so many percent of those known are not above; None if none is known.

    Between two values it is interpolated.
    """
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    place = (len(known) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(known) - 1)
    return known[low] + (known[high] - known[low]) * (place - low)


def simulate(
    trace: Trace,
    config: EngineConfig,
    spec: "ModelSpec",
    num_pages: Sequence[int],
    rates: Rates | None = None,
    topology: Topology | None = None,
) -> SimulationResult:
    """Serve a trace with ranks that have so many pages each, in predicted time.

    Ranks do what `rates` say, or the config's calibration, or the guesses for a GPU; they are on
    one host unless a topology says otherwise.
    Requests that can't be served are reported with their error.

    Raises:
        ConfigError: `num_pages` are not as many as the config has ranks.
    """
    if len(num_pages) != config.num_ranks:
        raise ConfigError(
            f"num_pages names {len(num_pages)} ranks; context_parallel_size={config.num_ranks}"
        )
    if rates is None:
        rates = CUDA if config.calibration is None else Calibration.load(config.calibration).rates
    cost = CostModel.of(spec, rates, topology or Topology.of_hosts([config.num_ranks]))
    return _Simulation(trace, config, spec, num_pages, cost).run()


class _Simulation:
    """One run: an engine, and what is written down of it."""

    def __init__(
        self,
        trace: Trace,
        config: EngineConfig,
        spec: "ModelSpec",
        num_pages: Sequence[int],
        cost: CostModel,
    ) -> None:
        self._trace = trace
        self._vocab_size = spec.vocab_size
        self._executor = VirtualExecutor(
            num_pages,
            config.page_size,
            cost,
            token_of=self._token_of,
            on_start=self._watch,
            queues=config.num_ranks > 1,
        )
        self._engine = Engine(config, spec, self._executor, clock=self._executor.clock)
        self._figures: dict[int, RequestFigures] = {}
        self._last_position: dict[str, int] = {}
        """Where the end token is drawn for requests that end before their `max_tokens`."""
        self._degrees: dict[str, int] = {}
        """The most holders of sequences that had more than one."""
        self._peak_pages = [0] * len(num_pages)

    def run(self) -> SimulationResult:
        engine, executor, arrivals = self._engine, self._executor, self._trace.arrivals
        come = 0
        while come < len(arrivals) or engine.has_requests:
            while come < len(arrivals) and arrivals[come].time <= executor.time:
                self._add(come)
                come += 1
            until = arrivals[come].time if come < len(arrivals) else None
            if engine.has_requests:
                self._step(None if until is None else until - executor.time)
            elif until is not None:
                executor.time = until
        return self._result()

    def _step(self, timeout: float | None) -> None:
        executor = self._executor
        at_work, started = executor.at_work, executor.num_steps
        for group in self._engine.step(timeout):
            if group.finished:
                self._finish(group)
        assert at_work or executor.num_steps > started, "requests wait though no rank is at work"

    def _add(self, index: int) -> None:
        arrival = self._trace.arrivals[index]
        prompt = self._trace.prompt(index, self._vocab_size)
        try:
            self._engine.add_request(
                prompt, _params(arrival), request_id=str(index), priority=arrival.priority
            )
        except InvalidRequestError as error:
            self._figures[index] = RequestFigures(arrival.time, len(prompt), error=str(error))
            return
        if arrival.max_tokens is not None:
            self._last_position[str(index)] = len(prompt) + arrival.output_tokens - 1

    def _token_of(self, sampling: Sampling) -> int:
        if self._last_position:
            name = sampling.request_id.rpartition("/")[0]
            if sampling.position == self._last_position.get(name):
                return END_ID
        # Of each sequence another one, so that none finds another's output in the prefix cache.
        return 1 + sampling.seed % max(self._vocab_size - 1, 1)

    def _watch(self, plans: Plans) -> None:
        for rank, plan in plans.items():
            used = self._engine.ledger.num_used(rank)
            if used > self._peak_pages[rank]:
                self._peak_pages[rank] = used
            for part in plan.parts:
                holders = len(part.segment.shards)
                if holders > 1:
                    name = part.segment.request_id
                    self._degrees[name] = max(holders, self._degrees.get(name, 1))

    def _finish(self, group: Group) -> None:
        index, first = int(group.request_id), group.requests[0].metrics
        self._last_position.pop(group.request_id, None)
        self._figures[index] = RequestFigures(
            arrival=self._trace.arrivals[index].time,
            prompt_tokens=len(group.prompt_token_ids),
            output_tokens=sum(one.metrics.num_generation_tokens for one in group.requests),
            ttft=first.time_to_first_token,
            tpot=first.time_per_output_token,
            finish=self._executor.time,
            degree=max(self._degrees.pop(one.request_id, 1) for one in group.requests),
            preemptions=sum(one.metrics.num_preemptions for one in group.requests),
            cached_tokens=group.requests[0].num_cached_tokens,
        )

    def _result(self) -> SimulationResult:
        requests = [self._figures[index] for index in range(len(self._figures))]
        seconds = max((one.finish for one in requests if one.finish is not None), default=0.0)
        prompt_tokens = sum(one.prompt_tokens for one in requests if one.error is None)
        output_tokens = sum(one.output_tokens for one in requests)
        return SimulationResult(
            seconds=seconds,
            num_steps=self._executor.num_steps,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            tokens_per_second=(prompt_tokens + output_tokens) / seconds if seconds else 0.0,
            requests=requests,
            ranks=[
                RankFigures(busy, busy / seconds if seconds else 0.0, peak, pages)
                for busy, peak, pages in zip(
                    self._executor.busy_seconds,
                    self._peak_pages,
                    self._executor.num_pages,
                    strict=True,
                )
            ],
        )


def _params(arrival: Arrival) -> SamplingParams:
    return SamplingParams(
        n=arrival.n,
        max_tokens=arrival.max_tokens or arrival.output_tokens,
        stop_token_ids=None if arrival.max_tokens is None else (END_ID,),
        ignore_eos=True,
    )
