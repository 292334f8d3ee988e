"""The engine: schedule, execute, update."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longspan.config import EngineConfig
from longspan.cost.model import CostModel
from longspan.cost.rates import Rates
from longspan.engine.completion import Group
from longspan.engine.detokenizer import Detokenizer
from longspan.engine.executor import Executor
from longspan.engine.ledger import Ledger
from longspan.engine.request import Request
from longspan.engine.scheduler import Scheduler
from longspan.errors import InvalidRequestError
from longspan.plan import Traffic
from longspan.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longspan.models import ModelSpec

# Odd numbers without a small common multiple: no two sequences get the same seed.
_STREAM_STEP = 0xD1342543DE82EF95
_INDEX_STEP = 0xAF251AF3B0F025B5


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Pages of one rank's pool."""

    used: int
    total: int


class Engine:
    """Serves requests over the ranks of an executor, a step at a time.

    `rates` are measured ones, instead of what the executor takes its ranks to do.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: "ModelSpec",
        executor: Executor,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        clock: Callable[[], float] = time.monotonic,
        rates: Rates | None = None,
    ) -> None:
        self.config = config
        self.spec = spec
        self.executor = executor
        self.tokenizer = tokenizer
        self.clock = clock
        self.ledger = Ledger(executor.num_pages, config.page_size)
        joins = executor.joins and config.attention_strategy == "auto"
        rates = rates or executor.rates
        cost = CostModel.of(spec, rates, executor.topology, joins=joins)
        ahead = executor.queues and config.async_scheduling
        self.scheduler = Scheduler(config, self.ledger, cost, ahead=ahead)
        self.traffic: dict[str, Traffic] = {}
        self.num_done = 0
        """How often a rank has done its share of a step: as long as it grows, ranks are alive."""
        self._groups: dict[str, Group] = {}
        self._numbers = itertools.count()
        self._arrivals = itertools.count()

    def step(self, timeout: float | None = None) -> list[Group]:
        """Start what ranks can do, wait for the first that is done; who drew a token?

        Ranks without requests in common don't wait for each other. After `timeout` seconds the
        answer is nobody, so that requests that have come meanwhile can begin on idle ranks.
        """
        for step in self.scheduler.schedule():
            self.executor.start(step.plans)
        results = self.executor.wait(timeout)
        drawn = self.scheduler.update(results)
        self.num_done += len(results)
        self._count(result.traffic for result in results.values())
        return self._groups_of(drawn)

    @property
    def has_requests(self) -> bool:
        return self.scheduler.has_requests

    @property
    def context_limit(self) -> int:
        """The longest context in tokens, prompt and output: the model's or all pools' limit."""
        return min(self.spec.max_model_len, self.ledger.num_tokens)

    @property
    def kv_usage(self) -> list[KVUsage]:
        """How full each rank's pool is."""
        return [
            KVUsage(self.ledger.num_used(rank), total)
            for rank, total in enumerate(self.ledger.num_pages)
        ]

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Group:
        """Check a request and queue it; nothing is computed before the next step.

        Requests of a lower `priority` go first, and are preempted last; of the same, older ones.

        Raises:
            InvalidRequestError: prompt or parameters can't be served; names field, value, limit.
        """
        self.check(prompt_token_ids, params)
        if request_id in self._groups:
            raise InvalidRequestError(f"request_id={request_id!r} is already running")
        prompt_token_ids = list(prompt_token_ids)
        number = next(n for n in self._numbers if str(n) not in self._groups)
        request_id = str(number) if request_id is None else request_id
        seed, stream = (params.seed, 0) if params.seed is not None else (self.config.seed, number)
        requests = [
            self._request(
                f"{request_id}/{index}",
                prompt_token_ids,
                params,
                _mixed(seed, stream, index),
                (priority, next(self._arrivals)),
            )
            for index in range(params.n)
        ]
        for follower in requests[1:]:
            follower.leader = requests[0]
        group = Group(request_id, prompt, prompt_token_ids, requests, self.tokenizer)
        self._groups[request_id] = group
        for request in requests:
            self.scheduler.add(request)
        return group

    def abort(self, request_id: str) -> Group | None:
        """End a request at once and free its pages; None if it is not running."""
        group = self._groups.pop(request_id, None)
        for request in group.requests if group else ():
            if request.finish_reason is None:
                self.scheduler.abort(request)
        return group

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises InvalidRequestError for a request that can't be served."""
        params.check_vocab(self.spec.vocab_size)
        length = len(prompt_token_ids)
        if not length:
            raise InvalidRequestError("the prompt is empty; it must have at least 1 token")
        if length >= self.spec.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {length} tokens; with one to generate it exceeds "
                f"max_model_len={self.spec.max_model_len}"
            )
        if length >= self.ledger.num_tokens:
            raise InvalidRequestError(
                f"the prompt has {length} tokens; with one to generate it exceeds the KV pools "
                f"of all {self.ledger.num_ranks} ranks together ({self.ledger.num_tokens} "
                "tokens); raise kv_cache_tokens or context_parallel_size"
            )
        known = range(self.spec.vocab_size)
        if min(prompt_token_ids) not in known or max(prompt_token_ids) not in known:
            position = next(i for i, id_ in enumerate(prompt_token_ids) if id_ not in known)
            raise InvalidRequestError(
                f"prompt_token_ids[{position}]={prompt_token_ids[position]} is outside the "
                f"vocabulary (0 to {self.spec.vocab_size - 1})"
            )

    def _request(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        order: tuple[int, int],
    ) -> Request:
        room = self.context_limit - len(prompt)
        end_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            end_ids |= frozenset(self.spec.eos_token_ids)
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            seed=seed,
            end_ids=end_ids,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            detokenizer=Detokenizer(
                self.tokenizer,
                params.skip_special_tokens,
                params.stop_strings,
                params.min_tokens,
            ),
            order=order,
            clock=self.clock,
        )

    def _groups_of(self, requests: Iterable[Request]) -> list[Group]:
        names = dict.fromkeys(request.request_id.rpartition("/")[0] for request in requests)
        groups = [self._groups[name] for name in names]
        for group in groups:
            if group.finished:
                del self._groups[group.request_id]
        return groups

    def _count(self, traffics: Iterable[dict[str, Traffic]]) -> None:
        for traffic in traffics:
            for strategy, sent in traffic.items():
                total = self.traffic.setdefault(strategy, Traffic())
                total.calls += sent.calls
                total.messages += sent.messages
                total.bytes += sent.bytes
                total.far_bytes += sent.far_bytes


def _mixed(seed: int, stream: int, index: int) -> int:
    """A 64-bit seed for one of several sequences; for stream and index 0 the seed itself."""
    return int((seed + stream * _STREAM_STEP + index * _INDEX_STEP) % 2**64)
