"""Files of raw rows, as servables score them and as served requests are logged: CSV, JSON lines or Parquet."""

from __future__ import annotations

import collections
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from clsd_tf.data.columns import LIST_SEPARATOR, convert_column, value_to_text
from clsd_tf.spec.model_inputs import RawInput
from clsd_tf.spec.tables import Column

_ROWS_PER_BATCH = 4096
_MAX_EXACT_IN_FLOAT = 2**53
FORMATS = (".csv", ".jsonl", ".parquet")
# Key in a Parquet file's metadata: a JSON list of the raw inputs that it has no column of.
LEFT_OUT = b"clsd_tf.left_out"


def row_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Lists files of rows.

    Args:
      path: a file, which is the list, or a directory.

    Returns:
      The directory's files in the order of their names, without hidden ones, which are not complete.

    Raises:
      ValueError: a directory without any.
    """
    if not path.is_dir():
        return [path]
    files = _files_in(path)
    if not files:
        below = sorted(str(entry) for entry in path.iterdir() if entry.is_dir() and _files_in(entry))
        hint = f". Did you mean {' or '.join(below)}?" if below else ""
        raise ValueError(
            f"a directory of rows has files that end in {', '.join(FORMATS)}. Received: {path} with none{hint}"
        )
    return files


def _files_in(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in directory.iterdir() if file.suffix in FORMATS and not file.name.startswith("."))


def left_out_inputs(paths: Iterable[pathlib.Path]) -> frozenset[str]:
    """Returns the raw inputs that any file of ``paths`` declares to leave out, as request logs do with private ones."""
    found: set[str] = set()
    for path in paths:
        if path.suffix == ".parquet" and path.is_file():
            metadata = pa.parquet.read_schema(path).metadata or {}
            found.update(json.loads(metadata.get(LEFT_OUT, b"[]")))
    return frozenset(found)


def read_rows(path: pathlib.Path) -> Iterator[pa.Table]:
    """Reads a file in batches.

    Args:
      path: ends in ``.csv``, ``.jsonl`` or ``.parquet``.

    Yields:
      Tables of some 4096 rows.

    Raises:
      ValueError: unknown ending, or rows that cannot be read. Names rows, never their values.
      FileNotFoundError: no such file.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"files end in {', '.join(FORMATS)}. Received: {path}")
    if not path.is_file():
        raise FileNotFoundError(f"rows are read from a file. Received: {path}, which does not exist")
    yield from _READERS[path.suffix](path)


