"""Files of a table: opening them, the place of a row in them, and the batches that formats read from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from clsd_tf.spec.tables import Table
from pipelines.sources.file_systems import file_size, open_file

ROW_ID = "row_id"
ROWS_PER_BATCH = 65_536
FILE_SHIFT = 40  # row_id = file index << 40 | row number: unique, and it says where a row came from.
BLOCK_BYTES = 8 << 20  # How much of a file is read at once.
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# What reading a damaged file raises: Arrow's errors are ValueErrors or OSErrors.
READ_ERRORS = (OSError, ValueError, EOFError, NotImplementedError, MemoryError, pa.ArrowException)


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a table.

    Attributes:
      role: of the table.
      index: its place in the sorted list of the table's files.
      path: where it is.
      root: folder of all files of the table, with the separator at its end; "" for a single file.
    """

    role: str
    index: int
    path: str
    root: str = ""

    @property
    def name(self) -> str:
        """Path below the folder of the table's files, ``date=2022-04-25/part-0.csv``."""
        return self.path[len(self.root) :] if self.root else pathlib.PurePath(self.path).name

    @property
    def compression(self) -> str | None:
        return _COMPRESSIONS.get(pathlib.PurePath(self.path).suffix)

    def row_ids(self, rows: np.ndarray) -> np.ndarray:
        """Makes the ids of rows.

        Args:
          rows: numbers in the file, int64 [num_rows] in [0, 2^40).

        Returns:
          int64 [num_rows]; unique among all rows of the table.
        """
        return (self.index << FILE_SHIFT) | rows


@dataclasses.dataclass(frozen=True)
class SourceSlice:
    """A part of a file that is read on its own.

    Attributes:
      file: where it stands.
      start, end: bytes [start, end) of an uncompressed text file, row groups [start, end) of Parquet; (0, None) stands
        for the whole file.
      first_row: number of the first row.
      header: names of all columns of a CSV or TSV file; the slice itself holds none.
    """

    file: SourceFile
    start: int = 0
    end: int | None = None
    first_row: int = 0
    header: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FilePlan:
    """Plan for reading a file.

    Attributes:
      file: to read.
      slices: in file order.
      num_bytes: as it is stored.
      sha256: of those bytes, in hex.
    """

    file: SourceFile
    slices: tuple[SourceSlice, ...]
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that was refused.

    Attributes:
      role: of the table.
      file: name of the file.
      row: its number: from 1, the header, in CSV and TSV; from 1 in JSON lines; from 0 in other formats.
      reason: short and without values, ``missing:user_id``.
      raw: the row as it was read; "" where values may not be kept.
      lines: that it takes up in its file.
    """

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
    """At most ``ROWS_PER_BATCH`` rows of one file: the spec's columns plus ``row_id``, and the rows that could not even
    be split into columns.

    Attributes:
      unreadable: why the rest of the slice cannot be read, and after which row; None when it can. It comes with the
        slice's last batch. No dataset may be built from such a file.
    """

    file: SourceFile
    table: pa.Table
    bad_rows: list[BadRow]
    unreadable: str | None = None


class UnreadableError(Exception):
    """The rest of a file cannot be read.

    Args:
      reason: of the library that read it; shortened.
      last_row: number of the last row before it.
    """

    def __init__(self, reason: str, last_row: int):
        super().__init__(f"{_one_line(reason)}, after row {last_row}")


def _one_line(reason: str) -> str:
    """An error's text, short enough for a table."""
    return " ".join(reason.split())[:200]


def file_index(row_id: int) -> int:
    """Finds the index of the file in its table.

    Args:
      row_id: of a row, or an array of them.

    Returns:
      From 0, of the shape of ``row_id``.

    >>> file_index((3 << 40) + 17)
    3
    """
    return row_id >> FILE_SHIFT


def row_number(row_id: int) -> int:
    """Finds the number of the row in its file.

    Args:
      row_id: of a row, or an array of them.

    Returns:
      Of the shape of ``row_id``.

    >>> row_number((3 << 40) + 17)
    17
    """
    return row_id & ((1 << FILE_SHIFT) - 1)


def size_in_bytes(file: SourceFile, table: Table) -> int:
    """Size of a file.

    Args:
      file: to measure.
      table: gives the format.

    Returns:
      Bytes; of a compressed file about what it holds.

    Raises:
      RuntimeError: the file system cannot be reached.
    """
    size = file_size(file.path)
    return size * 5 if file.compression or table.format in ("parquet", "avro") else size


