"""Vocabularies: values of the training split counted, ranked, and grown from those of an earlier dataset.

Counts add up exactly, so a vocabulary depends on the data alone; only beyond ``max_tracked`` distinct values does the
order of merges matter, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.spec.feature_spec import FeatureSpec, meaning_differences
from clsd_tf.spec.id_features import IdFeature, Vocabulary
from clsd_tf.spec.model_inputs import NumericStatistics
from clsd_tf.spec.number_features import NumberFeature
from clsd_tf.spec.validation import SpecError
from clsd_tf.statistics.sketches import TopValues
from clsd_tf.storage.dataset_dir import DatasetDir

_UNITS_PER_WEIGHT = 1_000_000  # Weights are summed as whole millionths: sums of floats depend on their order.


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyCounts:
    """Per vocabulary, how often each value occurs in training rows.

    Attributes:
      values: vocabulary name -> counts of its values; millionths of sample weight for a weighted vocabulary.
    """

    values: Mapping[str, TopValues]

    @classmethod
    def of(cls, table: pa.Table, spec: FeatureSpec) -> VocabularyCounts:
        """Counts the values of joined training rows.

        Missing and empty values do not count. Nor do values with a line break, which so stay out of vocabulary: a
        vocabulary file holds one value a line.

        Args:
          table: the raw columns of the spec's vocabularies (string or int64) and, for weighted ones, ``sample_weight``.
          spec: names the vocabularies and their rules.

        Returns:
          Counts that can be merged with those of other rows.
        """
        rules = spec.vocabularies
        features = [feature for feature in spec.features_of(IdFeature) if feature.name in rules]
        return cls({feature.name: _count(table, feature, rules[feature.name]) for feature in features})

    def merge(self, other: VocabularyCounts) -> VocabularyCounts:
        """Adds ``other``, of other rows.

        Returns:
          The counts of both sets of rows.
        """
        return VocabularyCounts({name: counts.merge(other.values[name]) for name, counts in self.values.items()})

    @staticmethod
    def merge_all(parts: Iterable[VocabularyCounts]) -> VocabularyCounts:
        """Merges parts in their order.

        Equals are merged with equals: folding each part into the growing total would count the total again each time.

        Args:
          parts: at least one.

        Returns:
          Counts of all rows.
        """
        pending: list[tuple[int, VocabularyCounts]] = []  # (log2 of the number of parts, their counts), largest first.
        for part in parts:
            level = 0
            while pending and pending[-1][0] == level:
                part, level = pending.pop()[1].merge(part), level + 1
            pending.append((level, part))
        return functools.reduce(lambda right, left: left.merge(right), [part for _, part in reversed(pending)])

    def errors(self, spec: FeatureSpec) -> dict[str, float]:
        """Bounds the error of the counts.

        Args:
          spec: has the rules of the vocabularies.

        Returns:
          Vocabulary name -> by how much a value's count, or sum of weights, may be too low; 0 where exact.
        """
        return {name: counts.error / _units(spec.vocabularies[name]) for name, counts in self.values.items()}


def _units(rule: Vocabulary) -> int:
    """Units that one row of weight 1 adds to a count."""
    return _UNITS_PER_WEIGHT if rule.weighted else 1


def _count(table: pa.Table, feature: IdFeature, rule: Vocabulary) -> TopValues:
    weights = table.column("sample_weight") if rule.weighted else None
    values, counts = _distinct(table.column(feature.column), weights)
    if feature.value_separator:
        lists = pc.split_pattern(values, feature.value_separator)
        values, counts = _summed(pc.list_flatten(lists), counts.take(pc.list_parent_indices(lists)))
    kept = pc.and_(pc.not_equal(values, ""), pc.greater(counts, 0))
    for line_break in ("\n", "\r"):
        kept = pc.and_not(kept, pc.match_substring(values, line_break))
    return TopValues.of_counts(values.filter(kept), counts.filter(kept), rule.max_tracked)


def _distinct(column: pa.ChunkedArray, weights: pa.ChunkedArray | None) -> tuple[pa.Array, pa.Array]:
    """(distinct values as text, without null; int64 count or millionths of weight of each)."""
    # Integers are counted as integers: only the distinct ones become text.
    if weights is None:
        counted = pc.value_counts(column)
        values, counts = counted.field("values"), counted.field("counts")
    else:
        units = pc.round(pc.multiply(weights.cast(pa.float64()), float(_UNITS_PER_WEIGHT))).cast(pa.int64())
        values, counts = _summed(column, units)
    known = values.is_valid()
    return values.filter(known).cast(pa.string()), counts.filter(known)


def _summed(
    values: pa.Array | pa.ChunkedArray, counts: pa.Array | pa.ChunkedArray
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """(distinct values, the sum of the counts of each)."""
    table = pa.table({"value": values, "count": counts})
    summed = table.group_by("value", use_threads=False).aggregate([("count", "sum")])
    return summed.column("value"), summed.column("count_sum")


def rank(counts: TopValues, rule: Vocabulary, previous: Sequence[str] = ()) -> list[str]:
    """Orders values by their ids: the previous ones in their places, then new ones by falling count.

    An id is 1 + num_oov_indices + place, so the ids of the previous values never change their meaning. They stay even
    if ``min_count`` or ``max_size`` would now leave them out. Ties are in the order of the text.

    Args:
      counts: of one vocabulary.
      rule: which values are kept.
      previous: values of the vocabulary that goes on.

    Returns:
      The lines of the vocabulary file.
    """
    table = counts.table.filter(pc.greater_equal(counts.table.column("count"), rule.min_count * _units(rule)))
    if previous:
        known = pc.is_in(table.column("value"), value_set=pa.array(previous, pa.string()))
        table = table.filter(pc.invert(known))
    new = table.sort_by([("count", "descending"), ("value", "ascending")]).column("value")
    if rule.max_size is not None:
        new = new.slice(0, max(0, rule.max_size - len(previous)))
    return [*previous, *new.to_pylist()]


def previous_numbers(dataset: DatasetDir, spec: FeatureSpec) -> dict[str, NumericStatistics]:
    """Reads the statistics of numeric features that stay as they were fitted.

    Quantile buckets give ids, and scaled numbers meet weights that were trained on the earlier scale.

    Args:
      dataset: the earlier one.
      spec: of the dataset that grows from it.

    Returns:
      Name -> statistics, of the features that both have.
    """
    numeric = {feature.name for feature in spec.features_of(NumberFeature)}
    return {name: found for name, found in dataset.statistics.numeric.items() if name in numeric}


def check_compatible(spec: FeatureSpec, previous: FeatureSpec) -> None:
    """Checks that every feature and user group that two specs share means the same in both.

    Values of vocabularies aside: those of ``previous`` are kept in their places. Features may come and go.

    Args:
      spec: of the dataset that grows.
      previous: of the dataset that it grows from.

    Raises:
      SpecError: names the features and what differs.
    """
    problems = meaning_differences(spec, previous)
    if problems:
        raise SpecError(
            "a dataset that grows from another keeps the meaning of its ids and numbers, so these must be as in the "
            "spec of the other:\n  " + "\n  ".join(problems) + "\nKeep them, give the feature another name, or build "
            "without an earlier dataset"
        )
