"""Summaries of joined rows, which a build learns from: counts of the splits, moments and data statistics.

Everything here is a summary of some rows that can be merged with another. Sums of floats depend on their order, so
summaries are made per unit of users and merged in the order of the units, whichever worker made them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clsd_tf.data.examples import arrow_to_tensors
from clsd_tf.data.transform import group_ids
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.model_inputs import NumericStatistics
from clsd_tf.spec.number_features import NumberFeature
from clsd_tf.spec.user_groups import UserGroup
from clsd_tf.statistics.data_statistics import DataStatistics
from clsd_tf.statistics.sketches import Histogram
from pipelines.rows.joins import EVENT_TIME
from pipelines.rows.outcome import BadInputError


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """Rows, clicks, intense rows and time range of a split (microseconds), and rows and clicks of its user groups."""

    rows: int = 0
    clicks: int = 0
    intense: int = 0
    first: int | None = None
    last: int | None = None
    groups: Mapping[str, Mapping[str, Sequence[int]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, spec: FeatureSpec) -> SplitSummary:
        """Counts the rows of a split, at least one.

        Args:
          table: joined rows.
          spec: declares the user groups.
        """
        label = table.column("label").to_numpy()
        times = table.column(EVENT_TIME).to_numpy()
        return cls(
            rows=table.num_rows,
            clicks=int(label.sum()),
            intense=int(table.column("intensity_label").to_numpy().sum()),
            first=int(times.min()),
            last=int(times.max()),
            groups={group.name: _group_counts(group, table, label, spec) for group in spec.user_groups},
        )

    def merge(self, other: SplitSummary) -> SplitSummary:
        """Adds ``other``, of another part of the rows.

        Returns:
          The summary of both parts.
        """
        if not self.rows or not other.rows:
            return self if self.rows else other
        groups = {
            name: {
                label: [mine + theirs for mine, theirs in zip(pair, other.groups[name][label], strict=True)]
                for label, pair in labels.items()
            }
            for name, labels in self.groups.items()
        }
        return SplitSummary(
            self.rows + other.rows,
            self.clicks + other.clicks,
            self.intense + other.intense,
            min(moment for moment in (self.first, other.first) if moment is not None),
            max(moment for moment in (self.last, other.last) if moment is not None),
            groups,
        )


def _group_counts(group: UserGroup, table: pa.Table, label: np.ndarray, spec: FeatureSpec) -> dict[str, list[int]]:
    raw = group.raw_input(spec.column_types)
    ids = group_ids(group, arrow_to_tensors(table, [raw])[group.column]).numpy()
    rows = np.bincount(ids, minlength=len(group.labels))
    clicks = np.bincount(ids, weights=label, minlength=len(group.labels))
    return {name: [int(rows[index]), int(clicks[index])] for index, name in enumerate(group.labels)}


@dataclasses.dataclass(frozen=True)
class NumericSummary:
    """Count, mean, squared deviation, minimum and maximum of a numeric feature, merged by Chan et al. (1979).

    ``histogram`` is there for features in quantile buckets.
    """

    count: int
    mean: float
    deviation: float
    minimum: float
    maximum: float
    histogram: Histogram | None

    @classmethod
    def of(cls, table: pa.Table, feature: NumberFeature) -> NumericSummary | None:
        """Sums up the values of a feature.

        Args:
          table: joined rows of the training split.
          feature: says which column, and if log1p comes first.

        Returns:
          Its summary; None where no row has a value.
        """
        values = table.column(feature.column).drop_null().to_numpy().astype(np.float64)
        if not len(values):
            return None
        values = np.log1p(values) if feature.log1p else values
        mean = float(values.mean())
        histogram = Histogram.of_floats(values) if feature.scaling == "quantile_buckets" else None
        deviation = float(((values - mean) ** 2).sum())
        return cls(len(values), mean, deviation, float(values.min()), float(values.max()), histogram)

    def merge(self, other: NumericSummary) -> NumericSummary:
        """Adds ``other``, of another part of the values.

        Returns:
          The summary of both parts.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        return NumericSummary(
            count,
            self.mean + delta * other.count / count,
            self.deviation + other.deviation + delta**2 * self.count * other.count / count,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.histogram.merge(other.histogram) if self.histogram and other.histogram else None,
        )

    def statistics(self, feature: NumberFeature) -> NumericStatistics:
        """Derives what the transform needs.

        Args:
          feature: that was summed up.

        Returns:
          Moments, and for quantile buckets the distinct inner quantiles as boundaries.
        """
        boundaries: tuple[float, ...] = ()
        if self.histogram:
            fractions = np.arange(1, feature.num_buckets) / feature.num_buckets
            boundaries = tuple(sorted(set(self.histogram.quantiles(fractions).tolist())))
        std = (self.deviation / self.count) ** 0.5
        return NumericStatistics(self.count, self.mean, std, self.minimum, self.maximum, boundaries)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        histogram = self.histogram.to_dict() if self.histogram else None
        return {**vars(self), "histogram": histogram}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> NumericSummary:
        """Reads a ``value`` of ``to_dict``.

        Returns:
          An equal summary.
        """
        histogram = Histogram.from_dict(value["histogram"]) if value["histogram"] else None
        return cls(**{**value, "histogram": histogram})


