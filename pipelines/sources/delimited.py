"""CSV and TSV: Arrow parses blocks of whole rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from clsd_tf.spec.tables import Table
from pipelines.sources import files
from pipelines.sources.files import BadRow, RawBatch, SourceFile, SourceSlice, UnreadableError
from pipelines.sources.row_blocks import Framing, RowBlock, row_blocks, row_ends

HEADER_ROW = 1
_HEADER_BYTES = 64 << 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def framing(table: Table) -> Framing:
    """Finds the framing of a table's rows.

    Args:
      table: of format ``csv`` or ``tsv``; gives the delimiter.

    Returns:
      CSV quotes with ". TSV has no quoting: a quote is an ordinary character, as film titles need.
    """
    return Framing(table.delimiter or ",", quoted=True) if table.format == "csv" else Framing("\t")


def column_names(file: SourceFile, table: Table) -> list[str]:
    """Reads the header.

    Args:
      file: of which only the first row is read.
      table: gives format and delimiter.

    Returns:
      Names, in the file's order.

    Raises:
      ValueError: the file is empty.
      UnreadableError: its first row cannot be read.
    """
    with files.open_arrow(file) as stream:
        block = next(row_blocks(stream.read, framing(table), HEADER_ROW, _HEADER_BYTES), None)
    header = _first_row(block.data, table) if block else b""
    if not header.strip():
        raise ValueError(f"{file.name} is empty. Received: a file of 0 rows. Allowed: a header line and rows")
    text = header.decode("utf-8", errors="replace").encode()
    return pa.csv.read_csv(pa.BufferReader(text), parse_options=_parse_options(table)).column_names


def _first_row(block: bytes, table: Table) -> bytes:
    ends = row_ends(block, framing(table), is_last=True)
    return block[: int(ends[0]) + 1] if len(ends) else block


def read(block: RowBlock, part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Parses the rows of a block.

    Args:
      block: the first row is the header if its number is 1.
      part: that the block is from; has the names of all columns.
      table: whose columns are read, as binary.

    Yields:
      Batches; rows with too few or too many values are bad rows.

    Raises:
      UnreadableError: as many rows as were found cannot be parsed.
    """
    data, first_row, num_rows = block.data, block.first_row, block.num_rows
    if first_row == HEADER_ROW:
        data, first_row, num_rows = data[len(_first_row(data, table)) :], first_row + 1, num_rows - 1
    if not num_rows:
        return
    rows, skipped = _parse(data, part.header, table)
    bad_rows = [_unequal_row(part.file, row, first_row) for row in skipped]
    numbers = np.delete(np.arange(num_rows), [row.number - 1 for row in skipped]) + first_row
    if len(numbers) != rows.num_rows:
        raise UnreadableError(f"{rows.num_rows} rows parsed where {len(numbers)} stand", first_row - 1)
    yield from files.cut_batches(files.named(rows, table, part.file.row_ids(numbers)), bad_rows, part.file)


def num_lines(rows: pa.Table, table: Table) -> np.ndarray:
    """Number of lines of the file that each row takes up: in CSV a quoted value may hold line ends.

    Args:
      rows: as they were read, from a table of any format.
      table: gives the format.

    Returns:
      int64 [num_rows], at least 1.
    """
    lines = np.ones(rows.num_rows, np.int64)
    for values in rows.columns if table.format == "csv" else ():
        if pa.types.is_binary(values.type) or pa.types.is_string(values.type):
            lines += pc.fill_null(pc.count_substring(values, "\n"), 0).to_numpy()
    return lines


def _parse(data: bytes, header: tuple[str, ...], table: Table) -> tuple[pa.Table, list[pa.csv.InvalidRow]]:
    """(rows as text, rows with too few or too many values). Rows are numbered from 1."""
    # Arrow takes one byte order mark away, as if a file started here.
    marked = _BYTE_ORDER_MARK + data if data.startswith(_BYTE_ORDER_MARK) else data
    try:
        return _parse_encoded(marked, header, table, "utf8")
    except pa.ArrowInvalid:
        # Arrow hands out a row of too few or too many values as text, and fails if its bytes are none. Rare, so that
        # each byte may be read as a character.
        rows, skipped = _parse_encoded(data, header, table, "latin-1")
        columns = [pa.array([_original_bytes(value) for value in column.to_pylist()], pa.binary()) for column in rows]
        texts = [row.text.encode("latin-1").decode("utf-8", errors="backslashreplace") for row in skipped]
        skipped = [row._replace(text=text) for row, text in zip(skipped, texts, strict=True)]
        return pa.table(columns, rows.column_names), skipped


def _original_bytes(value: bytes | None) -> bytes | None:
    return None if value is None else value.decode("utf-8").encode("latin-1")


def _parse_encoded(
    data: bytes, header: tuple[str, ...], table: Table, encoding: str
) -> tuple[pa.Table, list[pa.csv.InvalidRow]]:
    skipped: list[pa.csv.InvalidRow] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        skipped.append(row)
        return "skip"

    names = [column.name_in_file for column in table.columns]
    rows = pa.csv.read_csv(
        pa.BufferReader(data),
        read_options=pa.csv.ReadOptions(
            # Without threads pyarrow reports the number of a row with too few or too many values.
            use_threads=False,
            block_size=2 * len(data) + 1,  # In UTF-8 a byte that is read as a character may become two.
            column_names=list(header),
            encoding=encoding,
        ),
        parse_options=_parse_options(table, skip),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()),
            include_columns=names,
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    return rows, skipped


def _parse_options(table: Table, on_bad_row=None) -> pa.csv.ParseOptions:
    frame = framing(table)
    return pa.csv.ParseOptions(
        delimiter=frame.delimiter,
        quote_char='"' if frame.quoted else False,
        invalid_row_handler=on_bad_row,
        # An empty line is a bad row: ignoring it would shift the numbers behind it.
        ignore_empty_lines=False,
        newlines_in_values=frame.quoted,
    )


def _unequal_row(file: SourceFile, row: pa.csv.InvalidRow, first_row: int) -> BadRow:
    return BadRow(
        role=file.role,
        file=file.name,
        row=first_row + row.number - 1,
        reason=f"{row.actual_columns}_columns_instead_of_{row.expected_columns}",
        raw=row.text,
        lines=1 + row.text.rstrip("\r\n").count("\n"),
    )
