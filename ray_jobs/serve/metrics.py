"""What a replica counts: requests, captions, tokens, times, errors by kind, and how full its engine is.

Each metric is kept in a Prometheus registry of the replica's own (GET /metrics) and, inside Ray, handed to Ray's own
exporter as well, which adds the replica's node and name; there its name begins with `ray_`, as in
cluster/grafana/serve.json.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from meddam_core.engines.base import Result
from meddam_core.engines.loop import Loop

TIMES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metric:
    """One metric, in Prometheus and in Ray."""

    def __init__(self, ours: Any, rays: Any = None) -> None:
        self._ours, self._rays = ours, rays

    def inc(self, value: float = 1, **tags: str) -> None:
        """Adds to a counter."""
        (self._ours.labels(**tags) if tags else self._ours).inc(value)
        if self._rays is not None and value > 0:  # Ray takes no 0
            self._rays.inc(value, tags=tags or None)

    def set(self, value: float) -> None:
        """Sets a gauge."""
        self._ours.set(value)
        if self._rays is not None:
            self._rays.set(value)

    def observe(self, value: float, **tags: str) -> None:
        """Adds to a histogram."""
        (self._ours.labels(**tags) if tags else self._ours).observe(value)
        if self._rays is not None:
            self._rays.observe(value, tags=tags or None)


class Metrics:
    """All metrics of a replica. `in_ray` hands them to Ray's exporter as well."""

    def __init__(self, in_ray: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._in_ray = in_ray
        self.requests = self._counter("meddam_serve_requests", "Requests answered.", ("route", "status"))
        self.errors = self._counter("meddam_serve_errors", "Requests not answered, by kind.", ("kind",))
        self.request_s = self._histogram("meddam_serve_request_seconds", "Time of a request.", ("route",))
        self.first_token_s = self._histogram("meddam_serve_first_token_seconds", "Time from engine to first text.")
        self.captions = self._counter("meddam_serve_captions", "Captions made.", ("finish_reason",))
        self.new_tokens = self._counter("meddam_serve_new_tokens", "Tokens generated.")
        self.prompt_tokens = self._counter("meddam_serve_prompt_tokens", "Tokens of prompts, images included.")
        self.in_flight = self._gauge("meddam_serve_in_flight", "Requests being worked on.")
        self.batch_size = self._gauge("meddam_serve_batch_size", "Captions that the engine decodes together.")
        self.queue = self._gauge("meddam_serve_queue", "Captions that wait for the engine.")

    def count_caption(self, result: Result) -> None:
        """Counts a finished caption."""
        self.captions.inc(finish_reason=result.finish_reason)
        self.new_tokens.inc(len(result.token_ids))
        self.prompt_tokens.inc(result.num_prompt_tokens)

    def read_engine(self, loop: Loop) -> None:
        """Sets the gauges from the engine's state."""
        unfinished = loop.num_unfinished
        slots = loop.max_batch or unfinished
        self.batch_size.set(min(unfinished, slots))
        self.queue.set(max(0, unfinished - slots))

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, tags: tuple[str, ...] = ()) -> Metric:
        ours = Counter(name, about, tags, registry=self.registry)
        return Metric(ours, self._rays("Counter", f"{name}_total", about, tags))

    def _gauge(self, name: str, about: str) -> Metric:
        return Metric(Gauge(name, about, registry=self.registry), self._rays("Gauge", name, about, ()))

    def _histogram(self, name: str, about: str, tags: tuple[str, ...] = ()) -> Metric:
        ours = Histogram(name, about, tags, buckets=TIMES_S, registry=self.registry)
        return Metric(ours, self._rays("Histogram", name, about, tags, boundaries=list(TIMES_S)))

    def _rays(self, kind: str, name: str, about: str, tags: tuple[str, ...], **more: Any) -> Any:
        if not self._in_ray:
            return None
        import ray.util.metrics

        return getattr(ray.util.metrics, kind)(name, about, tag_keys=tags, **more)
