"""Source tables -> Arrow batches of text, with the place of each row.

One interface for CSV, TSV, JSONL, Parquet and TFDS: a reader yields ``RawBatch``es. Values stay text here (typed
formats are turned into text or keep their Arrow type); ``pipelines.checks`` checks and converts them, so every format
is validated by the same rules.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from clsd_tf.columns import value_to_text
from clsd_tf.tables import Table

ROW_ID = "row_id"
ROWS_PER_BATCH = 16_384
_FILE_SHIFT = 40  # row_id = file index << 40 | row number: unique, and it says where a row came from.
_BLOCK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a table. ``index`` is its place in the sorted list of the table's files."""

    role: str
    index: int
    path: str

    @property
    def name(self) -> str:
        return pathlib.PurePath(self.path).name

    def row_ids(self, rows: np.ndarray) -> np.ndarray:
        return (self.index << _FILE_SHIFT) | rows


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that was refused. ``row`` counts rows: from 1, the header, in CSV and TSV; from 1 in JSON lines; from
    0 in other formats."""

    role: str
    file: str
    row: int
    reason: str
    raw: str
    lines: int = 1  # A stray quote in a CSV can make one row of many lines: they all count as bad.

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclasses.dataclass
class RawBatch:
    """Rows of one file: the spec's columns plus ``row_id``, and the rows that could not even be split into columns."""

    file: SourceFile
    table: pa.Table
    bad_rows: list[BadRow]


def size_in_bytes(file: SourceFile) -> int:
    """Size of a file; of a compressed one about what it holds."""
    size = FileSystems.match([file.path])[0].metadata_list[0].size_in_bytes
    return size * 5 if pathlib.PurePath(file.path).suffix in _COMPRESSIONS else size


def file_index(row_id: int) -> int:
    return row_id >> _FILE_SHIFT


def row_number(row_id: int) -> int:
    return row_id & ((1 << _FILE_SHIFT) - 1)


def list_files(table: Table, role: str, input_dir: str) -> list[SourceFile]:
    """The files of a table, sorted by path, after a look at their columns.

    Raises:
      FileNotFoundError: nothing matches the path.
      ValueError: a file lacks a declared column; the message lists the columns it has.
    """
    pattern = FileSystems.join(input_dir, table.path) if input_dir else table.path
    paths = sorted(match.path for match in FileSystems.match([pattern])[0].metadata_list)
    if not paths:
        raise FileNotFoundError(
            f"tables.{role}.path must match at least one file. Received: {pattern}. "
            "The path is relative to --input_dir and may be a glob pattern"
        )
    files = [SourceFile(role, index, path) for index, path in enumerate(paths)]
    for file in files:
        _check_columns(file, table)
    return files


def _check_columns(file: SourceFile, table: Table) -> None:
    available = _COLUMN_READERS[table.format](file)
    if available is None:
        return
    missing = [column.name_in_file for column in table.columns if column.name_in_file not in available]
    if missing:
        raise ValueError(
            f"{file.name} lacks columns that tables.{file.role} declares. Received: {', '.join(available)}. "
            f"Missing: {', '.join(missing)}. Correct the spec (source_name is the name in the file) or the file"
        )


def read_file(file: SourceFile, table: Table) -> Iterator[RawBatch]:
    """Reads one file in batches of bounded size."""
    return _READERS[table.format](file, table)


_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


def _open(file: SourceFile) -> pa.NativeFile:
    """A file of any Beam filesystem as an Arrow stream, decompressed by its ending."""
    stream = pa.PythonFile(FileSystems.open(file.path, compression_type=CompressionTypes.UNCOMPRESSED), mode="r")
    compression = _COMPRESSIONS.get(pathlib.PurePath(file.path).suffix)
    return pa.CompressedInputStream(stream, compression) if compression else stream


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def _parse_options(file_format: str, on_bad_row: Callable | None = None) -> pa.csv.ParseOptions:
    """CSV quotes with ". TSV has no quoting: a quote is an ordinary character, as film titles need."""
    delimiter, quote = (",", '"') if file_format == "csv" else ("\t", False)
    # An empty line is a bad row: ignoring it would shift the line numbers behind it.
    return pa.csv.ParseOptions(
        delimiter=delimiter,
        quote_char=quote,
        invalid_row_handler=on_bad_row,
        ignore_empty_lines=False,
        newlines_in_values=file_format == "csv",
    )


def _delimited_columns(file_format: str) -> Callable[[SourceFile], list[str] | None]:
    def columns(file: SourceFile) -> list[str] | None:
        with _open(file) as stream:
            header = io.BufferedReader(stream).readline().decode("utf-8", errors="replace").strip("\r\n")
        if not header:
            raise ValueError(f"{file.name} is empty. Received: a file of 0 rows. Allowed: a header line and rows")
        options = _parse_options(file_format)
        parsed = pa.csv.read_csv(pa.BufferReader((header + "\n").encode()), parse_options=options)
        return parsed.column_names

    return columns


