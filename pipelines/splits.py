"""Which split a row belongs to, and the histogram of event times that cut-offs by fractions come from."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence

import numpy as np

from clsd_tf.hashing import mix_row_ids
from clsd_tf.tables import Split


class TimeHistogram:
    """Counts of rows per event time, mergeable and of bounded size.

    Bucket width is a power of two of microseconds and grows only when there would be more than ``MAX_BUCKETS``
    buckets, so the result depends on the data alone, not on the order of merges.
    """

    MAX_BUCKETS = 1 << 16

    def __init__(self, shift: int = 0, counts: Sequence[tuple[int, int]] = ()):
        self.shift = shift
        self.counts: Counter = Counter(dict(counts))

    def to_dict(self) -> dict:
        """The constructor's arguments, ready for JSON."""
        return {"shift": self.shift, "counts": sorted(self.counts.items())}

    def add(self, times: np.ndarray) -> TimeHistogram:
        buckets, counts = np.unique(times >> self.shift, return_counts=True)
        self.counts.update(dict(zip(buckets.tolist(), counts.tolist(), strict=True)))
        return self._coarsen()

    def merge(self, other: TimeHistogram) -> TimeHistogram:
        shift = max(self.shift, other.shift)
        merged: Counter = Counter()
        for histogram in (self, other):
            for bucket, count in histogram.counts.items():
                merged[bucket >> (shift - histogram.shift)] += count
        self.shift, self.counts = shift, merged
        return self._coarsen()

    def _coarsen(self) -> TimeHistogram:
        while len(self.counts) > self.MAX_BUCKETS:
            self.shift += 1
            coarser: Counter = Counter()
            for bucket, count in self.counts.items():
                coarser[bucket >> 1] += count
            self.counts = coarser
        return self

    def cut_offs(self, fractions: Sequence[float]) -> list[int]:
        """Times t such that about ``fraction`` of the rows lie before t; rows of one time are never separated."""
        buckets = np.array(sorted(self.counts), np.int64)
        before = np.cumsum([0] + [self.counts[bucket] for bucket in buckets.tolist()])
        ends = np.append(buckets, buckets[-1] + 1)
        nearest = [int(np.argmin(np.abs(before - fraction * before[-1]))) for fraction in fractions]
        return [int(ends[index]) << self.shift for index in nearest]


def split_cut_offs(split: Split, histogram: TimeHistogram) -> list[int]:
    """Event times in microseconds at which validation and test begin (unused by the random rule)."""
    if split.validation_from is not None:
        moments = [split.validation_from, split.test_from, split.until]
        return [_microseconds(moment) for moment in moments if moment is not None]
    return histogram.cut_offs([split.train, split.train + split.validation])


def _microseconds(moment: dt.datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def split_indices(split: Split, cut_offs: Sequence[int], times: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """0 train, 1 validation, 2 test, 3 left out, per row."""
    if split.rule == "time":
        return np.searchsorted(np.array(cut_offs, np.int64), times, side="right")
    uniform = mix_row_ids(row_ids, split.seed) / 2.0**64
    return np.searchsorted([split.train, split.train + split.validation], uniform, side="right")
