"""``Metrics``: the metrics for Prometheus.

A metric that vLLM has too has the same name with another prefix, and the same labels, so that
dashboards made for vLLM need only that prefix. Buckets begin at a quarter of a millisecond, since a
token can take less than vLLM's first bucket.
"""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from hotloop.engine.service import Service
from hotloop.types import Delta, Generation

PREFIX = "hotloop:"

TOKEN_BUCKETS = (
    *(0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01),
    *(0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
"""Buckets in seconds for times to the first token and between tokens."""

REQUEST_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0),
    *(100.0, 250.0, 500.0, 1000.0),
)
"""Buckets in seconds for whole requests and their parts."""


class Metrics:
    """The metrics of one server.

    Args:
        model: The model's name in the API: the value of the label ``model_name``.
    """

    def __init__(self, model: str) -> None:
        self._registry, self._model = CollectorRegistry(), model
        ProcessCollector(registry=self._registry)
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._looked_up = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._cached = self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache."
        )
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that were accepted."
        )
        self.cancelled = self._counter("request_cancelled", "Requests whose client disconnected.")
        self._finished = Counter(
            f"{PREFIX}request_success",
            "Answers that ended, by the reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._errors = Counter(
            f"{PREFIX}request_errors",
            "Requests answered with an error, by its HTTP status.",
            ["model_name", "status"],
            registry=self._registry,
        )
        self._ttft = self._histogram(
            "time_to_first_token", "Seconds from submission to the first token.", TOKEN_BUCKETS
        )
        self.deltas = DeltaMetrics(model)
        self._registry.register(self.deltas)
        self._e2e = self._histogram(
            "e2e_request_latency", "Seconds from submission to the last token."
        )
        self._queue = self._histogram("request_queue_time", "Seconds from submission to prefill.")
        self._prefill = self._histogram(
            "request_prefill_time", "Seconds from prefill to the first token."
        )
        self._decode = self._histogram(
            "request_decode_time", "Seconds from the first to the last token."
        )

    def watch(self, service: Service) -> None:
        """Reports the state of an engine from now on."""
        self._registry.register(_State(service, self._model))

    def prompt(self, n_tokens: int) -> None:
        """Counts the prompts of a request."""
        self._prompt_tokens.inc(n_tokens)

    def error(self, status: int) -> None:
        """Counts a request that was answered with an error."""
        self._errors.labels(self._model, str(status)).inc()

    def answer(self, generation: Generation) -> None:
        """Counts an answer that was not cancelled."""
        timing = generation.timing
        self._finished.labels(self._model, _REASONS[generation.finish_reason]).inc()
        self._looked_up.inc(len(generation.prompt_ids))
        self._cached.inc(generation.cached_tokens)
        if (drafting := generation.speculation) is not None:
            self._drafted.inc(sum(drafting.proposed))
            self._accepted.inc(sum(drafting.accepted))
        self._ttft.observe(timing.ttft_s)
        self._e2e.observe(timing.e2e_s)
        self._queue.observe(timing.queue_s)
        self._prefill.observe(timing.ttft_s - timing.queue_s)
        self._decode.observe(timing.e2e_s - timing.ttft_s)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Returns all metrics in an exposition format of Prometheus, and its content type.

        Args:
            accept: The formats that the client takes, as an ``Accept`` header.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(f"{PREFIX}{name}", text, ["model_name"], registry=self._registry)
        return made.labels(self._model)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...] = REQUEST_BUCKETS
    ) -> Histogram:
        made = Histogram(
            f"{PREFIX}{name}_seconds",
            text,
            ["model_name"],
            buckets=buckets,
            registry=self._registry,
        )
        return made.labels(self._model)


