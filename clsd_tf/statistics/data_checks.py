"""Checks of data statistics: against what the spec expects, and for drift against a baseline.

The same comparison serves splits (train and test), days or data sets, and training data and served requests (skew).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.stats

from clsd_tf.spec.expectations import DriftLimits, Expectation
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.model_inputs import OTHER_GROUP
from clsd_tf.statistics.column_summaries import NumberSummary, ValueSummary
from clsd_tf.statistics.data_statistics import ALL_ROWS, ColumnStatistics, DataStatistics, Segment
from clsd_tf.statistics.sketches import Histogram
from clsd_tf.statistics.small_groups import MIN_GROUP_USERS

_NUM_BINS = 20
_MIN_COUNT = 10  # Values that both sides together have more rarely are one value to the divergence.
_TAIL = 1e-4  # How often chance alone may pass for drift, per measure.
_STANDARD_ERRORS = 4
CLICKS = "clicks"  # Stands for the column in measures of a segment's click rate.
_LIMIT_OF = {
    "l_infinity": "max_l_infinity",
    "jensen_shannon": "max_jensen_shannon",
    "mean_change": "max_mean_change",
    "missing_change": "max_missing_change",
    "click_rate_change": "max_click_rate_change",
    "unseen": "max_unseen",
}


@dataclasses.dataclass(frozen=True, order=True)
class Anomaly:
    """Data that is not as it should be.

    Attributes:
      column: raw input, or ``clicks`` for a click rate.
      group: user group and label; "" for all rows.
      kind: below_min, above_max, unexpected_values, missing, or the kind of a ``Drift``.
      received: the number found.
      allowed: its limit; for drift, limit and sampling error together.
      message: a sentence with both. Holds no values of columns but smallest and largest numbers.
    """

    column: str
    group: str
    kind: str
    received: float
    allowed: float
    message: str


@dataclasses.dataclass(frozen=True)
class Drift:
    """One measure of how data differ from a baseline.

    Attributes:
      column: raw input, or ``clicks`` for a click rate.
      group: user group and label; "" for all rows.
      kind: l_infinity, jensen_shannon, mean_change, missing_change, click_rate_change or unseen, see ``DriftLimits``.
      value: >= 0.
      sampling_error: what the value may be by chance when nothing has changed, if rows were independent. Rows of one
        user are alike, so chance explains somewhat more.
    """

    column: str
    group: str
    kind: str
    value: float
    sampling_error: float


def find_anomalies(statistics: DataStatistics, expectations: Mapping[str, Expectation]) -> list[Anomaly]:
    """Finds the columns that break an expectation.

    Args:
      statistics: of any rows.
      expectations: column -> what is expected of it; ``FeatureSpec.expectations``.

    Returns:
      An anomaly for each expectation that does not hold, sorted.

    Raises:
      ValueError: the statistics, made with another spec, lack what an expectation needs.
    """
    found: list[Anomaly] = []
    for name, expectation in expectations.items():
        _check_can_be_checked(name, statistics.columns.get(name), expectation)
        found += _column_anomalies(name, statistics.columns[name], int(statistics.rows[0]), expectation)
    return sorted(found)


def _check_can_be_checked(name: str, column: ColumnStatistics | None, expectation: Expectation) -> None:
    if column is None:
        lacking = "without the column"
    elif expectation.has_range and column.numbers is None:
        lacking = "without its numbers, which min and max need"
    elif expectation.values is not None and column.values is None:
        lacking = "without its values, which the list needs"
    else:
        return
    raise ValueError(
        f"what is expected of column {name!r} must be in the statistics of the build. Received: statistics {lacking}. "
        "Build the dataset again with this spec, or check it with the spec that it was built with"
    )


def _column_anomalies(name: str, column: ColumnStatistics, rows: int, expectation: Expectation) -> Iterator[Anomaly]:
    share = column.missing[0] / max(rows, 1)
    if expectation.max_missing is not None and share > expectation.max_missing:
        yield _anomaly(name, "missing", share, expectation.max_missing, "share of missing values")
    numbers = column.numbers
    if numbers and numbers.minimum is not None and numbers.maximum is not None:
        if expectation.min is not None and numbers.minimum < expectation.min:
            yield _anomaly(name, "below_min", numbers.minimum, expectation.min, "smallest number", "at least")
        if expectation.max is not None and numbers.maximum > expectation.max:
            yield _anomaly(name, "above_max", numbers.maximum, expectation.max, "largest number")
    if column.values and expectation.values is not None:
        unexpected = _count_unexpected(column.values, expectation.values)
        if unexpected:
            share = unexpected / column.values.total[0]
            yield _anomaly(name, "unexpected_values", share, 0.0, "share of values that are not listed")


def _count_unexpected(found: ValueSummary, expected: Sequence[str]) -> int:
    """Occurrences of other values than the expected ones; at least so many where not all values are counted."""
    is_expected = pc.is_in(found.values, value_set=pa.array(expected, pa.string())).to_numpy(zero_copy_only=False)
    kept = int(found.rows[~is_expected, 0].sum())
    # Values that were dropped are in the total alone, and each expected one may be among them as far as the error goes.
    rest = int(found.total[0] - found.rows[is_expected, 0].sum()) - found.top.error * len(set(expected))
    return max(kept, rest)


def _anomaly(column: str, kind: str, received: float, allowed: float, what: str, relation: str = "at most") -> Anomaly:
    message = f"{column}: {what} must be {relation} {allowed:.6g}. Received: {received:.6g}"
    return Anomaly(column, "", kind, float(received), float(allowed), message)


def compare(
    baseline: DataStatistics, new: DataStatistics, spec: FeatureSpec, min_group_users: int = MIN_GROUP_USERS
) -> list[Anomaly]:
    """Finds drift from a baseline.

    Args:
      baseline: statistics of the rows that are as they should be.
      new: statistics of other rows.
      spec: its ``drift`` has the limits, unless the column has some of its own.
      min_group_users: smaller user groups are part of "other".

    Returns:
      The measures that exceed limit and sampling error together, as sorted anomalies.
    """
    return find_drift(measure_drift(baseline, new, min_group_users), spec)


def find_drift(measures: Sequence[Drift], spec: FeatureSpec) -> list[Anomaly]:
    """Picks the measures that exceed their limit and their sampling error together.

    Args:
      measures: from ``measure_drift``.
      spec: its ``drift`` has the limits, unless the column has some of its own.

    Returns:
      An anomaly for each, sorted.
    """
    found = []
    for drift in measures:
        limit = getattr(_limits(spec, drift.column), _LIMIT_OF[drift.kind])
        if limit is None or drift.value <= limit + drift.sampling_error:
            continue
        where = f"{drift.column} of {drift.group}" if drift.group else drift.column
        message = (
            f"{where}: {drift.kind} must be at most {limit:.6g}, or {limit + drift.sampling_error:.6g} with the "
            f"sampling error. Received: {drift.value:.6g}"
        )
        allowed = limit + drift.sampling_error
        found.append(Anomaly(drift.column, drift.group, drift.kind, drift.value, allowed, message))
    return sorted(found)


def _limits(spec: FeatureSpec, column: str) -> DriftLimits:
    expectation = spec.expectations.get(column)
    return expectation.drift if expectation and expectation.drift else spec.drift


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Two sets of rows beside each other, ready for a report.

    Attributes:
      baseline_name: what a reader calls the baseline, for example ``train``.
      new_name: likewise the other.
      baseline: its statistics, with small user groups merged.
      new: likewise.
      measures: all of them.
      anomalies: the measures that exceed their limits, sorted.
    """

    baseline_name: str
    new_name: str
    baseline: DataStatistics
    new: DataStatistics
    measures: tuple[Drift, ...]
    anomalies: tuple[Anomaly, ...]

    @property
    def title(self) -> str:
        """Heading of a report's section."""
        return f"{self.baseline_name} → {self.new_name}"


