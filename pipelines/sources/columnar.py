"""Parquet: slices are ranges of row groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from clsd_tf.spec.tables import Table
from pipelines.sources import files
from pipelines.sources.files import FilePlan, RawBatch, SourceFile, SourceSlice, UnreadableError


def column_names(file: SourceFile, table: Table) -> list[str]:
    """Reads the names of the columns from the footer.

    Args:
      file: to look at.
      table: not used; all formats have the same functions.

    Returns:
      Names, in the file's order.

    Raises:
      OSError, ValueError: it cannot be read.
    """
    with files.open_arrow(file) as stream:
        return pa.parquet.ParquetFile(stream).schema_arrow.names


def plan(file: SourceFile, table: Table, slice_bytes: int) -> FilePlan:
    """Cuts a file between row groups.

    Args:
      file: to cut.
      table: that it belongs to.
      slice_bytes: of uncompressed row groups that a slice holds at least, but for the last.

    Returns:
      Ranges of row groups, with size and SHA-256 of the file.

    Raises:
      OSError, ValueError: the footer cannot be read.
    """
    with files.open_arrow(file) as stream:
        metadata = pa.parquet.ParquetFile(stream).metadata
    return FilePlan(file, tuple(_cut(file, metadata, slice_bytes)), *files.hash_file(file))


def _cut(file: SourceFile, metadata: pa.parquet.FileMetaData, slice_bytes: int) -> Iterator[SourceSlice]:
    start, first_row, row, num_bytes = 0, 0, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        row, num_bytes = row + group.num_rows, num_bytes + group.total_byte_size
        if num_bytes >= slice_bytes or index + 1 == metadata.num_row_groups:
            yield SourceSlice(file, start, index + 1, first_row)
            start, first_row, num_bytes = index + 1, row, 0


def read(part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Reads the row groups of a slice.

    Args:
      part: of ``plan``, or a whole file.
      table: whose columns are read, with their Arrow types.

    Yields:
      Batches of at most ``ROWS_PER_BATCH`` rows.

    Raises:
      UnreadableError: the file is damaged. Rows before the damage have been yielded.
    """
    names = [column.name_in_file for column in table.columns]
    row = part.first_row
    try:
        with files.open_arrow(part.file) as stream:
            reader = pa.parquet.ParquetFile(stream)
            groups = list(range(part.start, reader.num_row_groups if part.end is None else part.end))
            for batch in reader.iter_batches(files.ROWS_PER_BATCH, row_groups=groups, columns=names):
                numbers = np.arange(row, row + batch.num_rows, dtype=np.int64)
                rows = files.named(pa.Table.from_batches([batch]), table, part.file.row_ids(numbers))
                yield RawBatch(part.file, rows, [])
                row += batch.num_rows
    except files.READ_ERRORS as error:
        raise UnreadableError(str(error), row - 1) from error
