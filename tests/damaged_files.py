"""Hypothesis strategies for damaged files of the shop's log, and what must come of each.

A file is made of good rows, some of which are damaged in known ways; then the file as a whole may be damaged. So it is
known by construction which rows must be read, with which values, and which must be refused.
"""

import bz2
import dataclasses
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet
from hypothesis import strategies as st

T0 = 1_700_000_000
SECRET = "user-secret"  # Part of each user's id: no message may hold it.
STRINGS, INTS, FLOATS = ("user_id", "item_id"), ("time", "clicked"), ("seconds", "weight")
COLUMNS = (*STRINGS, *INTS, *FLOATS)  # All required: keys, time, label, intensity and weight.


@dataclasses.dataclass
class DamagedFile:
    """A file and what must come of it.

    Attributes:
      good: row number -> values of each row that must be read.
      bad: numbers of rows that must be refused.
      num_lines: rows that are accounted for, good and bad; None where damage leaves it open.
      may_fail: the whole file may be refused, by name. must_fail: it must be.
      cause: what was done, for the message of a failing test.
    """

    name: str
    data: bytes = b""
    good: dict[int, dict] = dataclasses.field(default_factory=dict)
    bad: set[int] = dataclasses.field(default_factory=set)
    num_lines: int | None = None
    may_fail: bool = False
    must_fail: bool = False
    cause: list[str] = dataclasses.field(default_factory=list)

    def __repr__(self):
        return f"{self.name}: {', '.join(self.cause)}: {self.data[:2000]!r}"

    def lose_rows(self, kept: set[int] | None = None) -> None:
        """Only rows of these numbers are still known."""
        kept = kept or set()
        self.good = {number: row for number, row in self.good.items() if number in kept}
        self.bad &= kept
        self.num_lines = None


def good_row(k: int) -> dict:
    """Rows differ, so that a value in the wrong row or column shows."""
    values = [f"{SECRET}-{k % 7}", f"i{k}", T0 + 60 * k, k % 2, 1.5 * k, 0.25 + k]
    return dict(zip(COLUMNS, values, strict=True))


_NOT_INTS = [
    "maybe",
    "1.5",
    "0x10",
    "1_000",
    "--1",
    "1e3",
    "true",
    "9" * 19,
    "-" + "9" * 40,
    "9223372036854775808",
    "١",
]
_NOT_FLOATS = ["nan", "NaN", "inf", "-Infinity", "1e999", "abc", "1e", "0x1p3", "1.2.3", "1 000", "9" * 400]
# (column, text) that no row may have.
_BAD_VALUES = st.one_of(
    st.tuples(st.sampled_from(INTS), st.sampled_from(_NOT_INTS)),
    st.tuples(st.sampled_from(FLOATS), st.sampled_from(_NOT_FLOATS)),
    st.tuples(st.sampled_from(COLUMNS), st.just("")),
    st.tuples(st.just("time"), st.sampled_from(["0", "-1", str(T0 * 1000), "9" * 18])),
    st.tuples(st.just("weight"), st.sampled_from(["-1", "-1e-9"])),
    st.tuples(st.sampled_from(INTS + FLOATS), st.sampled_from(["1\0", "\0", "1\u200b"])),
)
_NOT_UTF8 = st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf"])


# --- CSV and TSV -----------------------------------------------------------------------------------------------------

_REFUSED_ROWS = ("bad_value", "invalid_utf8", "few_values", "many_values", "many_values_not_utf8", "empty_line")
_OPEN_ROWS = ("blank_line", "nul", "very_long", "quote_inside", "open_quote")  # Read or refused, but no more than that.


@st.composite
def delimited_files(draw, file_format: str) -> DamagedFile:
    """Reordered and extra columns, any line ends, quoting, byte order mark, compression; rows and file damaged."""
    num_rows = draw(st.integers(1, 25))
    damages = draw(
        st.dictionaries(st.integers(0, num_rows - 1), st.sampled_from(_REFUSED_ROWS + _OPEN_ROWS), max_size=4)
    )
    writer = _DelimitedWriter(draw, file_format, damages)
    file = DamagedFile(f"log.{file_format}", cause=[f"{name} in row {k + 2}" for k, name in sorted(damages.items())])
    lines = [writer.header, *(writer.line(k, file) for k in range(num_rows))]
    ends = _line_ends(draw, lines)
    if not writer.is_swallowing and b"\r" not in ends:  # A swallowed return is not counted as a line.
        file.num_lines = num_rows
    _join_lines(draw, file, lines, ends, can_end_open=num_rows - 1 not in damages)
    _damage_delimited_file(draw, file, lines, ends, writer.delimiter)
    _compress(draw, file)
    return file