def contrast(
    baseline_name: str, baseline: DataStatistics, new_name: str, new: DataStatistics, spec: FeatureSpec
) -> Contrast:
    """Measures and judges the drift from ``baseline`` to ``new``.

    Args:
      baseline_name: what a reader calls the baseline.
      baseline: its statistics.
      new_name: likewise of the other rows.
      new: their statistics.
      spec: has the limits.

    Returns:
      All measures, and those that are too large.
    """
    measures = measure_drift(baseline, new)
    return Contrast(
        baseline_name,
        new_name,
        baseline.merge_small_groups(),
        new.merge_small_groups(),
        tuple(measures),
        tuple(find_drift(measures, spec)),
    )


def measure_drift(baseline: DataStatistics, new: DataStatistics, min_group_users: int = MIN_GROUP_USERS) -> list[Drift]:
    """Measures all columns, in all rows and in each user group that both sides have.

    Args:
      baseline: statistics of the rows that are as they should be.
      new: statistics of other rows; may lack columns.
      min_group_users: groups of fewer users are part of "other", which is compared where it holds the same groups on
        both sides.

    Returns:
      All measures but those without rows on a side, and without the click rates of served requests.
    """
    left, right = (side.merge_small_groups(min_group_users) for side in (baseline, new))
    measures: list[Drift] = []
    for segment in _common_segments(left, right):
        pair = _Pair(left, right, segment)
        measures += pair.click_rate()
        for name in left.columns:
            if name in right.columns:  # Another version of the data may lack a feature.
                measures += pair.column(name)
    return measures


