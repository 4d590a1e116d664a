"""Metrics of the service in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

STAGES = ("upload", "decoding", "queue", "forward", "fit", "encoding")
"""Stages of a reconstruction, in order; decoding is of one file."""
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters, histograms and gauges of one process.

    Attributes:
        requests: by route and status; those of the page have the route `page`.
        seconds: duration of each stage of a reconstruction, by stage.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "raylift_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "raylift_stage_seconds",
            "Duration of the stages of a reconstruction",
            ["stage"],
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        for stage in STAGES:
            self.seconds.labels(stage)

    def watch(self, in_flight: Callable[[], int], queued: Callable[[], int], **model: str) -> None:
        """Add the gauges of reconstructions in flight and in the queue, and the labels of the model."""
        Info("raylift_model", "The served model", registry=self._registry).info(model)
        for name, text, count in (
            ("raylift_reconstructions_in_flight", "Reconstructions in progress and in the queue", in_flight),
            ("raylift_queue_length", "Reconstructions that wait for others to end", queued),
        ):
            Gauge(name, text, registry=self._registry).set_function(count)

    def timer(self, stage: str) -> AbstractContextManager[object]:
        """A context that measures a stage."""
        return self.seconds.labels(stage).time()

    def add_reconstruction(self, total_s: float, prediction_time_s: float, fit_time_s: float) -> None:
        """Add the duration of a call of the model and of its parts; the rest of it is the time in the queue."""
        self.seconds.labels("forward").observe(prediction_time_s)
        if fit_time_s:
            self.seconds.labels("fit").observe(fit_time_s)
        self.seconds.labels("queue").observe(max(0.0, total_s - prediction_time_s - fit_time_s))

    def text(self) -> bytes:
        """All values in the text format."""
        return generate_latest(self._registry)
