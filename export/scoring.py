"""The embedded way to call a servable: load it here, score batches of raw rows."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import tensorflow as tf

from clsd_tf.artifacts import require_absent
from clsd_tf.examples import arrow_to_tensors
from clsd_tf.model_inputs import RawInput

_ROWS_PER_BATCH = 4096
_CSV_LIST_SEPARATOR = "|"
_FORMATS = (".csv", ".jsonl", ".parquet")
_DTYPES = {tf.string: "string", tf.int64: "int64", tf.float32: "float"}
_ARROW_TYPES = {"string": pa.string(), "int64": pa.int64(), "float": pa.float64()}


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
        """ctr of each row, float32 [num_rows]; a null is a missing value.

        Raises:
          ValueError: a raw input has no column.
        """
        missing = [entry.name for entry in self.raw_inputs if entry.name not in rows.column_names]
        if missing:
            raise ValueError(
                f"rows need a column per raw input. Received: {', '.join(rows.column_names)}. "
                f"Missing: {', '.join(missing)}. A column of empty values stands for values that are not known"
            )
        return self._predict_raw(**arrow_to_tensors(rows, self.raw_inputs))["ctr"].numpy()


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
      ValueError: unknown file ending, unreadable rows, or a missing column.
      FileExistsError: the output is there already.
    """
    for path in (input_path, output_path):
        if path.suffix not in _FORMATS:
            raise ValueError(f"files end in {', '.join(_FORMATS)}. Received: {path}")
    if not input_path.is_file():
        raise FileNotFoundError(f"--input must be a file. Received: {input_path}, which does not exist")
    require_absent(output_path)
    scored, num_rows = [], 0
    try:
        for rows in _read(input_path, servable.raw_inputs):
            if "ctr" in rows.column_names:
                raise ValueError(
                    f"the output adds a column ctr. Received: {input_path}, which has one. Rename it first"
                )
            scored.append(rows.append_column("ctr", pa.array(servable.score(rows))))
            num_rows += rows.num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(f"{input_path} cannot be read: {error}") from error
    temporary = output_path.with_name(f".{output_path.stem}.incomplete{output_path.suffix}")
    _write(pa.concat_tables(scored), temporary)
    temporary.replace(output_path)
    return num_rows


def _read(path: pathlib.Path, raw_inputs: tuple[RawInput, ...]) -> Iterator[pa.Table]:
    """Batches with the raw inputs in their types; a CSV history becomes a list."""
    lists = [entry.name for entry in raw_inputs if entry.is_list]
    for batch in _READERS[path.suffix](path, raw_inputs):
        table = pa.Table.from_batches([batch])
        for name in lists if path.suffix == ".csv" else ():
            if name in table.column_names:
                values = pa.compute.split_pattern(table.column(name), _CSV_LIST_SEPARATOR)
                table = table.set_column(table.column_names.index(name), name, values)
        yield table


def _read_csv(path: pathlib.Path, raw_inputs: tuple[RawInput, ...]) -> Iterator[pa.RecordBatch]:
    types = {entry.name: pa.string() if entry.is_list else _ARROW_TYPES[entry.dtype] for entry in raw_inputs}
    convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True)
    with pa.csv.open_csv(path, convert_options=convert) as reader:
        yield from reader


def _read_jsonl(path: pathlib.Path, raw_inputs: tuple[RawInput, ...]) -> Iterator[pa.RecordBatch]:
    types = {entry.name: _ARROW_TYPES[entry.dtype] for entry in raw_inputs}
    lists = {entry.name for entry in raw_inputs if entry.is_list}
    schema = pa.schema([(name, pa.list_(kind) if name in lists else kind) for name, kind in types.items()])
    options = pa.json.ParseOptions(explicit_schema=schema)
    yield from pa.json.read_json(path, parse_options=options).to_batches(_ROWS_PER_BATCH)


def _read_parquet(path: pathlib.Path, raw_inputs: tuple[RawInput, ...]) -> Iterator[pa.RecordBatch]:
    with pa.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(_ROWS_PER_BATCH)


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _write(table: pa.Table, path: pathlib.Path) -> None:
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
        for name in lists:
            text = pa.compute.binary_join(table.column(name), _CSV_LIST_SEPARATOR)
            table = table.set_column(table.column_names.index(name), name, text)
        pa.csv.write_csv(table, path)
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
