"""The first pipeline of a build: source files -> checked rows in shuffle files.

Files are cut into slices, slices are read and checked side by side. Good rows go to shuffle files: those of the log
and of tables by user are partitioned by user, so that a partition holds all that is known of its users; tables by item
are kept whole. Bad rows go to the dead letter, batch by batch.
"""

from __future__ import annotations

import functools
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from clsd_tf.data.hashing import hash_keys
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.tables import Table
from clsd_tf.statistics.sketches import Histogram
from pipelines.beam.dead_letters import write_dead_letter
from pipelines.beam.engines import EvenReshuffle
from pipelines.beam.shuffle_files import ShuffleFileWriter
from pipelines.rows.checks import parse_rows
from pipelines.rows.joins import USER_HASH, microseconds
from pipelines.sources import RawBatch, SourceFile, plan_file, read_slice, tfds_batches

_COUNTS, _TIMES, _INPUTS = "counts", "times", "inputs"


class ReadTables(beam.PTransform):
    """Files -> ``batches`` (RawBatch) and ``inputs`` (what the manifest says of a file).

    Args:
      files: of all tables.
      tables: by role.
    """

    def __init__(self, files: Sequence[SourceFile], tables: Mapping[str, Table]):
        super().__init__()
        self._files = files
        self._tables = dict(tables)

    def expand(self, pipeline):
        tables = self._tables
        planned = (
            pipeline
            | "ListFiles" >> beam.Create(list(enumerate(self._files)))
            | "ReshuffleFiles" >> EvenReshuffle()
            | "PlanFiles" >> beam.ParDo(_PlanFn(tables)).with_outputs(_INPUTS, main="slices")
        )
        batches = (
            planned.slices
            | "NumberSlices" >> beam.Map(lambda part: ((part.file.role, part.file.index, part.start), part))
            | "ReshuffleSlices" >> EvenReshuffle()
            | "ReadSlices" >> beam.FlatMap(lambda part: read_slice(part, tables[part.file.role]))
        )
        return batches, planned.inputs


class _PlanFn(beam.DoFn):
    def __init__(self, tables):
        self._tables = tables

    def process(self, file: SourceFile) -> Iterator:
        plan = plan_file(file, self._tables[file.role])
        yield beam.pvalue.TaggedOutput(
            _INPUTS,
            {
                "table": file.role,
                "file": file.name,
                "index": file.index,
                "bytes": plan.num_bytes,
                "sha256": plan.sha256,
            },
        )
        yield from plan.slices


def tfds_files(builder) -> list[str]:
    """Lists the files of a TensorFlow Datasets builder.

    Args:
      builder: prepared, a ``tfds.core.DatasetBuilder``.

    Returns:
      Names of the files of all splits, in the order of their indices.
    """
    return sorted(name for split in builder.info.splits.values() for name in split.filenames)


class ReadTfds(beam.PTransform):
    """TensorFlow Datasets splits -> batches of the log (RawBatch), each example placed by its stable ``tfds_id``.

    Args:
      builder: prepared, a ``tfds.core.DatasetBuilder``.
      spec: whose log it is.
    """

    def __init__(self, builder, spec: FeatureSpec):
        super().__init__()
        self._builder = builder
        self._table = spec.tables.log

    def expand(self, pipeline):
        import tensorflow_datasets as tfds  # Slow to import, and only needed here.

        splits = self._builder.info.splits
        file_indices = {name: index for index, name in enumerate(tfds_files(self._builder))}
        return (
            pipeline
            | "ReadFromTFDS"
            >> tfds.beam.ReadFromTFDS(
                self._builder, split="+".join(splits), read_config=tfds.ReadConfig(add_tfds_id=True)
            )
            | "ToNumpy" >> beam.Map(tfds.as_numpy)
            | "Batch" >> beam.BatchElements(min_batch_size=256, max_batch_size=8192)
            | "ToRawBatch"
            >> beam.FlatMap(lambda examples, table: tfds_batches(table, examples, file_indices), self._table)
        )


class CheckRows(beam.PTransform):
    """Raw batches -> ``rows`` (role, typed table) and ``counts`` (Counter).

    Args:
      spec: by whose rules rows are checked.
      salt: of user ids; None leaves them as they are.
      dead_letter_dir: where bad rows go, a file a batch.
    """

    def __init__(self, spec: FeatureSpec, salt: bytes | None, dead_letter_dir: pathlib.Path):
        super().__init__()
        self._spec = spec
        self._salt = salt
        self._dead_letter_dir = str(dead_letter_dir)

    def expand(self, batches):
        check = _CheckRowsFn(self._spec, self._salt, self._dead_letter_dir)
        return batches | beam.ParDo(check).with_outputs(_COUNTS, main="rows")