class _DelimitedWriter:
    """Writes the lines of one file, all values quoted or none."""

    def __init__(self, draw, file_format: str, damages: dict[int, str]):
        self._draw, self._damages = draw, damages
        self.delimiter = b"," if file_format == "csv" else b"\t"
        self._columns = draw(st.permutations([*COLUMNS, *["extra", "more"][: draw(st.integers(0, 2))]]))
        self._can_quote = file_format == "csv"
        self._quoted = self._can_quote and draw(st.booleans())
        self.is_swallowing = False  # From a row with an open quote on, a row's bytes may be part of another row.
        self.header = self._line({name: name.encode() for name in self._columns})

    def line(self, k: int, file: DamagedFile) -> bytes:
        """The bytes of row ``k``; notes in ``file`` what must come of it."""
        values = {name: str(value).encode() for name, value in good_row(k).items()}
        damage = self._damages.get(k)
        line = self._line(values) if damage is None else self._damaged(damage, values)
        if not self.is_swallowing and damage is None:
            file.good[k + 2] = good_row(k)  # Row 1 is the header.
        if not self.is_swallowing and damage in _REFUSED_ROWS:
            file.bad.add(k + 2)
        return line

    def _line(self, values: dict[str, bytes], size: int | None = None) -> bytes:
        fields = [values.get(name, b"x") for name in self._columns][:size]
        return self.delimiter.join(b'"%b"' % field if self._quoted else field for field in fields)

    def _damaged(self, damage: str, values: dict[str, bytes]) -> bytes:
        draw, line = self._draw, self._line
        if damage == "bad_value":
            name, text = draw(_BAD_VALUES)
            return line({**values, name: text.encode()})
        if damage == "invalid_utf8":
            return line({**values, draw(st.sampled_from(COLUMNS)): draw(_NOT_UTF8)})
        if damage == "few_values":
            return line(values, draw(st.integers(1, len(self._columns) - 1)))
        if damage.startswith("many_values"):
            return line(values) + self.delimiter + (b"y" if damage == "many_values" else draw(_NOT_UTF8))
        if damage == "open_quote":
            self.is_swallowing |= self._can_quote
            name = draw(st.sampled_from(self._columns))
            return line({**values, name: b'"' + values.get(name, b"x")})
        texts = {"nul": b"i\0", "very_long": b"i" * 30_000, "quote_inside": b'i"3'}
        return line({**values, "item_id": texts[damage]}) if damage in texts else b" " * (damage == "blank_line")


def _line_ends(draw, lines: list[bytes]) -> list[bytes]:
    style = draw(st.sampled_from([b"\n", b"\r\n", b"\r", b"mixed"]))
    if style != b"mixed":
        return [style] * len(lines)
    ends = [draw(st.sampled_from([b"\n", b"\r\n", b"\r"])) for _ in lines]
    # A return, an empty line and a line feed would be one line end.
    return [end if following else b"\r\n" for end, following in zip(ends, [*lines[1:], b"end"], strict=True)]


def _join_lines(draw, file: DamagedFile, lines: list[bytes], ends: list[bytes], can_end_open: bool) -> None:
    file.data = b"".join(line + end for line, end in zip(lines, ends, strict=True))
    if can_end_open and draw(st.booleans()):
        file.data = file.data.removesuffix(ends[-1])
    if draw(st.booleans()):
        file.data = b"\xef\xbb\xbf" + file.data
        file.cause.append("byte order mark")


def _damage_delimited_file(draw, file: DamagedFile, lines: list[bytes], ends: list[bytes], delimiter: bytes) -> None:
    kind = draw(st.sampled_from(["whole"] * 6 + ["empty", "header_only", "cut", "no_column", "column_twice"]))
    file.cause.append(kind)
    if kind == "empty":
        file.data, file.must_fail = b"", True
    elif kind == "header_only":
        file.data = lines[0] + ends[0]
        file.lose_rows()
        file.num_lines = 0
    elif kind == "cut":
        file.may_fail = 1 not in _cut(draw, file, lines, ends)  # In the header.
    elif kind != "whole":
        wrong = lines[0].replace(b"weight", b"wait") if kind == "no_column" else lines[0] + delimiter + b"weight"
        file.data, file.must_fail = file.data.replace(lines[0], wrong, 1), True


def _cut(draw, file: DamagedFile, lines: list[bytes], ends: list[bytes]) -> set[int]:
    """Cuts the text off anywhere; returns the numbers of the lines that are still whole, the first of which is 1."""
    size = draw(st.integers(1, len(file.data)))
    place, whole = file.data.index(lines[0]), set()
    for number, (line, end) in enumerate(zip(lines, ends, strict=True), start=1):
        place += len(line) + len(end)
        if place <= size:
            whole.add(number)
    file.data = file.data[:size]
    file.lose_rows(whole)
    return whole


