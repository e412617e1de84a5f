"""The embedded way to call a servable: load it here, score batches of raw rows."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import tensorflow as tf

from clsd_tf.artifacts import require_absent
from clsd_tf.columns import LIST_SEPARATOR, convert_column, value_to_text
from clsd_tf.examples import arrow_to_tensors
from clsd_tf.model_inputs import RawInput
from clsd_tf.tables import Column

_ROWS_PER_BATCH = 4096
_FORMATS = (".csv", ".jsonl", ".parquet")
_DTYPES = {tf.string: "string", tf.int64: "int64", tf.float32: "float"}


class LocalServable:
    """A SavedModel with a ``predict_raw`` signature, loaded into this process.

    Args:
      path: a version directory, or the directory of a model, whose largest version is taken.

    Raises:
      FileNotFoundError: no version there.
    """

    def __init__(self, path: pathlib.Path):
        self.path = _version_directory(path)
        self._loaded = tf.saved_model.load(str(self.path))  # Kept: it owns the variables of the signature.
        self._predict_raw = self._loaded.signatures["predict_raw"]
        specs = self._predict_raw.structured_input_signature[1]
        self.raw_inputs = tuple(
            RawInput(name, _DTYPES[spec.dtype], is_list=spec.shape.rank == 2) for name, spec in sorted(specs.items())
        )

    def score(self, rows: pa.Table) -> np.ndarray:
        """ctr of each row, float32 [num_rows]; a null or "" is a missing value.

        Columns are read by the rules of the build: text, numbers and lists become the declared types.

        Raises:
          ValueError: a raw input has no column, or a value that does not fit its type.
        """
        missing = [entry.name for entry in self.raw_inputs if entry.name not in rows.column_names]
        if missing:
            raise ValueError(
                f"rows need a column per raw input. Received: {', '.join(rows.column_names)}. "
                f"Missing: {', '.join(missing)}. A column of empty values stands for values that are not known"
            )
        typed = {entry.name: _typed_column(rows.column(entry.name), entry) for entry in self.raw_inputs}
        return self._predict_raw(**arrow_to_tensors(pa.table(typed), self.raw_inputs))["ctr"].numpy()


def _typed_column(values: pa.ChunkedArray, entry: RawInput) -> pa.Array:
    values = values.combine_chunks()
    if entry.is_list:
        is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        return values.cast(pa.list_(pa.string())) if is_list else _split_list(values)
    converted, failures = convert_column(values, Column(name=entry.name, type=entry.dtype))
    for reason, failed in failures.items():
        if failed.any():
            raise ValueError(
                f"values must have the type of their input. Received: {reason} in row {int(np.argmax(failed)) + 1} of "
                f"the batch, {int(failed.sum()):,} row(s) in all. Allowed: {entry.dtype}, or an empty value"
            )
    return converted


def _split_list(values: pa.Array) -> pa.Array:
    """Text a|b -> [a, b]; null or "" -> an empty list."""
    text = pc.fill_null(values.cast(pa.string()), "")
    lists = pc.split_pattern(text, LIST_SEPARATOR)
    return pc.if_else(pc.equal(text, ""), pa.scalar([], pa.list_(pa.string())), lists)


def _version_directory(path: pathlib.Path) -> pathlib.Path:
    if (path / "saved_model.pb").is_file():
        return path
    versions = [child for child in path.glob("*") if child.name.isdigit() and (child / "saved_model.pb").is_file()]
    if not versions:
        raise FileNotFoundError(
            f"a servable is a directory with saved_model.pb, or with numbered versions. Received: {path}"
        )
    return max(versions, key=lambda child: int(child.name))


def score_file(servable: LocalServable, input_path: pathlib.Path, output_path: pathlib.Path) -> int:
    """Scores a file batch by batch; the output appears when it is whole. Returns the number of rows.

    Raises:
      ValueError: unknown file ending, unreadable rows, or a missing column. Names rows, never their values.
      FileExistsError: the output is there already.
    """
    for path in (input_path, output_path):
        if path.suffix not in _FORMATS:
            raise ValueError(f"files end in {', '.join(_FORMATS)}. Received: {path}")
    if not input_path.is_file():
        raise FileNotFoundError(f"--input must be a file. Received: {input_path}, which does not exist")
    require_absent(output_path)
    scored, num_rows = [], 0
    for rows in _READERS[input_path.suffix](input_path):
        if "ctr" in rows.column_names:
            raise ValueError(f"the output adds a column ctr. Received: {input_path}, which has one. Rename it first")
        try:
            scored.append(rows.append_column("ctr", pa.array(servable.score(rows))))
        except ValueError as error:
            raise ValueError(f"{input_path}, batch from row {num_rows + 1}: {error}") from error
        num_rows += rows.num_rows
    if not scored:
        raise ValueError(f"--input must have rows. Received: {input_path} with none")
    temporary = output_path.with_name(f".{output_path.stem}.incomplete{output_path.suffix}")
    _write(pa.concat_tables(scored, promote_options="permissive"), temporary)
    temporary.replace(output_path)
    return num_rows


def _read_csv(path: pathlib.Path) -> Iterator[pa.Table]:
    """Every column as text, as the build reads it; NA and null are ordinary text."""
    unequal: list[int] = []

    def note(row: pa.csv.InvalidRow) -> str:
        unequal.append(row.number)
        return "skip"

    parse = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note)
    read = pa.csv.ReadOptions(use_threads=False)
    header = pa.csv.open_csv(path, read_options=read, parse_options=parse).schema.names
    unequal.clear()
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()), null_values=[""], strings_can_be_null=True
    )
    with pa.csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert) as reader:
        for batch in reader:
            if unequal:
                raise ValueError(
                    f"every row needs as many values as the header. Received: {path} with another number in row(s) "
                    f"{', '.join(map(str, unequal[:5]))}. Allowed: {len(header)}"
                )
            yield pa.Table.from_batches([batch])


def _read_jsonl(path: pathlib.Path) -> Iterator[pa.Table]:
    with path.open(encoding="utf-8") as file:
        numbered = enumerate(file, start=1)
        while lines := list(itertools.islice(numbered, _ROWS_PER_BATCH)):
            records = [_json_record(path, number, line) for number, line in lines]
            names = list(dict.fromkeys(name for record in records for name in record))
            yield pa.table({name: _json_column([record.get(name) for record in records]) for name in names})


def _json_record(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"each line must be a JSON object. Received: another text in line {number} of {path}")
    return record


def _json_column(values: list[Any]) -> pa.Array:
    """Values of one type as they are; lists as text lists; a mixture (196 and "196") as text."""
    if any(isinstance(value, list) for value in values):
        lists = [None if value is None else [value_to_text(entry) for entry in value] for value in values]
        return pa.array(lists, pa.list_(pa.string()))
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([value_to_text(value) for value in values], pa.string())


def _read_parquet(path: pathlib.Path) -> Iterator[pa.Table]:
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_PER_BATCH):
            yield pa.Table.from_batches([batch])


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _write(table: pa.Table, path: pathlib.Path) -> None:
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
        for name in lists:
            text = pc.binary_join(table.column(name), LIST_SEPARATOR)
            table = table.set_column(table.column_names.index(name), name, text)
        pa.csv.write_csv(table, path)
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