def _common_segments(left: DataStatistics, right: DataStatistics) -> list[Segment]:
    common = [segment for segment in left.segments if segment in right.segments]
    differing = {group for group, _ in set(left.segments) ^ set(right.segments)}
    return [segment for segment in common if segment[1] != OTHER_GROUP or segment[0] not in differing]


class _Pair:
    """One segment of two statistics."""

    def __init__(self, left: DataStatistics, right: DataStatistics, segment: Segment):
        self._sides = (left, right)
        self._indices = [side.segments.index(segment) for side in self._sides]
        self._group = "" if segment == ALL_ROWS else " ".join(segment)
        self._rows = self._of([side.rows for side in self._sides])

    def _of(self, arrays: Sequence[np.ndarray]) -> list[float]:
        return [float(array[index]) for array, index in zip(arrays, self._indices, strict=True)]

    def _drift(self, column: str, kind: str, value: float, error: float) -> Drift:
        return Drift(column, self._group, kind, float(value), float(error))

    def click_rate(self) -> Iterator[Drift]:
        clicks = self._of([side.clicks for side in self._sides])
        if all(side.has_labels for side in self._sides) and all(self._rows) and clicks[0]:
            before, after = (count / rows for count, rows in zip(clicks, self._rows, strict=True))
            error = _share_error(clicks, self._rows) / before
            yield self._drift(CLICKS, "click_rate_change", abs(after / before - 1), error)

    def column(self, name: str) -> Iterator[Drift]:
        if not all(self._rows):
            return
        columns = [side.columns[name] for side in self._sides]
        missing = self._of([column.missing for column in columns])
        before, after = (count / rows for count, rows in zip(missing, self._rows, strict=True))
        yield self._drift(name, "missing_change", abs(after - before), _share_error(missing, self._rows))
        values = [column.values for column in columns if column.values]
        if len(values) == 2:
            yield from self._values(name, values)
        numbers = [column.numbers for column in columns if column.numbers]
        if len(numbers) == 2:
            yield from self._mean(name, numbers)
        histograms = [column.histogram for column in columns if column.histogram and column.histogram.count]
        if len(histograms) == 2 and not self._group:  # Histograms are kept of all rows alone.
            counts = np.stack(binned_shares(*histograms)[1:], axis=1) * [histogram.count for histogram in histograms]
            yield self._divergence(name, counts)

    def _values(self, name: str, sides: Sequence[ValueSummary]) -> Iterator[Drift]:
        totals = np.array(self._of([side.total for side in sides]))
        if not totals.all():
            return
        counts = self._aligned_counts(sides, totals)
        shares = counts / totals
        largest = int(np.argmax(np.abs(shares[:, 0] - shares[:, 1]))) if len(counts) else None
        if largest is not None:
            error = _share_error(counts[largest], totals)
            yield self._drift(name, "l_infinity", abs(shares[largest, 0] - shares[largest, 1]), error)
        frequent = counts[counts.sum(axis=1) >= _MIN_COUNT]
        yield self._divergence(name, np.vstack([frequent, np.maximum(totals - frequent.sum(axis=0), 0)]))
        if not any(side.top.error for side in sides):  # Otherwise nobody knows all values of a side.
            known = pc.is_in(sides[1].values, value_set=sides[0].values)
            unseen = totals[1] - sides[1].rows[known.to_numpy(zero_copy_only=False), self._indices[1]].sum()
            yield self._drift(name, "unseen", unseen / totals[1], 0.0)

    def _aligned_counts(self, sides: Sequence[ValueSummary], totals: np.ndarray) -> np.ndarray:
        """Counts of the values that either side has kept, [num_values, 2]."""
        kept = pc.unique(pa.concat_arrays([side.values for side in sides]))
        counts, known = np.zeros((len(kept), 2)), np.zeros((len(kept), 2), bool)
        for place, side in enumerate(sides):
            positions = pc.index_in(side.values, value_set=kept).to_numpy(zero_copy_only=False)
            counts[positions, place] = side.rows[:, self._indices[place]]
            known[positions, place] = True
        # What a side has not kept may be as frequent as its error allows: taken as near the other side as that goes.
        alike = (counts / totals)[:, ::-1] * totals
        return np.where(known, counts, np.minimum(alike, [side.top.error for side in sides]))

    def _mean(self, name: str, sides: Sequence[NumberSummary]) -> Iterator[Drift]:
        counts = self._of([side.count for side in sides])
        before, after = self._of([side.mean for side in sides])
        std = sides[0].std[self._indices[0]]
        if all(counts) and std > 0:
            error = _STANDARD_ERRORS * np.sqrt(1 / counts[0] + 1 / counts[1])
            yield self._drift(name, "mean_change", abs(after - before) / std, error)

    def _divergence(self, name: str, counts: np.ndarray) -> Drift:
        totals = counts.sum(axis=0)
        left, right = (counts / totals).T
        degrees = max(np.count_nonzero(counts.sum(axis=1)) - 1, 1)
        # The divergence is nearly the sum of (p - q)^2 / (8 ln 2 m), which is chi-squared but for a factor.
        error = scipy.stats.chi2.isf(_TAIL, degrees) * (1 / totals).sum() / (8 * np.log(2))
        return self._drift(name, "jensen_shannon", jensen_shannon(left, right), error)


