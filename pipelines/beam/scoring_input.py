"""Files of rows to score: which columns they have, and which of their rows can be scored. No Beam."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.data.columns import convert_column, true_mask, value_to_text
from clsd_tf.data.request_files import convert_rows
from clsd_tf.spec.model_inputs import RawInput
from clsd_tf.spec.tables import Column, Table
from pipelines import sources
from pipelines.sources import ROW_ID, BadRow, RawBatch, SourceFile, row_number
from pipelines.sources.delimited import num_lines
from pipelines.sources.tf_examples import AnyTypeColumn, feature_types
from pipelines.spec_inference.profiles import declare_columns, declare_table

ROLE = "input"
ADDED = ("ctr", "servable_version")


def find_files(pattern: str) -> list[SourceFile]:
    """Finds the files to score.

    Args:
      pattern: path, URI or pattern, as for ``sources.match_files``.

    Returns:
      The files, sorted by path.

    Raises:
      FileNotFoundError: none matches.
      RuntimeError: the file system cannot be reached.
    """
    pattern = sources.resolve_path(pattern)
    paths = sources.match_files(pattern)
    if not paths:
        raise FileNotFoundError(f"--input must match at least one file. Received: {pattern}")
    root = sources.common_folder(paths)
    return [SourceFile(ROLE, index, path, root) for index, path in enumerate(paths)]


def declare_input(files: Sequence[SourceFile], raw_inputs: Sequence[RawInput], file_format: str | None) -> Table:
    """Declares the raw inputs by their types and every other column as it is, or as text.

    Args:
      files: of one format.
      raw_inputs: of the servable.
      file_format: as in a spec; by default what the first file's name or its first lines say.

    Returns:
      The table, columns in the files' order.

    Raises:
      ValueError: a file cannot be read, has other columns than the first, or lacks a raw input; or a column has the
        name of one that the output adds.
    """
    table = declare_table(files[0].path, files[0], file_format)
    names = list(dict.fromkeys(name for file in files for name in _names(file, table)))
    received = ", ".join(names)
    missing = [entry.name for entry in raw_inputs if entry.name not in names]
    if missing:
        raise ValueError(
            f"rows need a column per raw input. Received: {received}. Missing: {', '.join(missing)}. A column of empty "
            "values stands for values that are not known"
        )
    taken = [name for name in ADDED if name in names]
    if taken:
        raise ValueError(f"the output adds the columns {', '.join(ADDED)}. Received: {received}. Rename {taken[0]!r}")
    types = {entry.name: "string" if entry.is_list else entry.dtype for entry in raw_inputs}
    columns = [
        column.model_copy(update={"type": types.get(column.name_in_file, "string")})
        for column in declare_columns(files[0], names)
    ]
    if table.format == "tfrecord":
        found = {name: kind for file in files for name, kind in feature_types(file).items()}
        columns = [
            column
            if column.name_in_file in types
            else AnyTypeColumn(name=column.name, source_name=column.source_name, type=found[column.name_in_file])
            for column in columns
        ]
    return table.model_copy(update={"columns": tuple(columns)})


def _names(file: SourceFile, table: Table) -> list[str]:
    """Columns of a file; in formats with a fixed set of columns they must be those of the first file."""
    names = [name for name in sources.discover_columns(file, table) if name]
    expected = [column.name_in_file for column in table.columns]
    if table.format not in ("jsonl", "tfrecord") and sorted(names) != sorted(expected):
        raise ValueError(
            f"all files must have the same columns. Received: {file.name} with {', '.join(names)}. Allowed: "
            f"{', '.join(expected)}, as in the first"
        )
    return names


def split_rows(
    batch: RawBatch, table: Table, raw_inputs: Sequence[RawInput]
) -> tuple[pa.Table, np.ndarray, list[BadRow]]:
    """Takes out the rows that cannot be scored.

    Args:
      batch: rows of one file.
      table: from ``declare_input``.
      raw_inputs: of the servable.

    Returns:
      The good rows, under the names of the file, raw inputs typed; their numbers in the file, int64; and the bad rows
      without their values, those of the reader included.
    """
    found = pa.table({column.name_in_file: batch.table.column(column.name) for column in table.columns})
    typed, failures = convert_rows(found, raw_inputs)
    columns = {}
    for column in table.columns:
        name, values = column.name_in_file, found.column(column.name_in_file)
        is_input = name in typed.column_names
        columns[name] = typed.column(name) if is_input else _kept(values, table, column)
        if table.format == "csv":
            # In an input mostly a stray quote that swallowed the rows behind it; a note may well have two lines.
            line_break = true_mask(pc.match_substring(values, "\n"))
            failures[f"line_break:{name}"] = line_break if is_input else line_break & _holds_rows(values, table)
    rows = pa.table(columns)
    numbers = row_number(batch.table.column(ROW_ID).to_numpy())
    bad = np.logical_or.reduce([np.zeros(len(numbers), bool), *failures.values()])
    bad_rows = [_without_values(row) for row in batch.bad_rows]
    if bad.any():
        bad_rows += _bad_rows(batch.file, numbers, num_lines(found, table), failures, np.flatnonzero(bad))
        rows, numbers = rows.filter(pa.array(~bad)), numbers[~bad]
    return rows, numbers, bad_rows


def _kept(values: pa.ChunkedArray, table: Table, column: Column) -> pa.ChunkedArray | pa.Array:
    """A column that the model does not read: of Parquet as it is, else as text, so that all batches have one type."""
    if table.format == "parquet":
        return values
    text, failures = convert_column(values.combine_chunks(), Column(name=column.name, type="string"))
    return pa.array([value_to_text(value) for value in values.to_pylist()], pa.string()) if failures else text


def _holds_rows(values: pa.ChunkedArray, table: Table) -> np.ndarray:
    """True where a value has, for each of its line ends, as many delimiters as a row; bool [num_rows]."""
    line_ends = pc.count_substring(values, "\n")
    delimiters = pc.count_substring(values, table.delimiter or ",")
    return true_mask(pc.greater_equal(delimiters, pc.multiply(line_ends, len(table.columns) - 1)))


def _bad_rows(
    file: SourceFile, numbers: np.ndarray, lines: np.ndarray, failures: dict[str, np.ndarray], bad: np.ndarray
) -> list[BadRow]:
    reasons, masks = list(failures), np.stack(list(failures.values()))
    first = np.argmax(masks[:, bad], axis=0)  # A row is bad by the first rule it breaks.
    return [
        BadRow(file.role, file.name, int(numbers[row]), reasons[reason], raw="", lines=int(lines[row]))
        for row, reason in zip(bad, first, strict=True)
    ]


def _without_values(row: BadRow) -> BadRow:
    return BadRow(row.role, row.file, row.row, row.reason, raw="", lines=row.lines)