def fitted_numbers(
    spec: FeatureSpec, summaries: Mapping[str, Mapping[str, Any]], previous: Mapping[str, NumericStatistics]
) -> dict[str, NumericStatistics]:
    """Derives the statistics of the features that become numbers.

    Args:
      spec: declares the features.
      summaries: ``NumericSummary.to_dict`` of the features that have a value in training rows, by name.
      previous: of an earlier dataset, which stay as they are.

    Returns:
      Name of the feature -> its statistics.

    Raises:
      BadInputError: a feature has no value.
    """
    fitted = dict(previous)
    for feature in spec.features_of(NumberFeature):
        if feature.name in fitted:
            continue
        if feature.name not in summaries:
            raise BadInputError(
                f"numeric feature {feature.name!r} has no value in the training split. Received: column "
                f"{feature.column!r} with only missing values. Remove the feature"
            )
        fitted[feature.name] = NumericSummary.from_dict(summaries[feature.name]).statistics(feature)
    return fitted


@dataclasses.dataclass(frozen=True)
class FitSummary:
    """All that a build learns from joined rows but the vocabularies.

    Attributes:
      counts: of rows by what became of them: duplicates, rows in no split, rows without a profile.
      splits: by split.
      numeric: by feature, of training rows.
      statistics: by split.
    """

    counts: Counter
    splits: Mapping[str, SplitSummary]
    numeric: Mapping[str, NumericSummary]
    statistics: Mapping[str, DataStatistics]

    @classmethod
    def of(cls, counts: Counter, by_split: Mapping[str, pa.Table], spec: FeatureSpec) -> FitSummary:
        """Sums up the joined rows of some users.

        Args:
          counts: see the class.
          by_split: the rows of each split that has any.
          spec: declares what is learned.
        """
        train = by_split.get("train")
        numeric = {}
        if train is not None:
            found = {feature.name: NumericSummary.of(train, feature) for feature in spec.features_of(NumberFeature)}
            numeric = {name: summary for name, summary in found.items() if summary}
        return cls(
            counts,
            {split: SplitSummary.of(table, spec) for split, table in by_split.items()},
            numeric,
            {split: DataStatistics.of(table, spec) for split, table in by_split.items()},
        )

    @classmethod
    def empty(cls) -> FitSummary:
        """Gives the summary of no rows."""
        return cls(Counter(), {}, {}, {})

    def merge(self, other: FitSummary) -> FitSummary:
        """Adds ``other``, of another part of the rows.

        Returns:
          The summary of both parts.
        """
        return FitSummary(
            self.counts + other.counts,
            _merge_by_name(self.splits, other.splits),
            _merge_by_name(self.numeric, other.numeric),
            _merge_by_name(self.statistics, other.statistics),
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; without the data statistics, which have a file of their own."""
        return {
            "counts": dict(self.counts),
            "splits": {name: dataclasses.asdict(entry) for name, entry in self.splits.items()},
            "numeric": {name: entry.to_dict() for name, entry in self.numeric.items()},
        }


def _merge_by_name(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for name, entry in right.items():
        merged[name] = merged[name].merge(entry) if name in merged else entry
    return merged
