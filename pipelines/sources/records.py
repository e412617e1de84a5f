"""Formats that are read record by record: TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from clsd_tf.columns import value_to_text
from clsd_tf.tables import Table
from pipelines.sources.files import _FILE_SHIFT, ROW_ID, RawBatch, SourceFile


def records_table(file: SourceFile, table: Table, records: list[tuple[int, dict[str, Any]]]) -> pa.Table:
    """(row number, column name in the file -> value) -> the declared columns as text, and ``row_id``."""
    columns = {
        column.name: pa.array([value_to_text(record.get(column.name_in_file)) for _, record in records], pa.string())
        for column in table.columns
    }
    numbers = np.array([number for number, _ in records], np.int64)
    return pa.table({**columns, ROW_ID: pa.array(file.row_ids(numbers), pa.int64())})


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
    return RawBatch(file, records_table(file, table, records), [])
