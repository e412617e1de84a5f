"""The Beam transforms of the build: read and check tables, join, split, encode shards.

Elements are Arrow tables, never single rows. Each composite takes and gives PCollections and can be tested on rows in
memory; functions on tables live in ``pipelines.checks``, ``joins`` and ``splits``.
"""

from __future__ import annotations

import hashlib
import pathlib
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf

from clsd_tf.artifacts import SPLITS, DatasetLayout
from clsd_tf.examples import RECORD_IDS, RECORD_NUMBERS, arrow_to_tensors, encode_examples
from clsd_tf.features import FeatureSpec
from clsd_tf.hashing import hash_keys, mix_row_ids
from clsd_tf.model_inputs import Statistics
from clsd_tf.transform import FeatureTransform
from pipelines.checks import parse_rows
from pipelines.joins import EVENT_TIME, Profiles, join_rows
from pipelines.results import write_lines
from pipelines.sources import ROW_ID, BadRow, RawBatch, SourceFile, read_file, tfds_batch
from pipelines.splits import TimeHistogram, split_indices

ROWS_PER_BATCH = 8192
SERVING_SAMPLE_ROWS = 10_000
_BAD, _COUNTS = "bad_rows", "counts"
_SHARD_SEED, _SAMPLE_SEED = 101, 102  # Any two different numbers: shard and sample must be independent.


class MergeTimeHistograms(beam.CombineFn):
    """Merges arrays of event times into one ``TimeHistogram``."""

    def create_accumulator(self):
        return TimeHistogram()

    def add_input(self, accumulator, times):
        return accumulator.add(times)

    def merge_accumulators(self, accumulators):
        merged = TimeHistogram()
        for accumulator in accumulators:
            merged = merged.merge(accumulator)
        return merged

    def extract_output(self, accumulator):
        return accumulator


def temporary_name(path: str) -> str:
    """A name of its own for each attempt: runners may retry a bundle or run it twice side by side."""
    return f"{path}.{secrets.token_hex(4)}.incomplete"


# --- Read and check --------------------------------------------------------------------------------------------------


class ReadTables(beam.PTransform):
    """Files -> raw batches, one table's files after the other's in parallel."""

    def __init__(self, files: list[SourceFile], spec: FeatureSpec):
        super().__init__()
        self._files = files
        self._tables = dict(spec.tables.items())

    def expand(self, pipeline):
        return (
            pipeline
            | "ListFiles" >> beam.Create(self._files)
            | "SpreadFiles" >> beam.Reshuffle()
            | "ReadBatches" >> beam.FlatMap(lambda file, tables: read_file(file, tables[file.role]), self._tables)
        )


class ReadTfds(beam.PTransform):
    """A TensorFlow Datasets split -> raw batches of the log, each example with its stable ``tfds_id``."""

    def __init__(self, builder, split: str, spec: FeatureSpec):
        super().__init__()
        self._builder = builder
        self._split = split
        self._table = spec.tables.log

    def expand(self, pipeline):
        import tensorflow_datasets as tfds  # Slow to import, and only needed here.

        config = tfds.ReadConfig(add_tfds_id=True)
        splits = self._builder.info.splits
        names = sorted(name for split in self._split.split("+") for name in splits[split].filenames)
        file_indices = {name: index for index, name in enumerate(names)}
        name = self._builder.name
        return (
            pipeline
            | "ReadFromTFDS" >> tfds.beam.ReadFromTFDS(self._builder, split=self._split, read_config=config)
            | "ToNumpy" >> beam.Map(tfds.as_numpy)
            | "Batch" >> beam.BatchElements(min_batch_size=256, max_batch_size=ROWS_PER_BATCH)
            | "ToRawBatch"
            >> beam.Map(lambda examples, table: tfds_batch(name, table, examples, file_indices), self._table)
        )


