"""Source tables -> Arrow batches, with the place of each row.

One interface for every format: ``list_files`` finds the files of a table, ``plan_file`` cuts a file into slices that
can be read side by side, and ``read_slice`` yields ``RawBatch``es. Values stay text here (typed formats keep their
Arrow type); ``pipelines.rows.checks`` checks and converts them, so every format is validated by the same rules. A file
that cannot be read to its end gives a batch that says so, never an exception.

To add a format: its name in ``clsd_tf.spec.tables.Table.format`` and an entry in ``_FORMATS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from clsd_tf.spec.tables import Table
from pipelines.sources import columnar, delimited, jsonl, records, text, tf_examples
from pipelines.sources.file_systems import common_folder, match_files, resolve_path
from pipelines.sources.files import (
    READ_ERRORS,
    ROW_ID,
    ROWS_PER_BATCH,
    BadRow,
    FilePlan,
    RawBatch,
    SourceFile,
    SourceSlice,
    UnreadableError,
    file_index,
    first_bytes,
    hash_file,
    row_number,
    size_in_bytes,
    until_unreadable,
)
from pipelines.sources.records import tfds_batches

__all__ = [
    "ROWS_PER_BATCH",
    "ROW_ID",
    "BadRow",
    "FilePlan",
    "RawBatch",
    "SourceFile",
    "SourceSlice",
    "common_folder",
    "discover_columns",
    "file_index",
    "first_bytes",
    "hash_file",
    "list_files",
    "match_files",
    "plan_file",
    "read_slice",
    "resolve_path",
    "row_number",
    "size_in_bytes",
    "tfds_batches",
    "whole_slice",
]
SLICE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class _Format:
    """Functions of a format.

    Attributes:
      column_names: names that every row has; None where each row has names of its own.
      plan: file -> slices and hash. whole: file -> one slice. read: slice -> batches.
      discover: names that occur, for a file that no spec declares yet.
    """

    column_names: Callable[[SourceFile, Table], list[str] | None]
    plan: Callable[[SourceFile, Table, int], FilePlan]
    whole: Callable[[SourceFile, Table], SourceSlice]
    read: Callable[[SourceSlice, Table], Iterator[RawBatch]]
    discover: Callable[[SourceFile, Table], list[str]]


def _whole(file: SourceFile, table: Table) -> SourceSlice:
    return SourceSlice(file)


def _no_column_names(file: SourceFile, table: Table) -> None:
    return None  # An absent key or feature is a missing value, checked row by row.


_DELIMITED = _Format(delimited.column_names, text.plan, text.whole, text.read, delimited.column_names)
_FORMATS = {
    "csv": _DELIMITED,
    "tsv": _DELIMITED,
    "jsonl": _Format(_no_column_names, text.plan, text.whole, text.read, jsonl.keys),
    "avro": _Format(
        records.avro_column_names, records.plan_whole, _whole, records.read_avro, records.avro_column_names
    ),
    "tfrecord": _Format(_no_column_names, records.plan_whole, _whole, tf_examples.read, tf_examples.feature_names),
    "parquet": _Format(columnar.column_names, columnar.plan, _whole, columnar.read, columnar.column_names),
}


def list_files(table: Table, role: str, input_dir: str) -> list[SourceFile]:
    """Finds the files of a table and checks their columns.

    Args:
      table: its path may be a pattern, as for ``match_files``.
      role: of the table in the spec: ``log``, ``user``, ...
      input_dir: folder or URI that the path is relative to; empty is the current folder.

    Returns:
      The files, sorted by path.

    Raises:
      FileNotFoundError: nothing matches the path.
      RuntimeError: the file system cannot be reached.
      ValueError: a file lacks a declared column (the message lists the columns it has) or cannot be read.
    """
    pattern = resolve_path(table.path, input_dir)
    paths = match_files(pattern)
    if not paths:
        raise FileNotFoundError(
            f"tables.{role}.path must match at least one file. Received: {pattern}. "
            "The path is relative to --input_dir and may be a glob pattern"
        )
    root = common_folder(paths)
    found = [SourceFile(role, index, path, root) for index, path in enumerate(paths)]
    for file in found:
        _check_columns(file, table)
    return found


def discover_columns(file: SourceFile, table: Table) -> list[str]:
    """Finds the columns of a file that no spec declares yet.

    Args:
      file: to look at.
      table: gives the format; its columns are not used.

    Returns:
      Names, in the file's order; of formats whose rows have names of their own those in the first 1,000 rows.

    Raises:
      ValueError: the file cannot be read.
    """
    return _or_refuse(_FORMATS[table.format].discover, file, table)


def _check_columns(file: SourceFile, table: Table) -> None:
    available = _or_refuse(_FORMATS[table.format].column_names, file, table)
    if available is None:
        return
    declared = [column.name_in_file for column in table.columns]
    missing = [name for name in declared if name not in available]
    if len(missing) == len(declared):  # Its first line may be a row: then it holds values that are not for messages.
        raise ValueError(
            f"{file.name} has none of the columns that tables.{file.role} declares. Received: {len(available)} other "
            f"names. Allowed: {', '.join(declared)}. Is the header line missing?"
        )
    if missing:
        raise ValueError(
            f"{file.name} lacks columns that tables.{file.role} declares. Received: {', '.join(available)}. "
            f"Missing: {', '.join(missing)}. Correct the spec (source_name is the name in the file) or the file"
        )
    repeated = [name for name in declared if available.count(name) > 1]
    if repeated:
        raise ValueError(
            f"{file.name} must have each declared column once. Received: {repeated[0]!r} "
            f"{available.count(repeated[0])} times. Rename or remove one of them in the file"
        )


def _or_refuse(look: Callable[[SourceFile, Table], Any], file: SourceFile, table: Table) -> Any:
    try:
        return look(file, table)
    except UnreadableError as error:
        reason = str(error)
    except READ_ERRORS as error:
        if isinstance(error, ValueError) and file.name in str(error):
            raise
        reason = " ".join(str(error).split())
    raise ValueError(
        f"{file.name} must be a readable {table.format} file. Received: {reason}. Correct or remove the file"
    )


def plan_file(file: SourceFile, table: Table, slice_bytes: int = SLICE_BYTES) -> FilePlan:
    """Cuts a file into slices of about ``slice_bytes`` bytes, and hashes it.

    Uncompressed CSV, TSV and JSON lines are cut between rows, Parquet between row groups; other files are one slice.
    The file is read once, at the speed of its hash. The rows of the slices are those of the file, with the same ids,
    whatever their size.

    Args:
      file: of ``list_files``.
      table: that it belongs to.
      slice_bytes: about the size of a slice, as the file is stored.

    Returns:
      The slices, in file order, with size and SHA-256 of the file.

    Raises:
      ValueError: the header or the footer cannot be read; ``list_files`` refuses such a file.
    """
    plan = _FORMATS[table.format].plan
    return _or_refuse(lambda file, table: plan(file, table, slice_bytes), file, table)


def whole_slice(file: SourceFile, table: Table) -> SourceSlice:
    """A file as one slice, without reading it to its end as ``plan_file`` does.

    Args:
      file: of ``list_files``.
      table: that it belongs to.

    Returns:
      The slice; of CSV and TSV with the names in the header, which is read.

    Raises:
      ValueError, OSError, UnreadableError: the header cannot be read.
    """
    return _FORMATS[table.format].whole(file, table)


def read_slice(part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Reads one slice.

    Args:
      part: of ``plan_file`` or ``whole_slice``.
      table: whose declared columns are read.

    Yields:
      Batches of at most ``ROWS_PER_BATCH`` rows, in file order. Damage never raises: the last batch then has
      ``unreadable``, the reason and the row behind which reading stopped.
    """
    return until_unreadable(_FORMATS[table.format].read(part, table), part.file, table)