# --- Compression -----------------------------------------------------------------------------------------------------


_GZIP_MAGIC = b"\x1f\x8b"


def _compress(draw, file: DamagedFile) -> None:
    """Compresses the file, perhaps, and perhaps cuts off or changes the compressed bytes."""
    suffix = draw(st.sampled_from(["", "", "", ".gz", ".zst", ".bz2"]))
    if not suffix:
        return
    file.name += suffix
    file.data = {".gz": _gzip, ".zst": _zstd, ".bz2": bz2.compress}[suffix](file.data)
    damage = draw(st.sampled_from(["whole", "whole", "cut", "changed"]))
    file.cause.append(f"compressed bytes {damage}")
    place = draw(st.integers(0, len(file.data) - 1))
    if damage == "cut":
        # Between two members nothing tells a cut from the end.
        place -= file.data[place : place + 2] == _GZIP_MAGIC and place > 0
        file.data, file.must_fail = file.data[:place], True
    elif damage == "changed" and suffix != ".zst":  # This zstd has no checksum, so nobody can see a change.
        changed = file.data[place] ^ draw(st.integers(1, 255))
        file.data, file.may_fail = file.data[:place] + bytes([changed]) + file.data[place + 1 :], True


def _gzip(data: bytes) -> bytes:
    """Two members, as tools that compress in parallel write them; the first cannot be taken for the whole."""
    return gzip.compress(data[: len(data) // 2], mtime=0) + gzip.compress(data[len(data) // 2 :], mtime=0)


def _zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


# --- JSON lines ------------------------------------------------------------------------------------------------------

_NOT_OBJECTS = [
    *(b"[1, 2]", b'"text"', b"3", b"null", b"", b"  ", b"{", b'{"user_id": }', b"{} {}", b"\xff\xfe", b"user,item"),
    *(b"[" * 50_000, b'{"time": %b}' % (b"9" * 5000), b'{"user_id": "\\ud800"}', b'{"user_id": "\xc3"}', b"{'a': 1}"),
]
_JSON_NO_NUMBERS = ['"maybe"', "true", "null", "[]", "[null, null]", "[1, 2]", '{"a": 1}', "NaN", "-Infinity", "1e999"]
_JSON_NO_INTS = [*_JSON_NO_NUMBERS, "1.5", "9" * 30, '"1\\u0000"']
_JSON_ODD = ['{"a": [{"b": null}]}', "[[1], [2, 3]]", "[[], [null]]", '["a", ["b"]]', '"\\u0000"', '""', "-0.0", "1e30"]


@st.composite
def json_files(draw) -> DamagedFile:
    """JSON lines; reordered and extra keys; values of other types; lines that are no objects; cut off; compressed."""
    num_rows = draw(st.integers(1, 25))
    damages = draw(st.dictionaries(st.integers(0, num_rows - 1), st.sampled_from(["value", "line", "odd"]), max_size=4))
    file = DamagedFile("log.jsonl", cause=[f"{name} in row {k + 1}" for k, name in sorted(damages.items())])
    lines = [_json_line(draw, k, damages.get(k), file) for k in range(num_rows)]
    ends = [draw(st.sampled_from([b"\n", b"\r\n"]))] * num_rows
    file.num_lines = num_rows
    _join_lines(draw, file, lines, ends, can_end_open=num_rows - 1 not in damages)
    if file.data.startswith(b"\xef\xbb\xbf"):
        file.lose_rows(set(range(2, num_rows + 1)))  # Whether a mark belongs to the first line is open.
    if draw(st.integers(0, 4)) == 0:
        _cut(draw, file, lines, ends)
    _compress(draw, file)
    return file


def _json_line(draw, k: int, damage: str | None, file: DamagedFile) -> bytes:
    if damage in ("value", "line"):
        file.bad.add(k + 1)
    if damage == "line":
        return draw(st.sampled_from(_NOT_OBJECTS))
    values = {name: json.dumps(value) for name, value in good_row(k).items()}
    if damage is None:
        file.good[k + 1] = good_row(k)
        values["extra"] = draw(st.sampled_from(["1", "null", "[[1], {}]", "NaN", '"\\ud83d\\ude00"']))
    elif damage == "value":
        name = draw(st.sampled_from(INTS + FLOATS))
        values[name] = draw(st.sampled_from(_JSON_NO_INTS if name in INTS else _JSON_NO_NUMBERS))
    else:
        values[draw(st.sampled_from(COLUMNS))] = draw(st.sampled_from(_JSON_ODD))
    names = draw(st.permutations(list(values)))
    return ("{" + ", ".join(f'"{name}": {values[name]}' for name in names) + "}").encode()


# --- Parquet ---------------------------------------------------------------------------------------------------------

# (column, type) that a reader must take.
_FITTING_TYPES = [
    *[(name, kind) for name in STRINGS for kind in (pa.large_string(), pa.binary(), pa.string_view())],
    *[(name, pa.dictionary(pa.int32(), pa.string())) for name in STRINGS],
    *[("clicked", kind) for kind in (pa.int8(), pa.uint64(), pa.int32(), pa.string(), pa.float32())],
    *[("time", kind) for kind in (pa.string(), pa.float64(), pa.uint32())],
    *[("seconds", kind) for kind in (pa.float32(), pa.decimal128(12, 3), pa.string())],
]
# Types that may be refused, in any column, with the value of each row.
_ODD_TYPES = [
    (pa.struct([("a", pa.int64())]), {"a": 1}),
    (pa.map_(pa.string(), pa.int64()), [("a", 1)]),
    (pa.list_(pa.int64()), [1, None]),
    (pa.list_(pa.list_(pa.string())), [["a", None], None]),
    (pa.list_(pa.struct([("a", pa.string())])), [{"a": None}]),
    (pa.list_(pa.string(), 2), ["a", None]),
    (pa.null(), None),
    (pa.timestamp("us", tz="Europe/Paris"), 1),
    (pa.timestamp("ms"), T0 * 1000),
    (pa.date32(), 1),
    (pa.time64("us"), 1),
    (pa.duration("s"), 1),
    (pa.decimal256(50, 3), 1),
    (pa.binary(3), b"\xff\xff\xff"),
    (pa.bool_(), True),
    (pa.float16(), 1.0),
]
_PARQUET_ROWS = [("seconds", float("nan")), ("weight", float("-inf")), ("time", None), ("user_id", None), ("time", 1)]


@st.composite
def parquet_files(draw) -> DamagedFile:
    """Parquet; reordered and extra columns; other types; nulls and NaN; cut off, empty, or no Parquet at all."""
    num_rows = draw(st.integers(1, 25))
    rows = [good_row(k) for k in range(num_rows)]
    file = DamagedFile("log.parquet", good={k: dict(rows[k]) for k in range(num_rows)}, num_lines=num_rows)
    for k in draw(st.sets(st.integers(0, num_rows - 1), max_size=3)):
        name, value = draw(st.sampled_from(_PARQUET_ROWS))
        rows[k] = {**rows[k], name: value}
        file.bad.add(k)
        del file.good[k]
        file.cause.append(f"{name}={value} in row {k}")
    columns = {name: pa.array([row[name] for row in rows]) for name in COLUMNS}
    columns["extra"] = pa.array([[{"a": None}]] * num_rows)
    _change_type(draw, columns, file)
    names = draw(st.permutations([*columns]))
    stream = io.BytesIO()
    table = pa.table({name: columns[name] for name in names})
    pa.parquet.write_table(table, stream, row_group_size=draw(st.integers(1, num_rows)))
    file.data = stream.getvalue()
    _damage_parquet_file(draw, file, table)
    return file


def _change_type(draw, columns: dict[str, pa.Array], file: DamagedFile) -> None:
    kind = draw(st.sampled_from(["declared", "fitting", "odd"]))
    if kind == "fitting" and not file.bad:
        name, type_ = draw(st.sampled_from(_FITTING_TYPES))
        columns[name] = columns[name].cast(type_)
        file.cause.append(f"{name}: {type_}")
    elif kind == "odd":
        name = draw(st.sampled_from(COLUMNS))
        type_, value = draw(st.sampled_from(_ODD_TYPES))
        num_rows = len(columns[name])
        columns[name] = pa.array([None if k % 3 == 2 else value for k in range(num_rows)], type_)
        file.lose_rows()
        file.num_lines, file.may_fail = num_rows, True
        file.cause.append(f"{name}: {type_}")


def _damage_parquet_file(draw, file: DamagedFile, table: pa.Table) -> None:
    kind = draw(st.sampled_from(["whole"] * 4 + ["cut", "no_parquet", "no_column"]))
    file.cause.append(kind)
    file.must_fail = kind != "whole"
    if kind == "cut":
        file.data = file.data[: draw(st.integers(0, len(file.data) - 1))]
    elif kind == "no_parquet":
        file.data = draw(st.sampled_from([b"user_id,item_id\n1,2\n", bytes(500), b"PAR1" + bytes(50) + b"PAR1"]))
    elif kind == "no_column":
        stream = io.BytesIO()
        pa.parquet.write_table(table.drop_columns(["weight"]), stream)
        file.data = stream.getvalue()
