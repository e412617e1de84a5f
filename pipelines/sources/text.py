"""Slices of CSV, TSV and JSON lines: byte ranges of whole rows; compressed files are one slice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from clsd_tf.spec.tables import Table
from pipelines.sources import delimited, files, jsonl
from pipelines.sources.files import FilePlan, HashingReader, RawBatch, SourceFile, SourceSlice, UnreadableError
from pipelines.sources.row_blocks import Framing, RowBlock, row_blocks

_FIRST_ROW = 1  # Of CSV and TSV it is the header.


def _framing(table: Table) -> Framing:
    return jsonl.FRAMING if table.format == "jsonl" else delimited.framing(table)


def whole(file: SourceFile, table: Table) -> SourceSlice:
    """Makes one slice of a file.

    Args:
      file: of which only the header is read.
      table: gives the format.

    Returns:
      The slice; of CSV and TSV with the names in the header.

    Raises:
      OSError, ValueError, UnreadableError: the header cannot be read.
    """
    header = () if table.format == "jsonl" else tuple(delimited.column_names(file, table))
    return SourceSlice(file, first_row=_FIRST_ROW, header=header)


def plan(file: SourceFile, table: Table, slice_bytes: int) -> FilePlan:
    """Cuts a file between rows while it is hashed.

    Args:
      file: read once, to its end.
      table: that it belongs to.
      slice_bytes: of a slice at least, but for the last.

    Returns:
      Byte ranges of whole rows, with size and SHA-256 of the file.

    Raises:
      OSError, ValueError, UnreadableError: the header cannot be read.
    """
    part = whole(file, table)
    if file.compression:
        return FilePlan(file, (part,), *files.hash_file(file))
    with files.open_bytes(file) as stream:
        reader = HashingReader(stream)
        blocks = row_blocks(reader.read, _framing(table), _FIRST_ROW, min(files.BLOCK_BYTES, slice_bytes))
        slices = tuple(_cut(blocks, part, slice_bytes))
        return FilePlan(file, slices, *reader.finish())


def _cut(blocks: Iterator[RowBlock], whole: SourceSlice, slice_bytes: int) -> Iterator[SourceSlice]:
    """Joins blocks into slices of about ``slice_bytes``; what cannot be read is left to the last, which says why."""
    start, first_row = whole.start, whole.first_row
    with contextlib.suppress(UnreadableError):
        for block in blocks:
            if block.end - start >= slice_bytes:
                yield SourceSlice(whole.file, start, block.end, first_row, whole.header)
                start, first_row = block.end, block.first_row + block.num_rows
    yield SourceSlice(whole.file, start, None, first_row, whole.header)


def read(part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Reads the rows of a slice.

    Args:
      part: of ``plan`` or ``whole``.
      table: whose columns are read: as binary from CSV and TSV, as text from JSON lines.

    Yields:
      Batches of at most ``ROWS_PER_BATCH`` rows.

    Raises:
      UnreadableError: the file is damaged. Rows before the damage have been yielded.
    """
    parse = jsonl.read if table.format == "jsonl" else delimited.read
    with files.open_arrow(part.file) if part.file.compression else files.open_bytes(part.file) as stream:
        for block in row_blocks(_bounded_read(stream, part), _framing(table), part.first_row):
            try:
                yield from parse(block, part, table)
            except files.READ_ERRORS as error:
                raise UnreadableError(str(error), block.first_row - 1) from error


def _bounded_read(stream, part: SourceSlice) -> Callable[[int], bytes]:
    """Reads from the slice's start up to its end."""
    if part.end is None and part.start == 0:
        return stream.read
    stream.seek(part.start)
    if part.end is None:
        return stream.read
    left = part.end - part.start

    def read(size: int) -> bytes:
        nonlocal left
        data = stream.read(min(size, left))
        left -= len(data)
        return data

    return read
