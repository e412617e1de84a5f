"""Comparison of two servers, or of two versions of a model, on the same rows: scores and latencies."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.stats

from export.clients.load_generator import percentiles
from export.clients.serving_client import ServingClient


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores and latencies of both sides.

    Attributes:
      scores: of each side, float32 [num_rows].
      latencies_ms: of each side's requests, float64 [num_requests], in milliseconds.
    """

    scores: tuple[np.ndarray, np.ndarray]
    latencies_ms: tuple[np.ndarray, np.ndarray]

    @property
    def differences(self) -> np.ndarray:
        """Absolute differences of the scores, float64 [num_rows]."""
        return np.abs(self.scores[0].astype(np.float64) - self.scores[1])

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's; None where one side gives all rows the same score."""
        if any(np.ptp(scores) == 0 for scores in self.scores):
            return None
        return float(scipy.stats.spearmanr(*self.scores).statistic)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as JSON has it."""
        return {
            "rows": len(self.scores[0]),
            "max_difference": float(self.differences.max()),
            "mean_difference": float(self.differences.mean()),
            "rank_correlation": self.rank_correlation,
            "mean_ctr": [float(scores.mean(dtype=np.float64)) for scores in self.scores],
            "latency_ms": [percentiles(latencies) for latencies in self.latencies_ms],
        }


def compare(
    clients: tuple[ServingClient, ServingClient],
    tables: Iterable[pa.Table],
    progress: Callable[[int], None] = lambda num_rows: None,
) -> Comparison:
    """Sends every batch to both, one request at a time and in turn, so that neither slows the other down.

    Args:
      clients: the two sides.
      tables: batches of rows.
      progress: is told the number of rows sent so far.

    Returns:
      Scores and latencies of both sides.

    Raises:
      ValueError: there are no rows, or rows that do not fit the models' inputs.
      ServingError: a request failed.
    """
    scores: tuple[list, list] = ([], [])
    latencies: tuple[list, list] = ([], [])
    num_rows = 0
    for rows in tables:
        for side, client in enumerate(clients):
            for request in client.requests(rows):
                start = time.monotonic()
                scores[side].append(client.score_examples(request))
                latencies[side].append(1000 * (time.monotonic() - start))
        num_rows += rows.num_rows
        progress(num_rows)
    if not num_rows:
        raise ValueError("there must be rows to compare. Received: none")
    return Comparison(
        (np.concatenate(scores[0]), np.concatenate(scores[1])),
        (np.array(latencies[0], np.float64), np.array(latencies[1], np.float64)),
    )
