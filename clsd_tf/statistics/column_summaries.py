"""Summaries of one column, in all rows and in segments of them: the labels of user groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.statistics.sketches import Histogram, TopValues


def sum_segments(values: np.ndarray, chosen: Sequence[Sequence[int]]) -> np.ndarray:
    """Sums over unions of segments.

    >>> sum_segments(np.array([5, 2, 3]), [[0], [1, 2]]).tolist()
    [5, 5]

    Args:
      values: int64 [num_segments].
      chosen: indices of the segments of each union.

    Returns:
      int64 [num_unions].
    """
    return np.array([values[indices].sum() for indices in chosen], np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class NumberSummary:
    """Moments and distribution of a numeric column; missing values are left out.

    Attributes:
      count: of the values in each segment, int64 [num_segments].
      mean: float64 [num_segments]; 0 where there are no values.
      squared_deviation: sum of squared differences from the mean, float64 [num_segments].
      minimum: of all values; None if there are none.
      maximum: likewise.
      zeros: how many values are 0.
      histogram: of all values.
    """

    count: np.ndarray
    mean: np.ndarray
    squared_deviation: np.ndarray
    minimum: float | None
    maximum: float | None
    zeros: int
    histogram: Histogram

    @property
    def std(self) -> np.ndarray:
        """Standard deviation in each segment, dividing by the count."""
        return np.sqrt(self.squared_deviation / np.maximum(self.count, 1))

    def merge(self, other: NumberSummary) -> NumberSummary:
        """Returns the summary of both parts, this one and ``other``; moments by Chan et al. (1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        deviation = self.squared_deviation + other.squared_deviation + delta**2 * self.count * share
        extremes = [value for value in (self.minimum, other.minimum, self.maximum, other.maximum) if value is not None]
        return NumberSummary(
            count,
            self.mean + delta * share,
            deviation,
            min(extremes, default=None),
            max(extremes, default=None),
            self.zeros + other.zeros,
            self.histogram.merge(other.histogram),
        )

    def in_segments(self, chosen: Sequence[Sequence[int]]) -> NumberSummary:
        """Returns the summary of unions of segments: ``chosen`` holds the indices of each union."""
        merged = [self._union(indices) for indices in chosen]
        count, mean, deviation = (np.array(values) for values in zip(*merged, strict=True))
        return dataclasses.replace(self, count=count, mean=mean, squared_deviation=deviation)

    def _union(self, indices: Sequence[int]) -> tuple[int, float, float]:
        counts, means = self.count[indices], self.mean[indices]
        total = int(counts.sum())
        mean = float((counts * means).sum() / max(total, 1))
        return total, mean, float((self.squared_deviation[indices] + counts * (means - mean) ** 2).sum())

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``from_dict`` takes, ready for JSON."""
        return {
            **vars(self),
            "count": self.count.tolist(),
            "mean": self.mean.tolist(),
            "squared_deviation": self.squared_deviation.tolist(),
            "histogram": self.histogram.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> NumberSummary:
        """Returns the summary whose ``to_dict`` gave ``content``."""
        arrays = {
            "count": np.array(content["count"], np.int64),
            "mean": np.array(content["mean"], np.float64),
            "squared_deviation": np.array(content["squared_deviation"], np.float64),
        }
        return cls(**{**content, **arrays, "histogram": Histogram.from_dict(content["histogram"])})


@dataclasses.dataclass(frozen=True, eq=False)
class ValueSummary:
    """The most frequent values of a column, as text; of separated values each counts.

    Attributes:
      top: their counts, see ``TopValues``.
      rows: of each value of ``top.table`` in each segment, int64 [num_values, num_segments]. Below the count, by at
        most the error, for values that were dropped and came back.
      clicks: on each value, int64 [num_values], among its ``rows``.
      total: values in each segment, with those that ``top`` has dropped, int64 [num_segments].
    """

    top: TopValues
    rows: np.ndarray
    clicks: np.ndarray
    total: np.ndarray

    @property
    def values(self) -> pa.Array:
        """The values that are kept, text [num_values]."""
        return self.top.table.column("value").combine_chunks()

    def merge(self, other: ValueSummary) -> ValueSummary:
        """Returns the summary of both parts, this one and ``other``."""
        top = self.top.merge(other.top)
        kept = top.table.column("value").combine_chunks()
        rows = np.zeros((len(kept), self.rows.shape[1]), np.int64)
        clicks = np.zeros(len(kept), np.int64)
        for part in (self, other):
            positions = pc.index_in(kept, value_set=part.values)
            found = pc.is_valid(positions).to_numpy(zero_copy_only=False)
            positions = positions.drop_null().to_numpy()
            rows[found] += part.rows[positions]
            clicks[found] += part.clicks[positions]
        return ValueSummary(top, rows, clicks, self.total + other.total)

    def in_segments(self, chosen: Sequence[Sequence[int]]) -> ValueSummary:
        """Returns the summary of unions of segments: ``chosen`` holds the indices of each union."""
        rows = np.stack([self.rows[:, indices].sum(axis=1) for indices in chosen], axis=1)
        return dataclasses.replace(self, rows=rows, total=sum_segments(self.total, chosen))

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``from_dict`` takes, ready for JSON."""
        return {
            "top": {
                "values": self.values.to_pylist(),
                "counts": self.top.table.column("count").to_pylist(),
                "limit": self.top.limit,
                "error": self.top.error,
            },
            "rows": self.rows.tolist(),
            "clicks": self.clicks.tolist(),
            "total": self.total.tolist(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ValueSummary:
        """Returns the summary whose ``to_dict`` gave ``content``."""
        total = np.array(content["total"], np.int64)
        rows = np.array(content["rows"], np.int64).reshape(-1, len(total))
        return cls(TopValues.from_dict(content["top"]), rows, np.array(content["clicks"], np.int64), total)
