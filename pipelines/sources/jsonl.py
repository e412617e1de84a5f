"""JSON lines: one object a line. Arrow parses whole blocks where that gives the same text as Python line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from clsd_tf.data.columns import convert_column, value_to_text
from clsd_tf.spec.tables import Column, Table
from pipelines.sources import files
from pipelines.sources.files import BadRow, RawBatch, SourceFile, SourceSlice
from pipelines.sources.records import records_table
from pipelines.sources.row_blocks import Framing, RowBlock, row_blocks

FRAMING = Framing()
_NUM_SAMPLED = 100  # Lines that tell the types of a block; where others differ, the block is read line by line.


def keys(file: SourceFile, table: Table) -> list[str]:
    """Finds the keys of the first 1,000 lines.

    Args:
      file: to look at.
      table: not used; all formats have the same functions.

    Returns:
      Keys, in the order in which they occur.

    Raises:
      OSError, UnreadableError: they cannot be read.
    """
    with files.open_arrow(file) as stream:
        block = next(row_blocks(stream.read, FRAMING, 1), None)
    lines = block.data.split(b"\n", 1000)[:1000] if block else []
    return list(dict.fromkeys(key for line in lines for key in _json_object(line) or {}))


def read(block: RowBlock, part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Parses the lines of a block.

    Args:
      block: of whole lines.
      part: that the block is from.
      table: whose columns are read, as text.

    Yields:
      Batches; lines that are no JSON object are bad rows.
    """
    columns = _parse_block(block, table)
    if columns is not None:
        rows = columns.append_column(files.ROW_ID, pa.array(part.file.row_ids(block.rows)))
        yield from files.cut_batches(rows, [], part.file)
        return
    lines = block.data.removesuffix(b"\n").split(b"\n")
    for start in range(0, len(lines), files.ROWS_PER_BATCH):
        yield _read_lines(lines[start : start + files.ROWS_PER_BATCH], block.first_row + start, part, table)


# --- Whole blocks ----------------------------------------------------------------------------------------------------


def _parse_block(block: RowBlock, table: Table) -> pa.Table | None:
    """The declared columns as text; None unless every line is one object that Arrow reads as Python does."""
    if not _is_one_object_a_line(block.data):
        return None
    schema = _sampled_schema(block.data, table)
    if schema is None:
        return None
    try:
        block.data.decode("utf-8")  # Arrow does not look.
        parsed = pa.json.read_json(
            pa.BufferReader(block.data),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=len(block.data) + 1),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (ValueError, pa.ArrowException):
        return None
    if parsed.num_rows != block.num_rows:
        return None
    texts = {column.name: _exact_text(parsed.column(column.name_in_file)) for column in table.columns}
    return None if any(text is None for text in texts.values()) else pa.table(texts)


def _is_one_object_a_line(data: bytes) -> bool:
    """True if each line starts with { and ends with }: then no object crosses a line end."""
    characters = np.frombuffer(data.removesuffix(b"\n").removesuffix(b"\r"), np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    if not len(characters) or characters[0] != ord("{") or characters[-1] != ord("}"):
        return False
    before = characters[ends - 1]
    before = np.where(before == ord("\r"), characters[ends - 2], before)
    return bool((before == ord("}")).all() and (characters[ends + 1] == ord("{")).all())


def _sampled_schema(data: bytes, table: Table) -> pa.Schema | None:
    """Types of the declared columns in the first lines; None if one is nested, or a name stands in a line twice."""
    lines = data.split(b"\n", _NUM_SAMPLED)[:_NUM_SAMPLED]
    records = [record for line in lines if (record := _json_object(line))]
    fields = [(column.name_in_file, _arrow_type(column, records)) for column in table.columns]
    return None if any(kind is None for _, kind in fields) else pa.schema(fields)


def _arrow_type(column: Column, records: list[dict[str, Any]]) -> pa.DataType | None:
    values = [value for record in records if (value := record.get(column.name_in_file)) is not None]
    kinds = {type(value) for value in values}
    if kinds == {list}:
        return pa.list_(pa.string()) if all(isinstance(entry, str) for value in values for entry in value) else None
    if kinds <= {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds <= {int, float}:
        return pa.int64() if kinds == {int} and column.type != "float" else pa.float64()
    return None


def _exact_text(values: pa.ChunkedArray) -> pa.Array | None:
    """A column as the text that ``value_to_text`` gives; None if that cannot be told."""
    values = values.combine_chunks()
    if pa.types.is_string(values.type):
        return values
    text, failures = convert_column(values, Column(name="any", type="string"))
    if failures:
        return None
    if pa.types.is_floating(values.type):
        return _rewritten(values, text)
    if pa.types.is_list(values.type):  # There an empty list is missing; here it is the empty text.
        return pc.if_else(pc.and_(values.is_valid(), text.is_null()), pa.scalar("", pa.string()), text)
    return text


def _rewritten(values: pa.DoubleArray, text: pa.StringArray) -> pa.Array | None:
    """Small floats, which Python and Arrow write differently, as Python does; None if one may be a longer integer."""
    size = np.abs(pc.fill_null(values, 0.0).to_numpy())
    if not (size < 1e15).all():
        return None
    small = (size > 0) & (size < 1e-4)
    replacements = [value_to_text(value) for value in values.filter(pa.array(small)).to_pylist()]
    return pc.replace_with_mask(text, pa.array(small), pa.array(replacements, pa.string()))


# --- Line by line ----------------------------------------------------------------------------------------------------


def _read_lines(lines: list[bytes], first_row: int, part: SourceSlice, table: Table) -> RawBatch:
    records, bad_rows = [], []
    for number, line in enumerate(lines, start=first_row):
        record = _json_object(line)
        if record is None:
            raw = line.decode("utf-8", errors="backslashreplace")
            bad_rows.append(BadRow(part.file.role, part.file.name, number, "not_a_json_object", raw))
        else:
            records.append((number, record))
    return RawBatch(part.file, records_table(part.file, table, records), bad_rows)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8-sig"))  # A byte order mark may stand before the first line.
        if b"\\u" in line:  # An escape may stand for half a character, which no text can hold.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):  # Also UnicodeDecodeError and UnicodeEncodeError.
        return None
    return value if isinstance(value, dict) else None
