"""Formats that are read record by record: Avro and TensorFlow Datasets."""

from __future__ import annotations

import calendar
import contextlib
import datetime as dt
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa

from clsd_tf.data.columns import value_to_text
from clsd_tf.spec.tables import Table
from pipelines.sources import files
from pipelines.sources.files import ROW_ID, RawBatch, SourceFile, SourceSlice, UnreadableError


def records_table(file: SourceFile, table: Table, records: list[tuple[int, dict[str, Any]]]) -> pa.Table:
    """Makes a table of records.

    Args:
      file: that they are from.
      table: declares the columns.
      records: (row number, column name in the file -> value).

    Returns:
      The declared columns as text, null where missing, and ``row_id``.
    """
    columns = {
        column.name: pa.array([value_to_text(record.get(column.name_in_file)) for _, record in records], pa.string())
        for column in table.columns
    }
    numbers = np.array([number for number, _ in records], np.int64)
    return pa.table({**columns, ROW_ID: pa.array(file.row_ids(numbers), pa.int64())})


# --- Avro ------------------------------------------------------------------------------------------------------------


def avro_column_names(file: SourceFile, table: Table) -> list[str]:
    """Reads the names of the fields in the writer's schema.

    Args:
      file: to look at.
      table: not used; all formats have the same functions.

    Returns:
      Names, in the file's order.

    Raises:
      OSError, ValueError: it cannot be read.
    """
    with files.open_arrow(file) as stream, _as_value_error():
        schema: Any = fastavro.reader(stream).writer_schema
        return [field["name"] for field in schema["fields"]]


def plan_whole(file: SourceFile, table: Table, slice_bytes: int) -> files.FilePlan:
    """Hashes a file and plans it as one slice: the format has no index of its rows.

    Args:
      file: read to its end.
      table: not used; all formats have the same functions.
      slice_bytes: not used.

    Returns:
      One slice, with size and SHA-256 of the file.
    """
    return files.FilePlan(file, (SourceSlice(file),), *files.hash_file(file))


def read_avro(part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Reads an Avro file.

    Args:
      part: a whole file.
      table: whose columns are read, as text; moments as the integers that stand in the file.

    Yields:
      Batches of at most ``ROWS_PER_BATCH`` rows.

    Raises:
      UnreadableError: the file is damaged. Rows before the damage have been yielded.
    """
    row = part.first_row
    with files.open_arrow(part.file) as stream:
        records = _avro_records(stream)
        while True:
            found, damage = _take(records, files.ROWS_PER_BATCH)
            if found:
                numbered = list(enumerate(found, start=row))
                yield RawBatch(part.file, records_table(part.file, table, numbered), [])
                row += len(found)
            if damage is not None:
                raise UnreadableError(str(damage) or type(damage).__name__, row - 1) from damage
            if not found:
                return


def _take(records: Iterator[Any], count: int) -> tuple[list[Any], Exception | None]:
    """Up to ``count`` records, and what went wrong behind them."""
    found = []
    try:
        for record in itertools.islice(records, count):
            found.append(record)
    except Exception as error:  # On damaged bytes fastavro raises nearly anything, down to IndexError and zlib.error.
        return found, error
    return found, None


def _avro_records(stream) -> Iterator[dict[str, Any]]:
    """Records with moments as the integers that stand in the file, as in Parquet."""
    reader: Any = fastavro.reader(stream)
    units = {field["name"]: _microseconds_per_unit(field["type"]) for field in reader.writer_schema["fields"]}
    for record in reader:
        yield {
            name: _microseconds(value) // (units[name] or 1) if isinstance(value, dt.datetime) else value
            for name, value in record.items()
        }


def _microseconds_per_unit(kind: Any) -> int | None:
    """Of a timestamp's type, or of the one in a union; None for other types."""
    if isinstance(kind, list):
        return next((unit for entry in kind if (unit := _microseconds_per_unit(entry))), None)
    logical = kind.get("logicalType", "") if isinstance(kind, dict) else ""
    return {"timestamp-millis": 1000, "timestamp-micros": 1}.get(logical.removeprefix("local-"))


def _microseconds(moment: dt.datetime) -> int:
    return calendar.timegm(moment.utctimetuple()) * 1_000_000 + moment.microsecond


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # As in _take.
        raise ValueError(str(error) or type(error).__name__) from error


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------


def tfds_batches(
    table: Table, examples: Iterable[dict[str, Any]], file_indices: Mapping[str, int]
) -> Iterator[RawBatch]:
    """Groups TensorFlow Datasets examples by file.

    Args:
      table: whose columns are read, as text.
      examples: feature -> NumPy value, with ``tfds_id``: ``films-train.tfrecord-00003-of-00010__17`` holds file and
        position.
      file_indices: name of a file -> its index.

    Yields:
      A batch per file.
    """
    by_file: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for example in examples:
        name, position = example["tfds_id"].decode().rsplit("__", 1)
        by_file.setdefault(name, []).append((int(position), example))
    for name, records in by_file.items():
        file = SourceFile("log", file_indices[name], name)
        yield RawBatch(file, records_table(file, table, records), [])
