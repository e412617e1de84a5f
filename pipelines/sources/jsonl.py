"""JSON lines: one object a line. Arrow parses a block at once where that gives the same text as Python line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from clsd_tf.tables import Table
from pipelines.sources import files
from pipelines.sources.files import BadRow, RawBatch, SourceFile, SourceSlice
from pipelines.sources.records import records_table
from pipelines.sources.row_blocks import Framing, RowBlock, row_blocks

FRAMING = Framing()


def keys(file: SourceFile, table: Table) -> list[str]:
    """Keys of the first 1,000 lines, in the order in which they occur."""
    with files.open_arrow(file) as stream:
        block = next(row_blocks(stream.read, FRAMING, 1), None)
    lines = block.data.split(b"\n", 1000)[:1000] if block else []
    return list(dict.fromkeys(key for line in lines for key in _json_object(line) or {}))


def read(block: RowBlock, part: SourceSlice, table: Table) -> Iterator[RawBatch]:
    """Parses the lines of a block."""
    lines = block.data.removesuffix(b"\n").split(b"\n")
    for start in range(0, len(lines), files.ROWS_PER_BATCH):
        yield _read_lines(lines[start : start + files.ROWS_PER_BATCH], block.first_row + start, part, table)


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
        value = json.loads(line)
        if b"\\u" in line:  # An escape may stand for half a character, which no text can hold.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):  # Also UnicodeDecodeError and UnicodeEncodeError.
        return None
    return value if isinstance(value, dict) else None
