"""The Beam transforms that learn from data: split counts, vocabularies and numeric statistics."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute

from clsd_tf.artifacts import SPLITS, DatasetLayout
from clsd_tf.examples import arrow_to_tensors
from clsd_tf.features import FeatureSpec, MultiValuedFeature, NumericFeature, Vocabulary
from clsd_tf.model_inputs import NumericStatistics, RawInput
from clsd_tf.transform import group_ids
from pipelines.results import MergeCounts, write_json, write_lines


class CountSplits(beam.PTransform):
    """(split, table) -> one Counter: rows, clicks, intense rows, time range and user groups of each split."""

    def __init__(self, spec: FeatureSpec):
        super().__init__()
        self._spec = spec

    def expand(self, rows):
        spec = self._spec
        counts = rows | "CountRows" >> beam.MapTuple(lambda split, table: _count_rows(split, table, spec))
        return counts | "SumCounts" >> beam.CombineGlobally(MergeCounts())


def _count_rows(split: int, table: pa.Table, spec: FeatureSpec) -> Counter:
    name = SPLITS[split]
    label = table.column("label").to_numpy()
    counts = Counter({f"{name}/rows": len(label), f"{name}/clicks": int(label.sum())})
    counts[f"{name}/intense"] = int(table.column("intensity_label").to_numpy().sum())
    for group in spec.user_groups:
        raw = RawInput(group.column, spec.column_types[group.column])
        ids = group_ids(group, arrow_to_tensors(table, [raw])[group.column]).numpy()
        for index, group_label in enumerate(group.labels):
            counts[f"{name}/group/{group.name}/{group_label}/rows"] += int((ids == index).sum())
            counts[f"{name}/group/{group.name}/{group_label}/clicks"] += int(label[ids == index].sum())
    return counts


class FitVocabularies(beam.PTransform):
    """Training tables -> (vocabulary name, values by falling count); ties in the order of the text."""

    def __init__(self, spec: FeatureSpec):
        super().__init__()
        self._spec = spec

    def expand(self, tables):
        rules = self._spec.vocabularies
        return (
            tables
            | "CountValues" >> beam.FlatMap(_count_values, self._spec)
            | "SumValues" >> beam.CombinePerKey(sum)
            | "ByVocabulary" >> beam.MapTuple(lambda key, count: (key[0], (key[1], count)))
            | "GroupVocabulary" >> beam.GroupByKey()
            | "Rank" >> beam.MapTuple(lambda name, counts: (name, _rank(counts, rules[name])))
        )


def _count_values(table: pa.Table, spec: FeatureSpec) -> Iterator[tuple[tuple[str, str], int]]:
    for name in spec.vocabularies:
        feature = spec.feature(name)
        values = table.column(feature.column).cast(pa.string())
        if isinstance(feature, MultiValuedFeature):
            values = pa.compute.list_flatten(pa.compute.split_pattern(values, feature.separator))
        for entry in pa.compute.value_counts(values.drop_null()).to_pylist():
            # A vocabulary file holds one value a line, so a value with a line break stays out of vocabulary.
            if entry["values"] and not {"\n", "\r"} & set(entry["values"]):
                yield (name, entry["values"]), entry["counts"]


def _rank(counts: Iterable[tuple[str, int]], rule: Vocabulary) -> list[str]:
    kept = [(-count, value) for value, count in counts if count >= rule.min_count]
    return [value for _, value in sorted(kept)[: rule.max_size]]


class FitNumeric(beam.PTransform):
    """Training tables -> (feature name, NumericStatistics)."""

    def __init__(self, features: list[NumericFeature]):
        super().__init__()
        self._features = features

    def expand(self, tables):
        values = tables | "NumericValues" >> beam.FlatMap(_numeric_values, self._features)
        moments = values | "Moments" >> beam.CombinePerKey(_MomentsFn())
        quantiles = [self._quantiles(values, feature) for feature in self._features if _is_bucketised(feature)]
        if not quantiles:
            return moments
        boundaries = quantiles | "AllQuantiles" >> beam.Flatten()
        return moments | "AddBoundaries" >> beam.Map(_with_boundaries, beam.pvalue.AsDict(boundaries))

    @staticmethod
    def _quantiles(values, feature: NumericFeature):
        return (
            values
            | f"Only_{feature.name}" >> beam.Filter(lambda pair, name: pair[0] == name, feature.name)
            | f"Lists_{feature.name}" >> beam.MapTuple(lambda _, array: array.tolist())
            | f"Quantiles_{feature.name}"
            >> beam.ApproximateQuantiles.Globally(feature.num_buckets + 1, input_batched=True)
            | f"Inner_{feature.name}"
            >> beam.Map(lambda edges, name: (name, tuple(sorted(set(edges[1:-1])))), feature.name)
        )


def _is_bucketised(feature: NumericFeature) -> bool:
    return feature.scaling == "quantile_buckets"


def _numeric_values(table: pa.Table, features: list[NumericFeature]) -> Iterator[tuple[str, np.ndarray]]:
    for feature in features:
        values = table.column(feature.column).drop_null().to_numpy().astype(np.float64)
        if len(values):
            yield feature.name, np.log1p(values) if feature.log1p else values


class _MomentsFn(beam.CombineFn):
    """Count, mean, squared deviation, minimum and maximum, merged by Chan et al. (1979)."""

    def create_accumulator(self):
        return 0, 0.0, 0.0, float("inf"), float("-inf")

    def add_input(self, accumulator, values):
        mean = float(values.mean())
        part = (len(values), mean, float(((values - mean) ** 2).sum()), float(values.min()), float(values.max()))
        return self._merge(accumulator, part)

    def merge_accumulators(self, accumulators):
        merged = self.create_accumulator()
        for accumulator in accumulators:
            merged = self._merge(merged, accumulator)
        return merged

    @staticmethod
    def _merge(left, right):
        count = left[0] + right[0]
        if not count:
            return left
        delta = right[1] - left[1]
        mean = left[1] + delta * right[0] / count
        deviation = left[2] + right[2] + delta**2 * left[0] * right[0] / count
        return count, mean, deviation, min(left[3], right[3]), max(left[4], right[4])

    def extract_output(self, accumulator):
        count, mean, deviation, minimum, maximum = accumulator
        return NumericStatistics(count, mean, (deviation / count) ** 0.5, minimum, maximum)


def _with_boundaries(moments: tuple[str, NumericStatistics], boundaries: Mapping[str, tuple[float, ...]]):
    name, fitted = moments
    values = {**vars(fitted), "boundaries": boundaries.get(name, ())}
    return name, NumericStatistics(**values)


class WriteFitted(beam.PTransform):
    """Vocabularies -> one text file each; numeric statistics -> one JSON file each, for the driver to collect."""

    def __init__(self, spec: FeatureSpec, layout: DatasetLayout, numeric_dir: pathlib.Path):
        super().__init__()
        self._spec = spec
        self._vocabularies = str(layout.vocabularies)
        self._numeric_dir = str(numeric_dir)

    def expand(self, tables):
        features = [feature for feature in self._spec.features if isinstance(feature, NumericFeature)]
        vocabularies, numeric_dir = self._vocabularies, self._numeric_dir
        written = [
            tables
            | "FitVocabularies" >> FitVocabularies(self._spec)
            | "WriteVocabularies"
            >> beam.MapTuple(lambda name, values: write_lines(f"{vocabularies}/{name}.txt", values))
        ]
        if features:
            written.append(
                tables
                | "FitNumeric" >> FitNumeric(features)
                | "WriteNumeric"
                >> beam.MapTuple(lambda name, fitted: write_json(vars(fitted), f"{numeric_dir}/{name}.json"))
            )
        return written | "AllWritten" >> beam.Flatten()
