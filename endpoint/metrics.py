"""What Prometheus and MindIE's own tools may know of the load: names and buckets of api.md section 12."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from endpoint.bounds import Bounds
from endpoint.connection_metrics import ConnectionMetrics
from endpoint.metadata import Occupancy
from engine.settings import Plane

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_E2E = (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60)
_TOKENS = (10, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 16000, 20000, 32000, 50000, 64000, 128000)
_THROUGHPUT_S = 1.0  # shortest time over which a throughput is told

disable_created_metrics()  # type: ignore[no-untyped-call]  # they are no part of the contract


@dataclass(slots=True)
class Outcome:
    """How one request ended; failed unless somebody says otherwise."""

    ok: bool = False


class _BoundCollector(Collector):
    """How full everything is that has a limit, read at the moment somebody asks."""

    def __init__(self, bounds: Bounds, model: str) -> None:
        self._bounds = bounds
        self._model = model

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "bound"]
        used = GaugeMetricFamily("mindie_bound_used", "how much is taken of what has a limit", labels=labels)
        limit = GaugeMetricFamily("mindie_bound_limit", "where it ends", labels=labels)
        refused = CounterMetricFamily(
            "mindie_bound_refused", "how often it was full and turned something away", labels=labels
        )
        for bound in self._bounds:
            values = [self._model, bound.name]
            used.add_metric(values, bound.used())
            limit.add_metric(values, bound.limit())
            if bound.refused is not None:
                refused.add_metric(values, bound.refused())
        yield from (used, limit, refused)


class _RefusalCollector(Collector):
    """Requests turned away before anything was computed for them, read at the moment somebody asks."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.sources: list[Mapping[str, int]] = []

    def collect(self) -> Iterator[Metric]:
        refused = CounterMetricFamily(
            "mindie_requests_refused", "requests turned away, by reason", labels=["model_name", "reason"]
        )
        for source in self.sources:
            for reason, count in source.items():
                refused.add_metric([self._model, reason], count)
        yield refused


class _Growth:
    """By how much the instances' own counters have grown since somebody asked last."""

    def __init__(self, counter: Callable[[Occupancy], int]) -> None:
        self._counter = counter
        self._told: dict[int, int] = {}  # by instance

    def of(self, instances: Sequence[Occupancy]) -> int:
        growth = 0
        for number, instance in enumerate(instances):
            told, before = self._counter(instance), self._told.get(number, 0)
            # one that has been replaced counts from zero again, and what we tell must not go back
            growth += told - before if told >= before else told
            self._told[number] = told
        return growth


