"""What the server says of itself in Prometheus' text format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from uncurl_jax.serving.traffic import PROBABILITIES, SELECTIONS, Stream

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServerMetrics:
    """Counters, gauges and histograms of one server.

    Attributes:
      requests: by endpoint and status.
      seconds: of requests, by endpoint.
      tokens: by model and kind: "prompt", "generated" or "scored".
      queue_length: requests that wait.
      batch_rows: rows of batches that are not filling, by kind of work.
      shadowed: rows offered to the shadow, by outcome: "read" or "skipped" (no idle time).
      ready: 1 while the server takes requests.
    """

    def __init__(self, streams: Mapping[str, Stream]):
        """Begins at zero; the drift of the streams is computed when it is asked for."""
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "uncurl_requests", "Requests answered.", ("endpoint", "status"), registry=registry
        )
        self.seconds = Histogram(
            "uncurl_request_seconds",
            "Time to answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "uncurl_tokens", "Tokens of requests.", ("model", "kind"), registry=registry
        )
        self.queue_length = Gauge("uncurl_queue_length", "Requests that wait.", registry=registry)
        self.batch_rows = Histogram(
            "uncurl_batch_rows",
            "Rows that share a batch.",
            ("kind",),
            buckets=_ROWS,
            registry=registry,
        )
        self.shadowed = Counter(
            "uncurl_shadowed_rows", "Rows to shadow.", ("outcome",), registry=registry
        )
        self.ready = Gauge("uncurl_ready", "Whether requests are taken.", registry=registry)
        self._registry.register(_DriftCollector(streams))

    def text(self) -> bytes:
        """Returns all of it in the text exposition format."""
        return generate_latest(self._registry)


class _DriftCollector:
    """Tokens and drift of streams, computed at each scrape."""

    def __init__(self, streams: Mapping[str, Stream]):
        self._streams = streams

    def describe(self) -> Iterable[Any]:
        """Names nothing beforehand."""
        return ()

    def collect(self) -> Iterable[Any]:
        """Yields the families."""
        tokens = GaugeMetricFamily(
            "uncurl_stream_tokens", "Tokens in the statistics.", labels=("stream",)
        )
        labels = ("stream", "layer", "of")
        distance = GaugeMetricFamily(
            "uncurl_drift_bits", "Jensen-Shannon divergence without bias.", labels=labels
        )
        threshold = GaugeMetricFamily(
            "uncurl_drift_threshold_bits", "What chance alone exceeds rarely.", labels=labels
        )
        is_drifting = GaugeMetricFamily(
            "uncurl_drifting", "Whether a layer has drifted.", labels=("stream", "layer")
        )
        for name, stream in self._streams.items():
            tokens.add_metric((name,), stream.tokens)
            for layer in stream.drift().layers:
                for kind in (SELECTIONS, PROBABILITIES):
                    found = getattr(layer, kind)
                    place = (name, str(layer.layer), kind)
                    distance.add_metric(place, found.distance_bits)
                    # Without its bias too, so that the two can be compared.
                    least = found.threshold_bits - found.bias_bits
                    threshold.add_metric(place, least if math.isfinite(least) else math.inf)
                is_drifting.add_metric((name, str(layer.layer)), float(layer.is_drifting))
        yield from (tokens, distance, threshold, is_drifting)
