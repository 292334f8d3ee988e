"""Figures for Prometheus, under vLLM's names where they mean the same."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from longspan.engine.async_engine import AsyncEngine
from longspan.server.record import Record

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_TOKENS = tuple(factor * 10**power for power in range(7) for factor in (1, 2, 5))
_HOLDERS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


class Metrics:
    """What requests have been like, counted as they end, and how the engine is when asked."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self._labels = {"model_name": model}
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(engine, model))
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._queried = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."
        )
        self._hits = self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens that the prefix cache had."
        )
        self._preemptions = self._counter(
            "vllm:num_preemptions", "How often requests gave up their pages for others."
        )
        self._ended = Counter(
            "vllm:request_success",
            "Requests that have ended, by their finish reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of each token but the first."
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its end."
        )
        self._queued = self._histogram(
            "vllm:request_queue_time_seconds", "How long a prompt has waited for its ranks."
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From a prompt's first step to its first token."
        )
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self._output = self._histogram("vllm:request_generation_tokens", "Output tokens.", _TOKENS)
        self._holders = self._histogram(
            "longspan:request_holders", "Ranks that held a request's keys at its end.", _HOLDERS
        )
        self._degree = self._histogram(
            "longspan:request_degree", "Ranks that computed a prompt together.", _HOLDERS
        )

    def count(self, record: Record) -> None:
        """Take the figures of a request that has ended."""
        usage, labels = record.usage, self._labels
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._generation_tokens.inc(usage.completion_tokens)
        self._queried.inc(usage.prompt_tokens)
        self._hits.inc(usage.cached_tokens)
        self._preemptions.inc(record.num_preemptions)
        for reason in record.finish_reasons or [record.outcome]:
            self._ended.labels(**labels, finished_reason=reason).inc()
        self._prompt.observe(usage.prompt_tokens)
        self._output.observe(usage.completion_tokens)
        for histogram, seconds in (
            (self._first, record.time_to_first_token),
            (self._per_token, record.time_per_output_token),
            (self._whole, None if record.ended is None else record.ended - record.arrived),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        for times in record.metrics.values():
            if times.first_scheduled_time is not None:
                self._queued.observe(times.first_scheduled_time - times.arrival_time)
                if times.first_token_time is not None:
                    self._prefill.observe(times.first_token_time - times.first_scheduled_time)
        if record.metrics:
            self._holders.observe(record.num_holders)
            self._degree.observe(record.degree)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str) -> Any:
        return Counter(name, help, ["model_name"], registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...] = _SECONDS) -> Any:
        made = Histogram(name, help, ["model_name"], registry=self._registry, buckets=buckets)
        return made.labels(**self._labels)


class _EngineFigures(Collector):
    """What the engine's counters say at the moment."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        asynchronous, engine = self._engine, self._engine.engine
        usages = engine.kv_usage
        share = sum(usage.used for usage in usages) / max(sum(usage.total for usage in usages), 1)
        for name, help, value in (
            ("vllm:num_requests_running", "Sequences with pages.", asynchronous.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait.", asynchronous.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of all ranks' pages in use, 0 to 1.", share),
            ("longspan:healthy", "Whether all ranks are alive.", float(asynchronous.error is None)),
        ):
            gauge = GaugeMetricFamily(name, help, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        used = GaugeMetricFamily(
            "longspan:kv_pages_used", "Pages in use.", labels=["model_name", "rank"]
        )
        free = GaugeMetricFamily(
            "longspan:kv_pages_free", "Pages that are free.", labels=["model_name", "rank"]
        )
        for rank, usage in enumerate(usages):
            used.add_metric([self._model, str(rank)], usage.used)
            free.add_metric([self._model, str(rank)], usage.total - usage.used)
        yield used
        yield free
        sent = CounterMetricFamily(
            "longspan:sent_bytes",
            "Bytes that ranks have sent each other.",
            labels=["model_name", "strategy"],
        )
        for strategy, traffic in list(engine.traffic.items()):
            sent.add_metric([self._model, strategy], traffic.bytes)
        yield sent