class _CheckRowsFn(beam.DoFn):
    def __init__(self, spec: FeatureSpec, salt: bytes | None, dead_letter_dir: str):
        self._spec = spec
        self._salt = salt
        self._dead_letter_dir = dead_letter_dir

    def process(self, batch: RawBatch) -> Iterator:
        good, bad_rows = parse_rows(batch, self._spec, self._salt)
        role = batch.file.role
        counts = Counter({f"{role}/rows": good.num_rows + sum(bad_row.lines for bad_row in bad_rows)})
        for bad_row in bad_rows:
            counts[f"{role}/bad/{bad_row.reason}"] += bad_row.lines
        if batch.unreadable:
            counts[f"{role}/unreadable/{batch.file.name}: {batch.unreadable}"] += 1
        if bad_rows:
            write_dead_letter(bad_rows, batch.file, self._dead_letter_dir)
        _report(counts)
        yield beam.pvalue.TaggedOutput(_COUNTS, counts)
        if good.num_rows:
            yield role, good


def _report(counts: Counter) -> None:
    """Counters that a runner shows while the job runs."""
    for name, count in counts.items():
        beam.metrics.Metrics.counter("build_dataset", name.replace("/", "_")).inc(count)


class WriteShuffleFiles(beam.PTransform):
    """Checked rows -> ``files`` (role, path of a shuffle file) and ``times`` (Histogram of the log's event times).

    Tables by user get the column ``user_hash``, whose remainder is the partition.

    Args:
      spec: names user key and event time.
      directory: of the files.
      num_partitions: of tables by user; others have one.
    """

    def __init__(self, spec: FeatureSpec, directory: pathlib.Path, num_partitions: int):
        super().__init__()
        self._fn = _WriteShuffleFilesFn(spec, directory, num_partitions)

    def expand(self, rows):
        return rows | beam.ParDo(self._fn).with_outputs(_TIMES, main="files")


class _WriteShuffleFilesFn(beam.DoFn):
    def __init__(self, spec: FeatureSpec, directory: pathlib.Path, num_partitions: int):
        self._spec = spec
        self._directory = directory
        self._num_partitions = num_partitions

    def start_bundle(self):
        self._writers: dict[str, ShuffleFileWriter] = {}
        self._times = Histogram.of_integers(np.empty(0, np.int64))

    def process(self, row: tuple[str, pa.Table]) -> Iterator[tuple[str, str]]:
        role, table = row
        by_user = role == "log" or role in self._spec.user_tables
        if role == "log":
            time = self._spec.event_time
            times = microseconds(table.column(time.column), time)
            self._times = self._times.merge(Histogram.of_integers(times))
        partitions = np.zeros(table.num_rows, np.int64)
        if by_user:
            users = hash_keys(table.column(self._spec.user_key))
            table = table.append_column(USER_HASH, pa.array(users))
            partitions = users % self._num_partitions
        writer = self._writers.setdefault(
            role, ShuffleFileWriter(self._directory, self._num_partitions if by_user else 1)
        )
        for path in writer.add(table, partitions):
            yield role, path

    def finish_bundle(self):
        written = [(role, path) for role, writer in self._writers.items() for path in writer.flush()]
        outputs = [*written, beam.pvalue.TaggedOutput(_TIMES, self._times)]
        for output in outputs:
            yield _at_end(output)


def _at_end(output: Any):
    """An output in the form in which finish_bundle has to yield it."""
    if isinstance(output, beam.pvalue.TaggedOutput):
        return beam.pvalue.TaggedOutput(output.tag, _at_end(output.value))
    window = GlobalWindow()
    return WindowedValue(output, window.max_timestamp(), [window])


# --- Results for the driver ------------------------------------------------------------------------------------------


def merge_counts(counts: Iterable[Counter]) -> Counter:
    """Adds up ``counts`` by name.

    Returns:
      The sums.
    """
    return sum(counts, Counter())


def merge_times(times: Iterable[Histogram]) -> dict[str, Any]:
    """Merges histograms; their order does not matter.

    Args:
      times: at least one.

    Returns:
      One histogram, as ``Histogram.to_dict``.
    """
    return functools.reduce(Histogram.merge, times).to_dict()