def rows_of(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Turns JSON objects into rows; a key that one lacks is a missing value there.

    >>> rows_of([{"age": 49}, {"user_id": "196"}]).to_pydict()
    {'age': [49, None], 'user_id': [None, '196']}

    Args:
      records: as ``json.loads`` gives them.

    Returns:
      A column per key, in the order in which they occur; values of several types become text.
    """
    types = _column_types([records])
    return pa.table({name: _json_column(records, name, kind) for name, kind in types.items()})


def typed_rows(rows: pa.Table, raw_inputs: Sequence[RawInput]) -> pa.Table:
    """Gives columns their declared types, by the rules of the build: for text, numbers and lists alike.

    Args:
      rows: a column per raw input, maybe among others; missing is null or "".
      raw_inputs: names and dtypes.

    Returns:
      The raw inputs' columns, null for missing; lists of text for histories.

    Raises:
      ValueError: a raw input has no column, or a value that does not fit its type.
    """
    typed, failures = convert_rows(rows, raw_inputs)
    for reason, failed in failures.items():
        name = reason.split(":", 1)[1]
        allowed = next(entry.dtype for entry in raw_inputs if entry.name == name)
        raise ValueError(
            f"values must have the type of their input. Received: {reason} in row {int(np.argmax(failed)) + 1} of "
            f"the batch, {int(failed.sum()):,} row(s) in all. Allowed: {allowed}, or an empty value"
        )
    return typed


def convert_rows(rows: pa.Table, raw_inputs: Sequence[RawInput]) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """Does as ``typed_rows``, with values that do not fit as null.

    Args:
      rows: a column per raw input, maybe among others; missing is null or "".
      raw_inputs: names and dtypes.

    Returns:
      The typed rows; and the mask [num_rows] of each reason, ``<what is wrong>:<raw input>``, by which some failed.

    Raises:
      ValueError: a raw input has no column.
    """
    missing = [entry.name for entry in raw_inputs if entry.name not in rows.column_names]
    if missing:
        raise ValueError(
            f"rows need a column per raw input. Received: {', '.join(rows.column_names)}. "
            f"Missing: {', '.join(missing)}. A column of empty values stands for values that are not known"
        )
    columns: dict[str, pa.Array] = {}
    failures: dict[str, np.ndarray] = {}
    for entry in raw_inputs:
        columns[entry.name], failed = _typed_column(rows.column(entry.name).combine_chunks(), entry)
        failures |= failed
    return pa.table(columns), failures


def _typed_column(values: pa.Array, entry: RawInput) -> tuple[pa.Array, dict[str, np.ndarray]]:
    if entry.is_list and (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return _typed_lists(values, entry)
    dtype = "string" if entry.is_list else entry.dtype  # A list may be text with separators.
    converted, failures = convert_column(values, Column(name=entry.name, type=dtype))
    return _split_list(converted) if entry.is_list else converted, failures


def _typed_lists(values: pa.ListArray, entry: RawInput) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Lists of any values -> lists of text; a row fails by any of its entries."""
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
    entries, failures = convert_column(values.flatten(), Column(name=entry.name, type="string"))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    rows = np.repeat(np.arange(len(values)), lengths)
    failed = {reason: np.bincount(rows[mask], minlength=len(values)) > 0 for reason, mask in failures.items()}
    return pa.ListArray.from_arrays(offsets, entries, mask=values.is_null()), failed


def _split_list(values: pa.StringArray) -> pa.Array:
    """Text a|b -> [a, b]; null -> an empty list."""
    text = pc.fill_null(values, "")
    lists = pc.split_pattern(text, LIST_SEPARATOR)
    return pc.if_else(pc.equal(text, ""), pa.scalar([], pa.list_(pa.string())), lists)


def _refuse_repeated(path: pathlib.Path, names: Sequence[str]) -> None:
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(
                f"{path} must have each column once. Received: {name!r} {count} times. Rename or remove one of them in "
                "the file"
            )


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(path: pathlib.Path) -> Iterator[pa.Table]:
    """Every column as text, as the build reads it; NA and null are ordinary text."""
    unequal: list[int] = []

    def note(row: pa.csv.InvalidRow) -> str:
        unequal.append(row.number)
        return "skip"

    parse = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note)
    read = pa.csv.ReadOptions(use_threads=False)
    header = _csv_header(path, read, parse)
    _refuse_repeated(path, header)
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


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _read_jsonl(path: pathlib.Path) -> Iterator[pa.Table]:
    """Every batch has the columns and the types of the whole file: a key that a line lacks is a missing value."""
    types = _column_types(_json_batches(path))
    for records in _json_batches(path):
        yield pa.table({name: _json_column(records, name, kind) for name, kind in types.items()})


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


def _column_types(batches: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, pa.DataType]:
    """Type of each column, in the order in which they occur."""
    kinds: dict[str, set[str]] = {}
    for records in batches:
        for record in records:
            for name, value in record.items():
                kinds.setdefault(name, set()).add(_kind(value))
    return {name: _column_type(found - {"NoneType"}) for name, found in kinds.items()}


def _kind(value: Any) -> str:
    if isinstance(value, int) and abs(value) > _MAX_EXACT_IN_FLOAT:
        return "int" if -(2**63) <= value < 2**63 else "huge"
    return "small" if type(value) is int else type(value).__name__


def _column_type(kinds: set[str]) -> pa.DataType:
    """Values of one type as they are, lists as lists of text; as text a mixture (196 and "196"), objects, and what no
    type holds exactly."""
    if kinds == {"list"}:
        return pa.list_(pa.string())
    if not kinds:
        return pa.null()
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds <= {"small", "int"}:
        return pa.int64()
    return pa.float64() if kinds <= {"small", "float"} else pa.string()


def _json_column(records: Sequence[Mapping[str, Any]], name: str, kind: pa.DataType) -> pa.Array:
    values = [record.get(name) for record in records]
    if pa.types.is_list(kind):
        values = [None if value is None else [_text(entry) for entry in value] for value in values]
    elif pa.types.is_string(kind):
        values = [_text(value) for value in values]
    return pa.array(values, kind)


def _text(value: Any) -> str | None:
    return json.dumps(value) if isinstance(value, dict) else value_to_text(value)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: pathlib.Path) -> Iterator[pa.Table]:
    with pa.parquet.ParquetFile(path) as file:
        _refuse_repeated(path, file.schema_arrow.names)
        for batch in file.iter_batches(_ROWS_PER_BATCH):
            yield pa.Table.from_batches([batch])


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