def open_bytes(file: SourceFile) -> BinaryIO:
    """Opens a file as it is stored.

    Args:
      file: to read.

    Returns:
      A buffered stream with ``seek``.

    Raises:
      OSError: it cannot be opened.
    """
    return open_file(file.path)


def open_arrow(file: SourceFile) -> pa.NativeFile:
    """Opens a file as an Arrow stream.

    Args:
      file: decompressed by its ending.

    Returns:
      A stream, with ``seek`` if the file is not compressed.

    Raises:
      OSError: it cannot be opened, or it is empty where its ending says compressed.
    """
    stream = pa.PythonFile(open_bytes(file), mode="r")
    if file.compression and not stream.size():  # Arrow takes it for compressed text of no rows.
        stream.close()
        raise OSError(f"0 bytes, which is no {file.compression} file")
    return pa.CompressedInputStream(stream, file.compression) if file.compression else stream


def first_bytes(file: SourceFile, size: int = 64 << 10) -> bytes:
    """Reads the start of a file.

    Args:
      file: decompressed by its ending.
      size: bytes at most.

    Returns:
      What can be read of it; empty where that is nothing.
    """
    try:
        with open_arrow(file) as stream:
            return stream.read(size)
    except READ_ERRORS:
        return b""


class HashingReader:
    """Reads a file as it is stored, once, and hashes what it reads.

    Args:
      stream: at its start.

    Attributes:
      num_bytes: read so far.
    """

    def __init__(self, stream):
        self._stream = stream
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        data = self._stream.read(size)
        self._digest.update(data)
        self.num_bytes += len(data)
        return data

    def finish(self) -> tuple[int, str]:
        """Reads what is left -> (bytes, SHA-256 in hex)."""
        while self.read(BLOCK_BYTES):
            pass
        return self.num_bytes, self._digest.hexdigest()


def hash_file(file: SourceFile) -> tuple[int, str]:
    """Hashes a file as it is stored.

    Args:
      file: read to its end.

    Returns:
      (bytes, SHA-256 in hex).
    """
    with open_bytes(file) as stream:
        return HashingReader(stream).finish()


def named(data: pa.Table, table: Table, row_ids: np.ndarray) -> pa.Table:
    """Selects the declared columns under their names in the spec and adds the row ids.

    Args:
      data: columns under their names in the file.
      table: declares them.
      row_ids: int64 [num_rows].

    Returns:
      The declared columns in the order of the spec, and ``row_id``.
    """
    columns = {column.name: data.column(column.name_in_file) for column in table.columns}
    return pa.table({**columns, ROW_ID: pa.array(row_ids, pa.int64())})


def empty_batch(file: SourceFile, table: Table, unreadable: str | None = None) -> RawBatch:
    """Makes a batch without rows.

    Args:
      file: that it is from.
      table: declares its columns, which are text.
      unreadable: the reason why there are no more rows; None where the file ends.
    """
    columns = {column.name: pa.array([], pa.string()) for column in table.columns}
    return RawBatch(file, pa.table({**columns, ROW_ID: pa.array([], pa.int64())}), [], unreadable)


def cut_batches(rows: pa.Table, bad_rows: list[BadRow], file: SourceFile) -> Iterator[RawBatch]:
    """Cuts rows into batches.

    Args:
      rows: with ``row_id``.
      bad_rows: among them; they go with the first batch.
      file: that holds both.

    Yields:
      Batches of at most ``ROWS_PER_BATCH`` rows; one without rows if there are none.
    """
    for start in range(0, max(rows.num_rows, 1), ROWS_PER_BATCH):
        yield RawBatch(file, rows.slice(start, ROWS_PER_BATCH), bad_rows if start == 0 else [])


def until_unreadable(batches: Iterator[RawBatch], file: SourceFile, table: Table) -> Iterator[RawBatch]:
    """Turns the exceptions of damage into a batch that names it.

    Args:
      batches: of one slice; iterating may raise ``UnreadableError`` or one of ``READ_ERRORS``.
      file: that they come from.
      table: that it belongs to.

    Yields:
      The batches; when the rest cannot be read, a last one without rows whose ``unreadable`` says why.
    """
    try:
        yield from batches
    except UnreadableError as error:
        yield empty_batch(file, table, str(error))
    except READ_ERRORS as error:
        yield empty_batch(file, table, str(UnreadableError(str(error), 0)))
