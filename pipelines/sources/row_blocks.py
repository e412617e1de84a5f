"""A stream of text -> blocks of whole rows, each with the number of its first row.

What ends a row is found on whole blocks with NumPy, by the same rules as Arrow's CSV parser, so that a file can be cut
anywhere and every row keeps its number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

from pipelines.sources import files
from pipelines.sources.files import UnreadableError

_MAX_ROW_BYTES = 64 << 20  # A longer "row" is a stray quote or no text at all.
_LINE_FEED, _RETURN, _QUOTE = b'\n\r"'


@dataclasses.dataclass(frozen=True)
class Framing:
    """Rule of where rows end.

    Attributes:
      delimiter: between values; None where rows are lines (JSON lines).
      quoted: a value may stand in double quotes, and then hold line ends.
    """

    delimiter: str | None = None
    quoted: bool = False

    @property
    def returns_end_rows(self) -> bool:
        return self.delimiter is not None  # As Arrow's CSV parser has it; in JSON a return is blank space.


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """Whole rows of a stream.

    Attributes:
      data: their bytes, line ends included.
      start: byte of the stream at which they start.
      first_row: number of the first row.
      num_rows: at least 1.
    """

    data: bytes
    start: int
    first_row: int
    num_rows: int

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    @property
    def rows(self) -> np.ndarray:
        """Number of each row."""
        return np.arange(self.first_row, self.first_row + self.num_rows)


def row_blocks(
    read: Callable[[int], bytes], framing: Framing, first_row: int, block_bytes: int | None = None
) -> Iterator[RowBlock]:
    """Reads a stream in blocks of whole rows.

    Args:
      read: number of bytes -> at most that many; none at the end.
      framing: what separates rows. The stream starts where a row starts.
      first_row: number of the first row.
      block_bytes: how much is read at once; None is ``files.BLOCK_BYTES``.

    Yields:
      Blocks, in order; a row longer than ``block_bytes`` makes a longer one.

    Raises:
      UnreadableError: the stream is damaged, or a row is longer than 64 MiB. Rows before it have been yielded.
    """
    rest, start = b"", 0
    while True:
        try:
            data = read(block_bytes or files.BLOCK_BYTES)
        except files.READ_ERRORS as error:
            raise UnreadableError(str(error), first_row - 1) from error
        block = rest + data
        if not block:
            return
        num_rows, size = _whole_rows(block, framing, is_last=not data)
        if num_rows:
            yield RowBlock(block[:size], start, first_row, num_rows)
        rest, start, first_row = block[size:], start + size, first_row + num_rows
        if len(rest) > _MAX_ROW_BYTES:
            raise UnreadableError(f"a row of more than {_MAX_ROW_BYTES >> 20} MiB", first_row - 1)
        if not data:
            return


def _whole_rows(block: bytes, framing: Framing, is_last: bool) -> tuple[int, int]:
    """(number of whole rows, their bytes). The last block may end without a line end."""
    ends = row_ends(block, framing, is_last)
    size = int(ends[-1]) + 1 if len(ends) else 0
    if is_last and size < len(block):
        return len(ends) + 1, len(block)
    return len(ends), size


def row_ends(block: bytes, framing: Framing, is_last: bool) -> np.ndarray:
    """Finds the bytes that end a row.

    Args:
      block: starts where a row starts.
      framing: of the stream.
      is_last: nothing follows the block.

    Returns:
      Positions in the block, ascending, int64 [num_ends].
    """
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(characters == _LINE_FEED)
    if framing.returns_end_rows and b"\r" in block:
        ends = np.sort(np.concatenate([ends, _lone_returns(characters, is_last)]))
    if framing.quoted and b'"' in block:
        assert framing.delimiter is not None, "quoted values stand between delimiters"
        borders = _quote_borders(block, characters, framing.delimiter)
        ends = ends[np.searchsorted(borders, ends) % 2 == 0]
    return ends


def _lone_returns(characters: np.ndarray, is_last: bool) -> np.ndarray:
    """Returns without a line feed behind them; of one at the very end that is not yet known."""
    returns = np.flatnonzero(characters == _RETURN)
    known = returns[returns + 1 < len(characters)]
    lone = known[characters[known + 1] != _LINE_FEED]
    return np.append(lone, returns[len(known) :]) if is_last else lone


def _quote_borders(block: bytes, characters: np.ndarray, delimiter: str) -> np.ndarray:
    """Places where a quoted value starts and ends, in turn.

    In a well-formed file that is every quote ("" within a value ends and starts it again). A quote amid an unquoted
    value is an ordinary character: where there is one, values are matched one by one.
    """
    quotes = np.flatnonzero(characters == _QUOTE)
    opening = quotes[::2]
    before = characters[opening[opening > 0] - 1]
    if np.isin(before, np.frombuffer(b'\n\r"' + delimiter.encode(), np.uint8)).all():
        return quotes
    separators = re.escape(b"\n\r" + delimiter.encode())
    quoted_value = re.compile(rb'(?:(?<=[%b])|\A)"[^"]*(?:""[^"]*)*("?)' % separators)
    borders = []
    for match in quoted_value.finditer(block):
        borders += [match.start(), match.end() - 1] if match.group(1) else [match.start()]
    return np.array(borders, np.int64)
