"""Scoring of files: rows in, the same rows with their ctr out."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from clsd_tf.data.columns import LIST_SEPARATOR, value_to_text
from clsd_tf.data.request_files import FORMATS, read_rows
from clsd_tf.storage.files import require_absent


class Scorer(Protocol):
    """A source of ctr: a servable in this process, or a server behind its client."""

    def score(self, rows: pa.Table) -> np.ndarray:
        """Returns ctr of each of ``rows``, float32 [num_rows]."""


def score_file(
    scorer: Scorer,
    input_path: pathlib.Path,
    output_path: pathlib.Path,
    progress: Callable[[int], None] = lambda num_rows: None,
) -> int:
    """Scores a file batch by batch; the output appears when it is whole.

    Args:
      scorer: gives the scores.
      input_path: rows, .csv, .jsonl or .parquet.
      output_path: gets the same rows and the column ctr, in the format of its ending; must not exist.
      progress: is told the number of rows scored so far.

    Returns:
      The number of rows.

    Raises:
      ValueError: unknown file ending, unreadable rows, no rows, or a missing column. Names rows, never their values.
      FileNotFoundError: no input.
      FileExistsError: the output is there already.
    """
    for path in (input_path, output_path):
        if path.suffix not in FORMATS:
            raise ValueError(f"files end in {', '.join(FORMATS)}. Received: {path}")
    if not input_path.is_file():
        raise FileNotFoundError(f"--input must be a file. Received: {input_path}, which does not exist")
    require_absent(output_path)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    scored, num_rows = [], 0
    for rows in read_rows(input_path):
        if "ctr" in rows.column_names:
            raise ValueError(f"the output adds a column ctr. Received: {input_path}, which has one. Rename it first")
        try:
            scored.append(rows.append_column("ctr", pa.array(scorer.score(rows))))
        except ValueError as error:
            raise ValueError(f"{input_path}, batch from row {num_rows + 1}: {error}") from error
        num_rows += rows.num_rows
        progress(num_rows)
    if not scored:
        raise ValueError(f"--input must have rows. Received: {input_path} with none")
    temporary = output_path.with_name(f".{output_path.stem}.incomplete{output_path.suffix}")
    try:
        _write(pa.concat_tables(scored, promote_options="permissive"), temporary)
        temporary.replace(output_path)
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _write(table: pa.Table, path: pathlib.Path) -> None:
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        table = pa.table([_csv_column(values) for values in table.columns], names=table.column_names)
        pa.csv.write_csv(table, path)
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, default=value_to_text) + "\n" for row in table.to_pylist())


def _csv_column(values: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Lists as text with separators, and bytes as text."""
    if pa.types.is_list(values.type):
        return pc.binary_join(values, LIST_SEPARATOR)
    if pa.types.is_binary(values.type):
        return pa.array([value_to_text(value) for value in values.to_pylist()], pa.string())
    return values