class DeltaMetrics(Collector):
    """Counts the deltas of answers and their tokens.

    It is updated for each token, for which a metric of ``prometheus_client`` would be too slow.

    Args:
        model: See ``Metrics``.
    """

    def __init__(self, model: str) -> None:
        self._model, self._lock = model, threading.Lock()
        self._n_tokens, self._n_gaps, self._sum_s = 0, [0] * (len(TOKEN_BUCKETS) + 1), 0.0

    def add(self, n_tokens: int, gap_s: float | None) -> None:
        """Counts a delta.

        Args:
            n_tokens: Its tokens.
            gap_s: Seconds since the previous delta of the answer; None for the first one, and for
                one without tokens.
        """
        with self._lock:
            self._n_tokens += n_tokens
            if gap_s is not None:
                self._n_gaps[bisect_left(TOKEN_BUCKETS, gap_s)] += 1
                self._sum_s += gap_s

    def collect(self) -> Iterator[Metric]:
        """Yields the counts."""
        with self._lock:
            n_tokens, n_gaps, sum_s = self._n_tokens, list(self._n_gaps), self._sum_s
        labels = ["model_name"]
        tokens = CounterMetricFamily(
            f"{PREFIX}generation_tokens", "Tokens of answers.", labels=labels
        )
        tokens.add_metric([self._model], n_tokens)
        yield tokens
        gaps = HistogramMetricFamily(
            f"{PREFIX}inter_token_latency_seconds",
            "Seconds between deltas of an answer.",
            labels=labels,
        )
        bounds = [*map(floatToGoString, TOKEN_BUCKETS), "+Inf"]
        counts = itertools.accumulate(n_gaps)
        gaps.add_metric([self._model], list(zip(bounds, counts, strict=True)), sum_s)
        yield gaps


_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "abort"}
"""The reasons why an answer ended, by vLLM's label."""


class Tally:
    """Counts the tokens of one request, for its usage and for the server's metrics.

    Args:
        metrics: The server's metrics.
        prompt_tokens: Tokens of its prompts.
        n: Answers to each prompt.

    Attributes:
        prompt_tokens: Tokens of its prompts.
        completion_tokens: Tokens of its answers so far.
        cached_tokens: Tokens of its prompts that were not prefilled.
    """

    def __init__(self, metrics: Metrics, prompt_tokens: int, n: int | None = None) -> None:
        self._metrics, self._n = metrics, n or 1
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = prompt_tokens, 0, 0
        self._last: dict[int, float] = {}  # when the last delta of each answer arrived
        metrics.prompt(prompt_tokens)

    def add(self, delta: Delta) -> None:
        """Counts a delta of an answer."""
        now, before = time.perf_counter(), self._last.get(delta.index)
        self._last[delta.index] = now
        n_tokens = len(delta.token_ids)
        self._metrics.deltas.add(n_tokens, now - before if before and n_tokens else None)
        self.completion_tokens += n_tokens
        if (generation := delta.generation) is not None:
            self._metrics.answer(generation)
            if delta.index % self._n == 0:
                self.cached_tokens += generation.cached_tokens


class _State(Collector):
    """Reads the state of an engine whenever Prometheus asks the server."""

    def __init__(self, service: Service, model: str) -> None:
        self._service, self._model = service, model

    def collect(self) -> Iterator[Metric]:
        """Yields the state."""
        state = self._service.state()
        n_rows = self._service.description.config.max_batch_size
        gauges = {
            "num_requests_running": ("Answers in prefill or decoding.", state.n_running),
            "num_requests_waiting": ("Answers that wait for a row.", state.n_waiting),
            "kv_cache_usage_perc": ("Share of the cache's seats in use.", state.n_running / n_rows),
            "stalled_seconds": (
                "Seconds since the last iteration, if there is work.",
                state.stalled_s,
            ),
        }
        counters = {
            "steps": ("Decode steps.", state.n_steps),
            "step_rows": ("Rows, summed over decode steps.", state.n_step_rows),
            "captures": ("Programs captured since the server was ready.", state.n_captured),
        }
        for kinds, made in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, (text, value) in kinds.items():
                family = made(f"{PREFIX}{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family