def _read_delimited(file: SourceFile, table: Table) -> Iterator[RawBatch]:
    skipped: list[pa.csv.InvalidRow] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        skipped.append(row)
        return "skip"

    convert = pa.csv.ConvertOptions(
        column_types={column.name_in_file: pa.binary() for column in table.columns},
        include_columns=[column.name_in_file for column in table.columns],
        null_values=[""],
        strings_can_be_null=True,
    )
    # Without threads pyarrow reports the line number of a row with too few or too many values.
    read = pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
    with _open(file) as stream:
        reader = pa.csv.open_csv(
            stream, read_options=read, parse_options=_parse_options(table.format, skip), convert_options=convert
        )
        next_line, reported = 2, 0  # Line 1 is the header.
        for batch in reader:
            lines, next_line = _line_numbers(batch.num_rows, next_line, [row.number for row in skipped])
            bad, reported = _unequal_rows(file, skipped[reported:]), len(skipped)
            yield RawBatch(file, _named(pa.Table.from_batches([batch]), table, file.row_ids(lines)), bad)
        if reported < len(skipped):
            yield RawBatch(file, _records_table(file, table, []), _unequal_rows(file, skipped[reported:]))


def _line_numbers(num_rows: int, next_line: int, skipped: list[int]) -> tuple[np.ndarray, int]:
    """Line numbers of the next ``num_rows`` rows, and of the line behind them.

    ``skipped`` lines were left out. The reader is a block ahead, so some of them may lie behind these rows.
    """
    candidates = np.arange(next_line, next_line + num_rows + len(skipped), dtype=np.int64)
    lines = np.setdiff1d(candidates, np.asarray(skipped, np.int64))[:num_rows]
    return lines, int(lines[-1]) + 1 if num_rows else next_line


def _unequal_rows(file: SourceFile, rows: list[pa.csv.InvalidRow]) -> list[BadRow]:
    return [
        BadRow(
            role=file.role,
            file=file.name,
            row=row.number,
            reason=f"{row.actual_columns}_columns_instead_of_{row.expected_columns}",
            raw=row.text,
            lines=1 + row.text.rstrip("\r\n").count("\n"),
        )
        for row in rows
    ]


def _named(data: pa.Table, table: Table, row_ids: np.ndarray) -> pa.Table:
    """Selects the declared columns under their names in the spec and adds the row ids."""
    columns = {column.name: data.column(column.name_in_file) for column in table.columns}
    return pa.table({**columns, ROW_ID: pa.array(row_ids, pa.int64())})


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _jsonl_columns(file: SourceFile) -> list[str] | None:
    return None  # Each line has keys of its own: an absent key is a missing value, checked row by row.


def _read_jsonl(file: SourceFile, table: Table) -> Iterator[RawBatch]:
    with _open(file) as stream:
        numbered = enumerate(io.BufferedReader(stream), start=1)
        while lines := list(itertools.islice(numbered, ROWS_PER_BATCH)):
            records, bad_rows = [], []
            for number, line in lines:
                record = _json_object(line)
                if record is None:
                    raw = line.decode("utf-8", errors="backslashreplace").rstrip("\n")
                    bad_rows.append(BadRow(file.role, file.name, number, "not_a_json_object", raw))
                else:
                    records.append((number, record))
            yield RawBatch(file, _records_table(file, table, records), bad_rows)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
        if b"\\u" in line:  # An escape may stand for half a character, which no text can hold.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError:  # Also UnicodeDecodeError and UnicodeEncodeError.
        return None
    return value if isinstance(value, dict) else None


def _records_table(file: SourceFile, table: Table, records: list[tuple[int, dict[str, Any]]]) -> pa.Table:
    columns = {
        column.name: pa.array([value_to_text(record.get(column.name_in_file)) for _, record in records], pa.string())
        for column in table.columns
    }
    numbers = np.array([number for number, _ in records], np.int64)
    return pa.table({**columns, ROW_ID: pa.array(file.row_ids(numbers), pa.int64())})


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet_columns(file: SourceFile) -> list[str]:
    with _open(file) as stream:
        return pa.parquet.ParquetFile(stream).schema_arrow.names


def _read_parquet(file: SourceFile, table: Table) -> Iterator[RawBatch]:
    names = [column.name_in_file for column in table.columns]
    with _open(file) as stream:
        start = 0
        for batch in pa.parquet.ParquetFile(stream).iter_batches(ROWS_PER_BATCH, columns=names):
            rows = np.arange(start, start + batch.num_rows, dtype=np.int64)
            start += batch.num_rows
            yield RawBatch(file, _named(pa.Table.from_batches([batch]), table, file.row_ids(rows)), [])


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------


def tfds_batch(
    name: str, table: Table, examples: Iterable[dict[str, Any]], file_indices: Mapping[str, int]
) -> RawBatch:
    """TFDS examples (NumPy, with ``tfds_id``) -> a batch.

    The id, ``films-train.tfrecord-00003-of-00010__17``, holds file and position; ``file_indices`` numbers the files.
    """
    records = []
    for example in examples:
        file_name, position = example["tfds_id"].decode().rsplit("__", 1)
        records.append(((file_indices[file_name] << _FILE_SHIFT) | int(position), example))
    file = SourceFile("log", 0, name)
    return RawBatch(file, _records_table(file, table, records), [])


_READERS = {
    "csv": _read_delimited,
    "tsv": _read_delimited,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
_COLUMN_READERS = {
    "csv": _delimited_columns("csv"),
    "tsv": _delimited_columns("tsv"),
    "jsonl": _jsonl_columns,
    "parquet": _parquet_columns,
}
