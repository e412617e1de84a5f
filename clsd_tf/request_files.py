"""Files of raw rows, as servables score them and as served requests are logged: CSV, JSON lines or Parquet."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from clsd_tf.columns import LIST_SEPARATOR, convert_column, value_to_text
from clsd_tf.model_inputs import RawInput
from clsd_tf.tables import Column

_ROWS_PER_BATCH = 4096
FORMATS = (".csv", ".jsonl", ".parquet")
LEFT_OUT = (
    b"clsd_tf.left_out"  # Key in a Parquet file's metadata: a JSON list of the raw inputs that it has no column of.
)


def row_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or the files of a directory in the order of their names; hidden ones are not complete.

    Raises:
      ValueError: a directory without any.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in FORMATS and not file.name.startswith("."))
    if not files:
        raise ValueError(f"a directory of rows has files that end in {', '.join(FORMATS)}. Received: {path} with none")
    return files


def left_out_inputs(paths: Iterable[pathlib.Path]) -> frozenset[str]:
    """Raw inputs that any of the files declares to leave out, as logs of requests do with private ones."""
    found: set[str] = set()
    for path in paths:
        if path.suffix == ".parquet" and path.is_file():
            metadata = pa.parquet.read_schema(path).metadata or {}
            found.update(json.loads(metadata.get(LEFT_OUT, b"[]")))
    return frozenset(found)


def read_rows(path: pathlib.Path) -> Iterator[pa.Table]:
    """Batches of a file, by its ending.

    Raises:
      ValueError: unknown ending, or rows that cannot be read. Names rows, never their values.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"files end in {', '.join(FORMATS)}. Received: {path}")
    if not path.is_file():
        raise FileNotFoundError(f"rows are read from a file. Received: {path}, which does not exist")
    yield from _READERS[path.suffix](path)


def typed_rows(rows: pa.Table, raw_inputs: Sequence[RawInput]) -> pa.Table:
    """The raw inputs' columns in their declared types, null for missing; lists for histories.

    Columns are read by the rules of the build: text, numbers and lists become the declared types.

    Raises:
      ValueError: a raw input has no column, or a value that does not fit its type.
    """
    missing = [entry.name for entry in raw_inputs if entry.name not in rows.column_names]
    if missing:
        raise ValueError(
            f"rows need a column per raw input. Received: {', '.join(rows.column_names)}. "
            f"Missing: {', '.join(missing)}. A column of empty values stands for values that are not known"
        )
    return pa.table({entry.name: _typed_column(rows.column(entry.name), entry) for entry in raw_inputs})


def _typed_column(values: pa.ChunkedArray, entry: RawInput) -> pa.Array:
    values = values.combine_chunks()
    if entry.is_list and (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return values.cast(pa.list_(pa.string()))
    dtype = "string" if entry.is_list else entry.dtype  # A list may be text with separators.
    converted, failures = convert_column(values, Column(name=entry.name, type=dtype))
    for reason, failed in failures.items():
        if failed.any():
            raise ValueError(
                f"values must have the type of their input. Received: {reason} in row {int(np.argmax(failed)) + 1} of "
                f"the batch, {int(failed.sum()):,} row(s) in all. Allowed: {entry.dtype}, or an empty value"
            )
    return _split_list(converted) if entry.is_list else converted


def _split_list(values: pa.StringArray) -> pa.Array:
    """Text a|b -> [a, b]; null -> an empty list."""
    text = pc.fill_null(values, "")
    lists = pc.split_pattern(text, LIST_SEPARATOR)
    return pc.if_else(pc.equal(text, ""), pa.scalar([], pa.list_(pa.string())), lists)


def _read_csv(path: pathlib.Path) -> Iterator[pa.Table]:
    """Every column as text, as the build reads it; NA and null are ordinary text."""
    unequal: list[int] = []

    def note(row: pa.csv.InvalidRow) -> str:
        unequal.append(row.number)
        return "skip"

    parse = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note)
    read = pa.csv.ReadOptions(use_threads=False)
    header = _csv_header(path, read, parse)
    unequal.clear()
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.binary()), null_values=[""], strings_can_be_null=True
    )
    with pa.csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert) as reader:
        for batch in reader:
            _refuse_unequal(path, unequal, len(header))
            yield pa.table([_text_if_valid(values) for values in batch.columns], names=header)
    _refuse_unequal(path, unequal, len(header))


def _csv_header(path: pathlib.Path, read: pa.csv.ReadOptions, parse: pa.csv.ParseOptions) -> list[str]:
    try:
        with pa.csv.open_csv(path, read_options=read, parse_options=parse) as reader:
            return reader.schema.names
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(
            f"a CSV file starts with a line of column names in UTF-8. Received: another line 1 in {path}. "
            "Save the file as UTF-8, with a header"
        ) from error


def _refuse_unequal(path: pathlib.Path, rows: Sequence[int], num_values: int) -> None:
    if rows:
        raise ValueError(
            f"every row needs as many values as the header. Received: {path} with another number in row(s) "
            f"{', '.join(map(str, rows[:5]))}. Allowed: {num_values}"
        )


def _text_if_valid(values: pa.Array) -> pa.Array:
    """Bytes as text; as they are if some are not UTF-8, which matters in raw inputs alone."""
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return values


def _read_jsonl(path: pathlib.Path) -> Iterator[pa.Table]:
    """Every batch has the columns of the whole file: a key that a line lacks is a missing value, as in the build."""
    names = list(dict.fromkeys(name for batch in _json_batches(path) for record in batch for name in record))
    for records in _json_batches(path):
        yield pa.table({name: _json_column([record.get(name) for record in records]) for name in names})


def _json_batches(path: pathlib.Path) -> Iterator[list[dict[str, Any]]]:
    with path.open("rb") as file:
        numbered = enumerate(file, start=1)
        while lines := list(itertools.islice(numbered, _ROWS_PER_BATCH)):
            yield [_json_record(path, number, line) for number, line in lines]


def _json_record(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # A byte order mark may stand before the first line.
        if b"\\u" in line:  # An escape may stand for half a character, which no text can hold.
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):  # Also UnicodeDecodeError and UnicodeEncodeError.
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"each line must be a JSON object in UTF-8. Received: another text in line {number} of {path}. "
            "Correct the line or leave it out"
        )
    return record


def _json_column(values: list[Any]) -> pa.Array:
    """Values of one type as they are; lists as text lists; as text a mixture (196 and "196") and beyond int64."""
    if any(isinstance(value, list) for value in values):
        lists = [None if value is None else [value_to_text(entry) for entry in value] for value in values]
        return pa.array(lists, pa.list_(pa.string()))
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([value_to_text(value) for value in values], pa.string())


def _read_parquet(path: pathlib.Path) -> Iterator[pa.Table]:
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_PER_BATCH):
            yield pa.Table.from_batches([batch])


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