def jensen_shannon(left: np.ndarray, right: np.ndarray) -> float:
    """Computes the Jensen-Shannon divergence, (KL(left || m) + KL(right || m)) / 2 with m = (left + right) / 2.

    Args:
      left: shares of the values, [num_values].
      right: shares of the same values.

    Returns:
      Bits in [0, 1]: 0 alike, 1 nothing in common.
    """
    middle = (left + right) / 2
    return float(sum(_relative_entropy(side, middle) for side in (left, right)) / 2)


def _relative_entropy(left: np.ndarray, right: np.ndarray) -> float:
    positive = left > 0
    return float((left[positive] * np.log2(left[positive] / right[positive])).sum())


def binned_shares(left: Histogram, right: Histogram) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts two histograms into up to 20 bins that hold equally many of both sides' values.

    Args:
      left: of one side.
      right: of the other.

    Returns:
      The upper ends of the bins but the last, which has none, [num_bins - 1]; and the share of left and of right in
      each, [num_bins].
    """
    fractions = np.arange(1, _NUM_BINS) / _NUM_BINS
    ends = np.unique(left.merge(right).quantiles(fractions))
    of_left, of_right = (np.diff(np.concatenate([[0.0], side.share_up_to(ends), [1.0]])) for side in (left, right))
    return ends, of_left, of_right


def _share_error(counts: Sequence[float] | np.ndarray, totals: Sequence[float] | np.ndarray) -> float:
    """4 standard errors of the difference of two shares of one size."""
    share = sum(counts) / sum(totals)
    return float(_STANDARD_ERRORS * np.sqrt(share * (1 - share) * sum(1 / total for total in totals)))