class _TokenCollector(Collector):
    """What is counted for each token, in plain numbers: the client library's would take 3 of its 35 us."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.generated = 0
        self._gaps = [0] * (len(_TPOT) + 1)  # by bucket, the last one without an upper bound
        self._gaps_s = 0.0

    def gap(self, seconds: float) -> None:
        self._gaps[bisect_left(_TPOT, seconds)] += 1
        self._gaps_s += seconds

    def collect(self) -> Iterator[Metric]:
        generated = CounterMetricFamily("generation_tokens", "tokens generated", labels=["model_name"])
        generated.add_metric([self._model], self.generated)
        gaps = HistogramMetricFamily(
            "time_per_output_token_seconds", "gap between two tokens", labels=["model_name"]
        )
        bounds = [*(str(float(bound)) for bound in _TPOT), "+Inf"]
        counts = accumulate(self._gaps)
        gaps.add_metric([self._model], list(zip(bounds, counts, strict=True)), self._gaps_s)
        yield from (generated, gaps)


class Metrics:
    """Counts what the handlers report; gauges are filled in when somebody asks."""

    def __init__(self, model_name: str, window: int, occupancy: Callable[[], Sequence[Occupancy]]) -> None:
        """`window`: requests in the moving averages of /metrics-json. `occupancy`: of every instance, now."""
        self._occupancy = occupancy
        self._registry = CollectorRegistry()
        self._model = model_name
        self.bounds = Bounds()
        self._registry.register(_BoundCollector(self.bounds, model_name))
        self._refusals = _RefusalCollector(model_name)
        self._registry.register(self._refusals)
        self.connections = ConnectionMetrics(self._registry, model_name)
        self._received = self._counter("request_received", "inference requests that arrived")
        self._success = self._counter("request_success", "requests that finished well")
        self._failed = self._counter("request_failed", "requests refused or failed")
        self._cancelled = self._counter("mindie_request_cancelled", "requests whose client hung up")
        self._in_flight = self._gauge("mindie_requests_in_flight", "requests that have not ended")
        self._preemptions = self._counter("num_preemptions", "requests preempted")
        self._looked_up = self._gauge("all_radix_match_num", "prompt tokens looked up in the prefix cache")
        self._hits = self._gauge("npu_radix_match_hit_num", "prompt tokens found in the prefix cache")
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens of requests sent to the engine")
        self._tokens = _TokenCollector(model_name)
        self._registry.register(self._tokens)
        self._failed_share = self._gauge("failed_request_perc", "failed / received")
        self._guessed = self._counter("mindie_guessed_tokens", "tokens that speculative decoding has guessed")
        self._right = self._counter("mindie_right_guesses", "guessed tokens that were what the model says")
        self._running = self._gauge("num_requests_running", "in the engine's batch")
        self._waiting = self._gauge("num_requests_waiting", "in the engine's queue")
        self._swapped = self._gauge("num_requests_swapped", "swapped out")
        self._cache_usage = self._gauge("npu_cache_usage_perc", "cache blocks in use, 0 to 1")
        self._swap_usage = self._gauge("cpu_cache_usage_perc", "swap blocks in use, 0 to 1")
        self._hit_rate = self._gauge(
            "npu_prefix_cache_hit_rate", "prompt tokens found in the prefix cache, 0 to 1"
        )
        self._prompt_rate = self._gauge("avg_prompt_throughput_toks_per_s", "prompt tokens per second")
        self._generation_rate = self._gauge("avg_generation_throughput_toks_per_s", "tokens per second")
        self._ttft = self._histogram("time_to_first_token_seconds", "submit to first token", _TTFT)
        self._e2e = self._histogram("e2e_request_latency_seconds", "arrival to end", _E2E)
        self._prompt_length = self._histogram("request_prompt_tokens", "prompt length", _TOKENS)
        self._output_length = self._histogram("request_generation_tokens", "answer length", _TOKENS)
        self._recent_ttft: deque[float] = deque(maxlen=window)
        self._recent_tbt: deque[float] = deque(maxlen=window)
        self._certificate_days = Gauge(
            "mindie_certificate_expiry_days",
            "days until the certificate of a plane expires",
            ["model_name", "plane"],
            registry=self._registry,
        )
        self._snapshot = (time.monotonic(), 0.0, 0.0)
        self._new_preemptions = _Growth(lambda instance: instance.preemptions)
        self._new_looked_up = _Growth(lambda instance: instance.prefix_tokens)
        self._new_hits = _Growth(lambda instance: instance.prefix_hits)
        self._new_guessed = _Growth(lambda instance: instance.guessed_tokens)
        self._new_right = _Growth(lambda instance: instance.right_guesses)

    def watch_refusals(self, counts: Mapping[str, int]) -> None:
        """Show `counts`, which its owner keeps: requests turned away since the start, by reason."""
        self._refusals.sources.append(counts)

    # -- reported by the handlers -------------------------------------------------------------------

    @contextmanager
    def request(self) -> Iterator[Outcome]:
        """Counts one request, which ends as one of: success, failed, cancelled by its client.

        The block sets `ok` when the answer is complete.
        """
        self._received.inc()
        outcome = Outcome()
        start = time.monotonic()
        end = self._failed
        try:
            yield outcome
        except (asyncio.CancelledError, ConnectionError):
            end = self._cancelled
            raise
        finally:
            if outcome.ok:
                end = self._success
                self._e2e.observe(time.monotonic() - start)
            end.inc()

    def submitted(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_length.observe(prompt_tokens)

    def token(self) -> None:
        self._tokens.generated += 1

    def first_token(self, seconds: float) -> None:
        """Of a request."""
        self._ttft.observe(seconds)
        self._recent_ttft.append(seconds)

    def next_token(self, seconds: float) -> None:
        """Of a choice."""
        self._tokens.gap(seconds)
        self._recent_tbt.append(seconds)

    def watch_certificate(self, plane: Plane, days_left: Callable[[], float]) -> None:
        """Tell how long the certificate of this plane is still valid; `days_left` may be negative."""
        self._certificate_days.labels(self._model, plane).set_function(days_left)

    def finished(self, generated_tokens: int) -> None:
        self._output_length.observe(generated_tokens)

    # -- told ---------------------------------------------------------------------------------------

    def exposition(self) -> bytes:
        """GET /metrics."""
        instances = self._occupancy()
        total = sum(instance.total_blocks for instance in instances)
        free = sum(instance.free_blocks for instance in instances)
        self._running.set(sum(instance.running for instance in instances))
        self._waiting.set(sum(instance.waiting for instance in instances))
        self._swapped.set(sum(instance.swapped for instance in instances))
        self._preemptions.inc(self._new_preemptions.of(instances))
        self._looked_up.inc(self._new_looked_up.of(instances))
        self._hits.inc(self._new_hits.of(instances))
        self._guessed.inc(self._new_guessed.of(instances))
        self._right.inc(self._new_right.of(instances))
        looked_up = _value(self._looked_up)
        self._hit_rate.set(_value(self._hits) / looked_up if looked_up else 0.0)
        self._cache_usage.set((total - free) / total if total else 0.0)
        host = sum(instance.host_blocks for instance in instances)
        free_host = sum(instance.free_host_blocks for instance in instances)
        self._swap_usage.set((host - free_host) / host if host else 0.0)
        received, failed = _value(self._received), _value(self._failed)
        self._failed_share.set(failed / received if received else 0.0)
        self._in_flight.set(received - failed - _value(self._success) - _value(self._cancelled))
        self._update_rates()
        return generate_latest(self._registry)

    def vector(self, instance: str) -> dict[str, Any]:
        """GET /metrics-json. `instance`: our address as ip:port."""
        instances = self._occupancy()
        values = {
            "TTFT": _average_ms(self._recent_ttft),
            "TBT": _average_ms(self._recent_tbt),
            "waitingInferRequestNum": sum(one.waiting for one in instances),
            "processingInferRequestNum": sum(one.running for one in instances),
            "remainBlocks": sum(one.free_blocks for one in instances),
        }
        result = [
            {"metric": [{"__name__": name, "job": "node", "instance": instance}], "value": str(value)}
            for name, value in values.items()
        ]
        return {"resultType": "vector", "result": result}

    def _update_rates(self) -> None:
        now, (then, prompt, generated) = time.monotonic(), self._snapshot
        if now - then < _THROUGHPUT_S:
            return
        self._snapshot = now, _value(self._prompt_tokens), self._tokens.generated
        self._prompt_rate.set((self._snapshot[1] - prompt) / (now - then))
        self._generation_rate.set((self._snapshot[2] - generated) / (now - then))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)


def _value(counter: Counter | Gauge) -> float:
    (metric,) = counter.collect()
    return float(metric.samples[0].value)


def _average_ms(seconds: Sequence[float]) -> int:
    return round(sum(seconds) / len(seconds) * 1e3) if seconds else 0
