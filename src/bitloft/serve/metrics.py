"""What the server measures, for Prometheus.

Counters and times of requests are kept here; the state of engine and store is asked for when Prometheus asks, so that
it cannot go stale. Names of adapters label one counter only, and only the first NAMED of them, the rest is "other":
thousands of label values would cost every scrape more than all else together.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bitloft import __version__
from bitloft.serve.requests import Request
from bitloft.serve.store import AdapterStore

NAMED = 100
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, engine: Any, store: AdapterStore) -> None:
        self.registry = CollectorRegistry()
        mine: dict[str, Any] = {"namespace": "bitloft", "registry": self.registry}
        self._answers = Counter("requests", "Answers by route and HTTP status", ("endpoint", "code"), **mine)
        self._left = Counter("cancelled", "Requests whose client left, by what they were in", ("stage",), **mine)
        self._first = Histogram("ttft_seconds", "Admission to first token", buckets=SECONDS, **mine)
        self._token = Histogram("tpot_seconds", "Time per token after the first", buckets=TOKEN_SECONDS, **mine)
        self._whole = Histogram("e2e_seconds", "Admission to the last token", buckets=SECONDS, **mine)
        self._wait = Histogram("queue_wait_seconds", "Admission to the batch", buckets=SECONDS, **mine)
        self._named = Counter("adapter_requests", f"Requests by model, {NAMED} of them by name", ("model",), **mine)
        self._names: set[str] = set()
        self.admitted = 0  # requests for any model so far
        self._base = store.base_name
        self.base_requests = self.base_running = self.base_tokens = 0  # the store counts the adapters' only
        Gauge("build_info", "Version of bitloft", ("version",), **mine).labels(__version__).set(1)
        self.registry.register(_State(engine, store))

    def answered(self, endpoint: str, status: int) -> None:
        """An answer has begun."""
        self._answers.labels(endpoint, str(status)).inc()

    def asked(self, name: str) -> None:
        """A request for this model was admitted."""
        self.admitted += 1
        self.base_requests += name == self._base
        if len(self._names) < NAMED:
            self._names.add(name)
        self._named.labels(name if name in self._names else "other").inc()

    def began(self, work: Request) -> None:
        """A request was queued; ``ended`` is to follow."""
        self.base_running += work.adapter is None

    def ended(self, work: Request) -> None:
        """Take over the times of a request that is over; one whose client left counts by its stage only."""
        if work.adapter is None:
            self.base_running -= 1
            self.base_tokens += len(work.tokens)
        if work.started is not None:
            self._wait.observe(work.started - work.accepted)
        if work.first is not None:
            self._first.observe(work.first - work.accepted)
        if work.finished is None:
            stage = "queue" if work.started is None else "prompt" if work.first is None else "answer"
            self._left.labels(stage).inc()
        elif work.first is not None:
            self._answered(work, work.first, work.finished)

    def _answered(self, work: Request, first: float, finished: float) -> None:
        self._whole.observe(finished - work.accepted)
        if len(work.tokens) > 1:
            self._token.observe((finished - first) / (len(work.tokens) - 1))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


GAUGES = {
    "running": "Requests that are computed",
    "waiting": "Requests in the queue",
    "batch_adapters": "Distinct adapters in the last step",
    "cache_bytes": "Bytes of keys and values",
    "quarantined": "Adapter versions that overflowed and are refused",
}
COUNTERS = {
    "steps": "Steps of the engine",
    "step_seconds": "Time in steps",
    "prompt_tokens": "Tokens of prompts",
    "answer_tokens": "Tokens of answers",
    "finished": "Requests that were answered",
    "failed": "Requests that ended with an error",
    "restarts": "Restarts of the engine after a fault",
    "batches": "Batches of an encoder",
    "rows": "Texts that an encoder has read",
    "tokens": "Tokens that an encoder has read",
}


class _State(Collector):
    def __init__(self, engine: Any, store: AdapterStore) -> None:
        self.engine, self.store = engine, store

    def collect(self) -> Iterator[Metric]:
        yield from self._engine()
        yield from self._store()

    def _engine(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        found = {f.name: getattr(stats, f.name) for f in fields(stats)}
        for name, about in GAUGES.items():
            if name in found:
                yield GaugeMetricFamily(f"bitloft_{name}", about, found[name])
        for name, about in COUNTERS.items():
            if name in found:
                yield CounterMetricFamily(f"bitloft_engine_{name}", about, found[name])
        yield _labelled("bitloft_rejected", "Requests refused before any work", "reason", found["refused"].items())
        alive = time.time() - found["last_step_age"]
        yield GaugeMetricFamily("bitloft_engine_last_step_timestamp_seconds", "Last sign of life of the engine", alive)
        yield GaugeMetricFamily("bitloft_ready", "1 where new requests are answered", self.engine.unready() is None)

    def _store(self) -> Iterator[Metric]:
        stats = self.store.stats()
        adapters = GaugeMetricFamily("bitloft_adapters", "Adapters by where they are", labels=("state",))
        adapters.add_metric(["memory"], stats.resident)
        adapters.add_metric(["disk"], stats.adapters - stats.resident)
        adapters.add_metric(["refused"], len(self.store.refused))
        yield adapters
        size = GaugeMetricFamily("bitloft_adapter_bytes", "Bytes of adapters in memory", labels=("tier",))
        size.add_metric(["packed"], stats.bytes)
        size.add_metric(["pinned"], stats.pinned_bytes)
        yield size
        if stats.budget is not None:
            yield GaugeMetricFamily("bitloft_adapter_budget_bytes", "Bytes that adapters may take", stats.budget)
        results = (("loaded", stats.loads), ("failed", stats.load_failures))
        yield _labelled("bitloft_adapter_loads", "Adapters read from disk", "result", results)
        yield CounterMetricFamily("bitloft_adapter_load_seconds", "Time in loads", stats.load_seconds)
        yield CounterMetricFamily("bitloft_adapter_hits", "Requests that found their adapter in memory", stats.hits)
        yield CounterMetricFamily("bitloft_adapter_evictions", "Adapters dropped for others", stats.evictions)
        yield CounterMetricFamily("bitloft_adapter_waits", "Requests that waited for room in the budget", stats.waits)


def _labelled(name: str, about: str, label: str, values: Iterable[tuple[str, int | float]]) -> CounterMetricFamily:
    found = CounterMetricFamily(name, about, labels=(label,))
    for key, value in values:
        found.add_metric([key], value)
    return found
