"""Bulk rows between the pipelines of a build: Arrow files on disk, cut into partitions.

A writer sorts the rows of a file by partition and stores one record batch for each, so that a reader of one partition
reads that batch of every file and nothing else. Runners would carry the rows in their own shuffle as well, but
DirectRunner's is in memory; this way a build needs memory for a partition, however long the log is, and only names of
files pass through the runner.
"""

from __future__ import annotations

import dataclasses
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import tensorflow as tf


def temporary_name(path: str) -> str:
    """Names the file of one attempt: runners may retry a bundle or run it twice side by side.

    Args:
      path: under which the file appears when it is whole.

    Returns:
      A path beside it, another one at every call, that ends with .incomplete.
    """
    return f"{path}.{secrets.token_hex(4)}.incomplete"


def write_partitions(path: str, table: pa.Table, partitions: np.ndarray, num_partitions: int) -> None:
    """Writes a file whose record batch p holds the rows of partition p, in the order of the table.

    Args:
      path: appears under its name only when it is whole.
      table: the rows.
      partitions: of each row, in [0, num_partitions).
      num_partitions: also those without a row get a record batch.
    """
    order = np.argsort(partitions, kind="stable")
    batch = table.take(pa.array(order)).combine_chunks().to_batches()
    starts = np.searchsorted(partitions[order], np.arange(num_partitions + 1))
    write_batches(path, table.schema, (batch[0].slice(a, b - a) if batch else None for a, b in _pairs(starts)))


def _pairs(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    return zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)


def write_batches(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch | None]) -> None:
    """Writes one record batch per partition.

    Args:
      path: appears under its name only when it is whole.
      schema: of all batches.
      batches: in the order of partitions; None is an empty one.
    """
    empty = pa.RecordBatch.from_pylist([], schema)
    temporary = temporary_name(path)
    with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(empty if batch is None else batch)
    tf.io.gfile.rename(temporary, path, overwrite=True)


def read_partition(paths: Sequence[str], partition: int) -> Iterator[pa.Table]:
    """Reads one partition.

    Args:
      paths: of files with the same number of partitions.
      partition: from 0.

    Yields:
      The rows of each file, at least an empty table of its schema.
    """
    for path in paths:
        with pa.OSFile(path, "rb") as source:
            yield pa.Table.from_batches([pa.ipc.open_file(source).get_batch(partition)])


@dataclasses.dataclass
class ShuffleFileWriter:
    """Collects tables and writes a partitioned file whenever ``flush_bytes`` have come together.

    Attributes:
      directory: of the files; their names are random, so that attempts do not meet.
      num_partitions: of each file.
      flush_bytes: what a writer holds in memory at most, but for the last table.
    """

    directory: pathlib.Path
    num_partitions: int
    flush_bytes: int = 48 << 20

    def __post_init__(self):
        self._tables: list[tuple[pa.Table, np.ndarray]] = []
        self._num_bytes = 0

    def add(self, table: pa.Table, partitions: np.ndarray) -> list[str]:
        """Adds rows.

        Args:
          table: of the same schema as all others.
          partitions: of each row, int64 [num_rows] in [0, num_partitions).

        Returns:
          Paths of the files written meanwhile: none, or one.
        """
        self._tables.append((table, partitions))
        self._num_bytes += table.nbytes
        return self.flush() if self._num_bytes >= self.flush_bytes else []

    def flush(self) -> list[str]:
        """Writes what is left; returns the file, if there was anything."""
        if not self._tables:
            return []
        path = str(self.directory / f"{secrets.token_hex(8)}.arrow")
        table = pa.concat_tables([table for table, _ in self._tables])
        write_partitions(path, table, np.concatenate([part for _, part in self._tables]), self.num_partitions)
        self._tables, self._num_bytes = [], 0
        return [path]
