"""TFRecord files of serialized tf.train.Example: TensorFlow parses whole batches.

TensorFlow's own file systems open them: local paths and gs://; others need tensorflow-io.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from google.protobuf.message import DecodeError

from clsd_tf.data.columns import value_to_text
from clsd_tf.spec.tables import Column, Table
from pipelines.sources import files
from pipelines.sources.files import ROW_ID, BadRow, RawBatch, SourceFile, SourceSlice, UnreadableError

_DTYPES = {"string": tf.string, "int64": tf.int64, "float": tf.float32}
_KINDS = {"string": "bytes_list", "int64": "int64_list", "float": "float_list"}


class AnyTypeColumn(Column):
    """A feature that makes no example a bad row: of ``type`` in most, and text in batches where some differ."""


def feature_names(file: SourceFile, table: Table) -> list[str]:
    """Finds the features of the first 1,000 examples.

    Args:
      file: to look at.
      table: not used; all formats have the same functions.

    Returns:
      Names, sorted.

    Raises:
      ValueError: they cannot be read.
    """
    return sorted(feature_types(file))


def feature_types(file: SourceFile) -> dict[str, str]:
    """Finds the types of features by the first 1,000 examples.

    Args:
      file: TFRecords of tf.Example.

    Returns:
      Name -> ``string``, ``int64`` or ``float``; ``string`` for one that has no value there.

    Raises:
      ValueError: the file cannot be read.
    """
    types: dict[str, str] = {}
    kinds = {kind: name for name, kind in _KINDS.items()}
    try:
        for record in itertools.islice(_dataset(file).as_numpy_iterator(), 1000):
            for name, feature in tf.train.Example.FromString(record).features.feature.items():
                kind = feature.WhichOneof("kind")
                if kind or name not in types:
                    types[name] = kinds.get(kind, "string")
    except (tf.errors.OpError, DecodeError) as error:
        raise ValueError(str(error)) from error
    return types


def read(part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Reads a file of examples.

    Args:
      part: a whole file.
      table: whose columns are read, by their declared types.

    Yields:
      Batches; an example of other types, or that is none, is a bad row.

    Raises:
      UnreadableError: the file is damaged. Rows before the damage have been yielded.
    """
    row = part.first_row
    for records in _batches(part.file, row):
        yield _parse(records, row, part.file, table)
        row += len(records)


def _dataset(file: SourceFile) -> tf.data.TFRecordDataset:
    return tf.data.TFRecordDataset(file.path, "GZIP" if file.compression == "gzip" else "")


def _batches(file: SourceFile, first_row: int) -> Iterator[np.ndarray]:
    """Serialized examples; before damage, the ones that stand in front of it."""
    num_read = 0
    try:
        for batch in _dataset(file).batch(files.ROWS_PER_BATCH).as_numpy_iterator():
            yield batch
            num_read += len(batch)
        if file.compression == "gzip":
            _require_whole_gzip(file, first_row + num_read - 1)
    except tf.errors.OpError as error:
        rest = _until_damage(_dataset(file).skip(num_read))
        if rest:
            yield np.array(rest, object)
        raise UnreadableError(error.message, first_row + num_read + len(rest) - 1) from error


def _require_whole_gzip(file: SourceFile, last_row: int) -> None:
    """Raises where the stream lacks its end: TensorFlow takes one that was cut between two records for a whole one."""
    try:
        with tf.io.gfile.GFile(file.path, "rb") as compressed, gzip.GzipFile(fileobj=compressed) as stream:
            while stream.read(files.BLOCK_BYTES):
                pass
    except (EOFError, OSError, zlib.error) as error:
        raise UnreadableError(str(error), last_row) from error


def _until_damage(dataset: tf.data.Dataset) -> list[bytes]:
    found = []
    try:
        for record in dataset.as_numpy_iterator():
            found.append(record)
    except tf.errors.OpError:
        pass
    return found


def _parse(records: np.ndarray, first_row: int, file: SourceFile, table: Table) -> RawBatch:
    rows, bad_rows = np.arange(first_row, first_row + len(records)), []
    columns = _parse_columns(records, table.columns)
    if columns is None:  # Some record is no example or holds another type: find which.
        reasons = [_reason(record, table) for record in records]
        good = np.array([reason is None for reason in reasons], bool)
        bad_rows = [
            BadRow(file.role, file.name, int(row), reason, repr(bytes(record)))
            for row, record, reason in zip(rows, records, reasons, strict=True)
            if reason is not None
        ]
        columns, rows = _parse_with_text(records[good], table.columns), rows[good]
    if columns is None:
        raise UnreadableError("an example that TensorFlow cannot parse", first_row - 1)
    return RawBatch(file, pa.table({**columns, ROW_ID: pa.array(file.row_ids(rows), pa.int64())}), bad_rows)


def _parse_columns(records: np.ndarray, columns: Sequence[Column]) -> dict[str, pa.Array] | None:
    """All records at once; None if any of them cannot be parsed."""
    features = {
        column.name_in_file: tf.io.RaggedFeature(_DTYPES[column.type], row_splits_dtype=tf.int64) for column in columns
    }
    try:
        parsed = tf.io.parse_example(tf.constant(records, tf.string, shape=[len(records)]), features)
    except (tf.errors.InvalidArgumentError, UnicodeDecodeError):  # The latter when the message quotes the bytes.
        return None
    return {column.name: _to_arrow(parsed[column.name_in_file], column) for column in columns}


def _parse_with_text(records: np.ndarray, columns: Sequence[Column]) -> dict[str, pa.Array] | None:
    """The same, with columns of any type as text if their values differ from it."""
    parsed = _parse_columns(records, columns)
    of_any_type = [column for column in columns if isinstance(column, AnyTypeColumn)]
    if parsed is not None or not of_any_type:
        return parsed
    parsed = _parse_columns(records, [column for column in columns if column not in of_any_type])
    if parsed is None:
        return None
    examples = [tf.train.Example.FromString(record).features.feature for record in records]
    for column in of_any_type:
        parsed[column.name] = pa.array([_text(features, column.name_in_file) for features in examples], pa.string())
    return parsed


def _text(features: Mapping[str, tf.train.Feature], name: str) -> str | None:
    kind = features[name].WhichOneof("kind") if name in features else None
    return value_to_text(list(getattr(features[name], kind).value)) if kind else None


def _reason(record: bytes, table: Table) -> str | None:
    """Reason why a record cannot be parsed; None if it can."""
    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError:
        return "not_a_tf_example"
    for column in table.columns:
        if isinstance(column, AnyTypeColumn):
            continue
        kind = features[column.name_in_file].WhichOneof("kind") if column.name_in_file in features else None
        if kind not in (None, _KINDS[column.type]):
            return f"not_{column.type}:{column.name}"
    return None


def _to_arrow(values: tf.RaggedTensor, column: Column) -> pa.Array:
    """One value a row, null where there is none; lists if any row has several."""
    flat: Any = pa.array(values.flat_values.numpy(), pa.binary() if column.type == "string" else None)
    lengths = values.row_lengths().numpy()
    if lengths.max(initial=0) > 1:
        return pa.ListArray.from_arrays(pa.array(values.row_splits.numpy(), pa.int32()), flat)
    places = np.cumsum(lengths) - 1
    return flat.take(pa.array(places, pa.int64(), mask=lengths == 0))