class CheckRows(beam.PTransform):
    """Raw batches -> ``rows`` (role, typed table), ``bad_rows`` (BadRow) and ``counts`` (Counter)."""

    def __init__(self, spec: FeatureSpec):
        super().__init__()
        self._spec = spec

    def expand(self, batches):
        return batches | beam.ParDo(_CheckRowsFn(self._spec)).with_outputs(_BAD, _COUNTS, main="rows")


class _CheckRowsFn(beam.DoFn):
    def __init__(self, spec: FeatureSpec):
        self._spec = spec

    def process(self, batch: RawBatch) -> Iterator:
        good, bad_rows = parse_rows(batch, self._spec)
        role = batch.file.role
        beam.metrics.Metrics.counter("build_dataset", f"{role}_rows_parsed").inc(good.num_rows)
        counts = Counter({f"{role}/rows": good.num_rows + sum(bad_row.lines for bad_row in bad_rows)})
        for bad_row in bad_rows:
            counts[f"{role}/bad/{bad_row.reason}"] += bad_row.lines
            beam.metrics.Metrics.counter("build_dataset", f"rejected_{bad_row.reason}").inc()
            yield beam.pvalue.TaggedOutput(_BAD, bad_row)
        yield beam.pvalue.TaggedOutput(_COUNTS, counts)
        if good.num_rows:
            yield role, good


