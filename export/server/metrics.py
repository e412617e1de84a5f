"""Counters of the server, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import prometheus_client

_LATENCY_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_OTHER = "other"  # The label of models that are not served: clients must not be able to add labels without end.


class Metrics:
    """The server's counters, in a registry of their own, so that several servers fit into one process.

    Attributes:
      content_type: of what `exposition` returns.
    """

    content_type = prometheus_client.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._served: Mapping[str, Sequence[int]] = {}
        self._requests = prometheus_client.Counter(
            "clsd_requests", "Requests answered.", ["protocol", "method", "model", "code"], registry=self._registry
        )
        self._latency = prometheus_client.Histogram(
            "clsd_request_seconds",
            "Time from a parsed request to its answer.",
            ["protocol", "method"],
            buckets=_LATENCY_SECONDS,
            registry=self._registry,
        )
        self._batches = prometheus_client.Histogram(
            "clsd_batch_rows",
            "Rows of a run; those of a request beyond max_batch_size count once.",
            ["model", "signature"],
            buckets=_BATCH_ROWS,
            registry=self._registry,
        )
        self._queued = prometheus_client.Gauge(
            "clsd_queued_rows", "Rows that wait to run.", ["model", "signature"], registry=self._registry
        )
        self._refused = prometheus_client.Counter(
            "clsd_refused_requests", "Requests refused by a full queue.", ["model"], registry=self._registry
        )
        self._loaded = prometheus_client.Gauge(
            "clsd_loaded_version",
            "1 for each version that takes requests.",
            ["model", "version"],
            registry=self._registry,
        )

    def observe_request(self, *, protocol: str, method: str, model: str, code: str, seconds: float) -> None:
        """Counts an answered request.

        Args:
          protocol: ``grpc`` or ``rest``.
          method: as TF Serving names it: Predict, Classify, Regress, MultiInference, GetModelMetadata, GetModelStatus.
          model: as the request gave it; one that is not served counts as "other".
          code: the name of the gRPC status code, ``OK`` for success.
          seconds: taken.
        """
        model = model if model in self._served else _OTHER
        self._requests.labels(protocol, method, model, code).inc()
        self._latency.labels(protocol, method).observe(seconds)

    def observe_batch(self, model: str, signature: str, rows: int) -> None:
        """Counts a run of a signature.

        Args:
          model: whose signature ran.
          signature: its name.
          rows: that ran together.
        """
        self._batches.labels(model, signature).observe(rows)

    def add_queued_rows(self, model: str, signature: str, rows: int) -> None:
        """Counts rows that wait from now on. All versions of a model count together.

        Args:
          model: that they wait for.
          signature: its name.
          rows: negative for rows that no longer wait.
        """
        self._queued.labels(model, signature).inc(rows)

    def count_refused(self, model: str) -> None:
        """Counts a request that a full queue of ``model`` refused."""
        self._refused.labels(model).inc()

    def set_served(self, versions: Mapping[str, Sequence[int]]) -> None:
        """Sets the ``versions`` that take requests now: model -> versions."""
        self._served = versions
        self._loaded.clear()
        for model, numbers in versions.items():
            for number in numbers:
                self._loaded.labels(model, str(number)).set(1)

    def exposition(self) -> bytes:
        """Body of /metrics."""
        return prometheus_client.generate_latest(self._registry)
