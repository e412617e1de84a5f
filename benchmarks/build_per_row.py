"""One measured build by Beam, row by row: python -m benchmarks.build_per_row LOG_DIR OUTPUT_DIR TIMES_JSON.

What a team writes first: ReadFromText, a dict per row, a count per value, a dictionary look-up, tf.train.Example,
WriteToTFRecord; on Beam's in-process engine. Ids and scaling are the project's, so that the records can be compared.
"""

import csv
import json
import math
import pathlib
import sys
import time

import apache_beam as beam
import tensorflow as tf
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from benchmarks.wide_log import LOG, SPEC
from clsd_tf.spec.feature_spec import FeatureSpec, load_spec
from clsd_tf.spec.number_features import NumberFeature
from clsd_tf.storage.dataset_dir import SPLITS

_PARSERS = {"int64": int, "float": float, "string": str}
_FIRST_ID = 2  # 0 is missing, 1 is out of vocabulary.


class ParseFn(beam.DoFn):
    """A line -> the row as a dict."""

    def __init__(self, types: dict[str, str]):
        self._types = types

    def process(self, line):
        values = next(csv.reader([line]))
        yield {name: _PARSERS[kind](text) for (name, kind), text in zip(self._types.items(), values, strict=True)}


class MomentsFn(beam.CombineFn):
    """Numbers -> (mean, standard deviation)."""

    def create_accumulator(self):
        return 0, 0.0, 0.0

    def add_input(self, accumulator, value):
        count, total, squares = accumulator
        return count + 1, total + value, squares + value * value

    def merge_accumulators(self, accumulators):
        return tuple(map(sum, zip(*accumulators, strict=True)))

    def extract_output(self, accumulator):
        count, total, squares = accumulator
        mean = total / count
        return mean, math.sqrt(max(squares / count - mean * mean, 0.0))


def vocabulary(name_and_counts) -> tuple[str, dict]:
    """(feature, (value, count) of each value) -> (feature, {value: id}), by count, ties by text."""
    name, counts = name_and_counts
    ordered = sorted(counts, key=lambda entry: (-entry[1], str(entry[0])))
    return name, {value: _FIRST_ID + rank for rank, (value, _) in enumerate(ordered)}


def encode(row: dict, columns: dict[str, str], vocabularies: dict, moments: dict) -> bytes:
    """A row -> a serialized tf.train.Example."""
    example = tf.train.Example()
    feature = example.features.feature
    feature["label"].int64_list.value.append(row["click"])
    feature["event_time"].int64_list.value.append(row["time_ms"] * 1000)
    for name, column in columns.items():
        if name in moments:
            mean, deviation = moments[name]
            feature[name].float_list.value.append((row[column] - mean) / deviation)
        else:
            feature[name].int64_list.value.append(vocabularies[name].get(row[column], 1))
    return example.SerializeToString()


def encoded_splits(rows: beam.PCollection, spec: FeatureSpec) -> dict[str, beam.PCollection]:
    """Rows as dicts -> serialized examples of each split; fitted on the training split."""
    columns = {feature.name: feature.column for feature in spec.features}
    cut_offs = [round(moment.timestamp() * 1000) for moment in (spec.split.validation_from, spec.split.test_from)]
    splits = rows | "Split" >> beam.Partition(
        lambda row, _: sum(row["time_ms"] >= cut_off for cut_off in cut_offs), len(SPLITS)
    )
    learned = _fit(splits[0], spec)
    return {
        name: part | f"Encode_{name}" >> beam.Map(encode, columns, *learned)
        for name, part in zip(SPLITS, splits, strict=True)
    }


def _fit(train: beam.PCollection, spec: FeatureSpec) -> tuple[beam.pvalue.AsDict, beam.pvalue.AsDict]:
    """The vocabularies and moments of the features, by name."""
    numeric = {feature.name: feature.column for feature in spec.features_of(NumberFeature)}
    categorical = {feature.name: feature.column for feature in spec.features if feature.name not in numeric}
    vocabularies = (
        train
        | "Values" >> beam.FlatMap(lambda row: [((name, row[column]), 1) for name, column in categorical.items()])
        | "Count" >> beam.CombinePerKey(sum)
        | "ByFeature" >> beam.MapTuple(lambda key, count: (key[0], (key[1], count)))
        | "Together" >> beam.GroupByKey()
        | "Vocabulary" >> beam.Map(vocabulary)
    )
    moments = (
        train
        | "Numbers" >> beam.FlatMap(lambda row: [(name, row[column]) for name, column in numeric.items()])
        | "Moments" >> beam.CombinePerKey(MomentsFn())
    )
    return beam.pvalue.AsDict(vocabularies), beam.pvalue.AsDict(moments)


def read_rows(pipeline: beam.Pipeline, spec: FeatureSpec, log: pathlib.Path) -> beam.PCollection:
    lines = pipeline | "Read" >> beam.io.ReadFromText(str(log), skip_header_lines=1)
    return lines | "Parse" >> beam.ParDo(ParseFn(spec.column_types))


def build(spec: FeatureSpec, log: pathlib.Path, output: pathlib.Path) -> None:
    """Writes train, validation and test as TFRecord files below ``output``."""
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        for name, examples in encoded_splits(read_rows(pipeline, spec, log), spec).items():
            _ = examples | f"Write_{name}" >> beam.io.WriteToTFRecord(str(output / name), file_name_suffix=".tfrecord")


if __name__ == "__main__":
    log_dir, output, times = map(pathlib.Path, sys.argv[1:])
    spec = load_spec(log_dir / SPEC)
    begin = time.time()
    build(spec, log_dir / LOG, output)
    times.write_text(json.dumps({"begin": begin, "end": time.time()}))