class WriteDeadLetter(beam.PTransform):
    """Bad rows -> one JSON-lines file (absent when there are none)."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = str(path)

    def expand(self, bad_rows):
        path = self._path
        return (
            bad_rows
            | "ToJson" >> beam.Map(BadRow.to_json)
            | "OneKey" >> beam.WithKeys(None)
            | "Together" >> beam.GroupByKey()
            | "WriteLines" >> beam.MapTuple(lambda _, lines: write_lines(path, sorted(lines)))
        )


# --- Join ------------------------------------------------------------------------------------------------------------


class JoinTables(beam.PTransform):
    """Checked rows -> joined rows, written as Parquet, one file per partition of users.

    Users are partitioned by hash: a partition holds every event and the profile of its users, so that profiles and
    histories are joined by columns, in memory bounded by the partition. The item table is sent to every partition.

    Outputs: ``times`` (arrays of event times) and ``counts``.
    """

    def __init__(self, spec: FeatureSpec, directory: pathlib.Path, num_partitions: int):
        super().__init__()
        self._spec = spec
        self._directory = str(directory)
        self._num_partitions = num_partitions

    def expand(self, rows):
        key = self._spec.user_key
        by_user = {
            role: rows
            | f"Only_{role}" >> beam.Filter(lambda row, role: row[0] == role, role)
            | f"PartitionBy_user_{role}" >> beam.FlatMap(lambda row: _partition(row[1], key, self._num_partitions))
            for role in ("log", *self._spec.user_tables)
        }
        item_roles = tuple(self._spec.item_tables)
        items = rows | "OnlyItems" >> beam.Filter(lambda row: row[0] in item_roles)
        return (
            by_user
            | "GroupUsers" >> beam.CoGroupByKey()
            | "Join"
            >> beam.ParDo(_JoinFn(self._spec, self._directory), items=beam.pvalue.AsList(items)).with_outputs(
                _COUNTS, main="times"
            )
        )


def _partition(table: pa.Table, key: str, num_partitions: int) -> Iterator[tuple[int, pa.Table]]:
    return split_table(table, hash_keys(table.column(key)) % num_partitions)


def split_table(table: pa.Table, keys: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
    """(key, the rows with that key), for each key that occurs."""
    order = np.argsort(keys, kind="stable")
    present, starts = np.unique(keys[order], return_index=True)
    for key, rows in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
        yield key, table.take(pa.array(rows))


class _JoinFn(beam.DoFn):
    def __init__(self, spec: FeatureSpec, directory: str):
        self._spec = spec
        self._directory = directory

    def process(self, partition, items: list[tuple[str, pa.Table]]) -> Iterator:
        index, tables = partition
        events = list(tables["log"])
        profiles = self._profiles(tables, items)
        counts = Counter()
        for profile in profiles:
            duplicates, places = profile.duplicate_rows()
            # Every partition sees the whole item table: count its duplicates once.
            if duplicates and (profile.role in self._spec.user_tables or index == 0):
                counts[f"{profile.role}/duplicates/{places[0]}/{places[1]}"] += duplicates
        if events:
            joined, missing = join_rows(pa.concat_tables(events), profiles, self._spec)
            self._write(joined, f"{self._directory}/part-{index:05d}.parquet")
            counts.update(missing)
            yield joined.column(EVENT_TIME).to_numpy()
        yield beam.pvalue.TaggedOutput(_COUNTS, counts)

    @staticmethod
    def _write(joined: pa.Table, path: str) -> None:
        temporary = temporary_name(path)
        pa.parquet.write_table(joined, temporary, row_group_size=ROWS_PER_BATCH)
        tf.io.gfile.rename(temporary, path, overwrite=True)

    def _profiles(self, by_user: Mapping[str, Iterable[pa.Table]], items: list[tuple[str, pa.Table]]) -> list[Profiles]:
        """The declared profile tables; a user table without a row for this partition is empty, not absent."""
        profiles = []
        for role, table in self._spec.tables.items():
            if role != "log":
                parts = by_user[role] if role in by_user else [part for other, part in items if other == role]
                profiles.append(Profiles(role, table.key, _concat(parts, table), table.valid_from))
        return profiles


def _concat(parts: list[pa.Table], table) -> pa.Table:
    types = {"string": pa.string(), "int64": pa.int64(), "float": pa.float64()}
    schema = pa.schema([*((column.name, types[column.type]) for column in table.columns), (ROW_ID, pa.int64())])
    return pa.concat_tables([schema.empty_table(), *parts])


# --- Split -----------------------------------------------------------------------------------------------------------


class ReadJoined(beam.PTransform):
    """Parquet files of joined rows -> (split index, table)."""

    def __init__(self, files: list[str], spec: FeatureSpec, cut_offs: list[int]):
        super().__init__()
        self._files = files
        self._spec = spec
        self._cut_offs = cut_offs

    def expand(self, pipeline):
        return (
            pipeline
            | "ListParts" >> beam.Create(self._files)
            | "SpreadParts" >> beam.Reshuffle()
            | "AssignSplit" >> beam.FlatMap(_assign_split, self._spec, self._cut_offs)
        )


def _assign_split(path: str, spec: FeatureSpec, cut_offs: list[int]) -> Iterator[tuple[int, pa.Table]]:
    table = pa.parquet.read_table(path)
    indices = split_indices(spec.split, cut_offs, table)
    for start in range(0, table.num_rows, ROWS_PER_BATCH):
        rows = slice(start, start + ROWS_PER_BATCH)
        for index, part in split_table(table.slice(start, ROWS_PER_BATCH), indices[rows]):
            if index < len(SPLITS):
                yield index, part


# --- Encode ----------------------------------------------------------------------------------------------------------


class EncodeShards(beam.PTransform):
    """(split, table) -> TFRecord shards; gives split, shard, rows and digest of each.

    A row's shard comes from its id; rows of a shard are sorted by event time, so reading the shards side by side
    follows time closely and shuffling them loses nothing.
    """

    def __init__(self, spec: FeatureSpec, layout: DatasetLayout, num_shards: Mapping[str, int], compressed: bool):
        super().__init__()
        self._spec = spec
        self._layout = layout
        self._num_shards = num_shards
        self._compressed = compressed

    def expand(self, rows):
        num_shards = self._num_shards
        return (
            rows
            | "ChooseShard" >> beam.FlatMap(_choose_shard, num_shards)
            | "GroupShard" >> beam.GroupByKey()
            | "WriteShard" >> beam.ParDo(_WriteShardFn(self._spec, self._layout, num_shards, self._compressed))
        )


def _choose_shard(row: tuple[int, pa.Table], num_shards: Mapping[str, int]):
    split, table = row
    name = SPLITS[split]
    shards = mix_row_ids(table.column(ROW_ID).to_numpy(), _SHARD_SEED) % np.uint64(num_shards[name])
    for shard, part in split_table(table, shards):
        yield (name, shard), part


class _WriteShardFn(beam.DoFn):
    def __init__(self, spec: FeatureSpec, layout: DatasetLayout, num_shards: Mapping[str, int], compressed: bool):
        self._spec = spec
        self._layout = layout
        self._num_shards = num_shards
        self._compressed = compressed

    def setup(self):
        statistics = Statistics.from_json(self._layout.statistics.read_text(encoding="utf-8"))
        transform = FeatureTransform(self._spec, statistics, self._layout.vocabularies)
        self._encode = tf.function(
            lambda raw, record: encode_examples({**transform(raw), **record}), reduce_retracing=True, autograph=False
        )

    def process(self, shard) -> Iterator[dict[str, Any]]:
        (split, index), parts = shard
        table = pa.concat_tables(parts)
        table = table.sort_by([(EVENT_TIME, "ascending"), (ROW_ID, "ascending")])
        path = self._layout.shard(split, index, self._num_shards[split], self._compressed)
        digest = write_records(path, self._examples(table), self._compressed)
        yield {"split": split, "shard": index, "rows": table.num_rows, "digest": digest}

    def _examples(self, table: pa.Table) -> Iterator[bytes]:
        for start in range(0, table.num_rows, ROWS_PER_BATCH):
            yield from self._encode(*self._tensors(table.slice(start, ROWS_PER_BATCH))).numpy()

    def _tensors(self, table: pa.Table) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        record = {name: tf.constant(table.column(name).to_numpy()) for name in (*RECORD_NUMBERS, *RECORD_IDS)}
        return arrow_to_tensors(table, self._spec.raw_inputs), record


def write_records(path: pathlib.Path, examples: Iterable[bytes], compressed: bool) -> str:
    """Writes a TFRecord file that appears under its name only when it is whole; returns the digest of its examples."""
    options = tf.io.TFRecordOptions(compression_type="GZIP" if compressed else "")
    digest = hashlib.sha256()
    temporary = temporary_name(str(path))
    with tf.io.TFRecordWriter(temporary, options) as writer:
        for example in examples:
            writer.write(example)
            digest.update(example)
    tf.io.gfile.rename(temporary, str(path), overwrite=True)
    return digest.hexdigest()


class WriteServingSample(beam.PTransform):
    """Raw inputs of about 10,000 test rows -> one Parquet file: what export verifies, warms up and shows with."""

    def __init__(self, spec: FeatureSpec, path: pathlib.Path, num_test_rows: int):
        super().__init__()
        self._columns = [ROW_ID, "label", *(entry.name for entry in spec.raw_inputs)]
        self._path = str(path)
        self._fraction = min(1.0, SERVING_SAMPLE_ROWS / max(num_test_rows, 1))

    def expand(self, rows):
        return (
            rows
            | "OnlyTest" >> beam.Filter(lambda row: SPLITS[row[0]] == "test")
            | "Sample" >> beam.MapTuple(lambda _, table: self._sample(table))
            | "OneSample" >> beam.WithKeys(None)
            | "SampleTogether" >> beam.GroupByKey()
            | "WriteSample" >> beam.MapTuple(lambda _, parts: self._write(parts))
        )

    def _sample(self, table: pa.Table) -> pa.Table:
        uniform = mix_row_ids(table.column(ROW_ID).to_numpy(), _SAMPLE_SEED) / 2.0**64
        return table.select(self._columns).filter(pa.array(uniform < self._fraction))

    def _write(self, parts: Iterable[pa.Table]) -> None:
        pa.parquet.write_table(pa.concat_tables(parts).sort_by(ROW_ID), self._path)
