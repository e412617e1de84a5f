"""Slices: a file may be cut anywhere, and every row keeps its values and its number."""

import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clsd_tf.spec.tables import Column, Table
from pipelines.sources import ROW_ID, hash_file, list_files, plan_file, read_slice, row_number

COLUMNS = (Column(name="a", type="string"), Column(name="b", type="string"))
on_one_file = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table_of(name, file_format="csv"):
    return Table(path=name, format=file_format, columns=COLUMNS)


def write(directory, name, content):
    (directory / name).write_bytes(content)
    return table_of(name, name.split(".")[1])


def read(directory, table, slice_bytes):
    """(rows, bad rows, number of slices); a row is (number, a, b)."""
    [file] = list_files(table, "log", str(directory))
    slices = plan_file(file, table, slice_bytes).slices
    batches = [batch for part in slices for batch in read_slice(part, table)]
    assert [batch.unreadable for batch in batches if batch.unreadable] == []
    columns = [
        [value for batch in batches for value in batch.table.column(name).to_pylist()] for name in (ROW_ID, *"ab")
    ]
    rows = [(row_number(row_id), *values) for row_id, *values in zip(*columns, strict=True)]
    return rows, [(row.row, row.reason, row.lines) for batch in batches for row in batch.bad_rows], len(slices)


def split_rows(content, delimiter):
    """Row by row, character by character: a value is quoted if it starts with a quote."""
    rows, row, value, state = [], [], "", "start"
    index = 0
    while index < len(content):
        character = content[index]
        if state == "quoted":
            if character == '"' and content[index + 1 : index + 2] == '"':
                value, index = value + '"', index + 1
            elif character == '"':
                state = "value"
            else:
                value += character
        elif character == '"' and state == "start" and delimiter == ",":
            state = "quoted"
        elif character in "\r\n":
            rows.append([*row, value] if row or state != "start" else [])
            row, value, state = [], "", "start"
            if content[index : index + 2] == "\r\n":
                index += 1
        elif character == delimiter:
            row.append(value)
            value, state = "", "start"
        else:
            value, state = value + character, "value"
        index += 1
    if row or value or state != "start":
        rows.append([*row, value])
    return rows


def expected_rows(content, delimiter):
    rows, bad = [], []
    for number, values in enumerate(split_rows(content, delimiter), start=2):
        if len(values) in (0, 2):  # An empty line is a row without values.
            texts = (value.encode() or None for value in (values or ["", ""]))
            rows.append((number, *texts))
        else:
            bad.append((number, f"{len(values)}_columns_instead_of_2"))
    return rows, bad


PIECES = [
    "x",
    "1",
    ",",
    ",",
    "\t",
    '"',
    '""',
    '"a\nb"',
    '"a\r\n,b"',
    "\n",
    "\n",
    "\r\n",
    "\r",
    "é",
    " ",
    "a,b\n",
    "\ufeff",
]


@on_one_file
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=40),
    slice_bytes=st.integers(1, 60),
    kind=st.sampled_from(["csv", "tsv"]),
)
def test_rows_are_those_of_a_naive_parser_wherever_the_file_is_cut(tmp_path, pieces, slice_bytes, kind):
    delimiter = {"csv": ",", "tsv": "\t"}[kind]
    content = "".join(pieces)
    table = write(tmp_path, f"x.{kind}", (f"a{delimiter}b\n" + content).encode())
    rows, bad, _ = read(tmp_path, table, slice_bytes)
    expected, expected_bad = expected_rows(content, delimiter)
    assert rows == expected
    assert [entry[:2] for entry in bad] == expected_bad
    whole = read(tmp_path, table, 1 << 30)
    assert whole[:2] == (rows, bad)


@pytest.mark.parametrize("slice_bytes", [1, 100, 1000])
def test_slices_are_about_as_long_as_asked_and_never_cut_a_quoted_line_break(tmp_path, slice_bytes):
    content = b"a,b\n" + b'1,"two\nlines"\n' * 300
    rows, bad, num_slices = read(tmp_path, write(tmp_path, "x.csv", content), slice_bytes)
    assert rows == [(number, b"1", b"two\nlines") for number in range(2, 302)]
    assert bad == []
    # Rows of 14 bytes: a slice of 1 byte holds one, the first the header and perhaps a row.
    assert num_slices >= {1: 300, 100: 4204 // 200, 1000: 3}[slice_bytes]


def test_jsonl_lines_keep_their_numbers_wherever_the_file_is_cut(tmp_path):
    lines = [json.dumps({"a": str(number), "b": "\u2028é"}) for number in range(1, 101)]
    lines[40], lines[70] = "", "{"
    table = write(tmp_path, "x.jsonl", "\r\n".join(lines).encode())
    for slice_bytes in (1, 50, 333, 1 << 20):
        rows, bad, num_slices = read(tmp_path, table, slice_bytes)
        assert [row for row, *_ in rows] == [int(a) for _, a, _ in rows]
        assert [row for row, *_ in bad] == [41, 71]
        assert len(rows) == 98
        assert num_slices > 1 or slice_bytes == 1 << 20


@pytest.mark.parametrize("slice_bytes", [1, 400, 1 << 20])
def test_parquet_is_cut_between_row_groups(tmp_path, slice_bytes):
    values = [str(row) for row in range(1000)]
    pa.parquet.write_table(pa.table({"a": values, "b": values}), tmp_path / "x.parquet", row_group_size=64)
    rows, _, num_slices = read(tmp_path, table_of("x.parquet", "parquet"), slice_bytes)
    assert rows == [(row, str(row), str(row)) for row in range(1000)]
    assert num_slices == {1: 16, 400: 16, 1 << 20: 1}[slice_bytes]


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet", "x.csv.gz"])
def test_plan_has_size_and_hash_of_the_stored_file(tmp_path, name):
    if name == "x.parquet":
        pa.parquet.write_table(pa.table({"a": ["1"], "b": ["2"]}), tmp_path / name)
    else:
        content = b'{"a": "1"}\n' * 9 if name == "x.jsonl" else b"a,b\n" + b"1,2\n" * 9
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    table = table_of(name, name.split(".")[1])
    [file] = list_files(table, "log", str(tmp_path))
    stored = (tmp_path / name).read_bytes()
    plan = plan_file(file, table, 10)
    assert (plan.num_bytes, plan.sha256) == (len(stored), hashlib.sha256(stored).hexdigest()) == hash_file(file)


def test_batches_hold_at_most_the_promised_rows(tmp_path):
    table = write(tmp_path, "x.csv", b"a,b\n" + b"1,2\n" * 150_000)
    [file] = list_files(table, "log", str(tmp_path))
    [part] = plan_file(file, table).slices
    batches = list(read_slice(part, table))
    assert [batch.table.num_rows for batch in batches] == [65_536, 65_536, 150_000 - 2 * 65_536]
    assert np.concatenate([batch.table.column(ROW_ID) for batch in batches]).tolist() == list(range(2, 150_002))


def test_files_of_date_partitioned_folders_are_found_without_hidden_ones(tmp_path):
    for name in ("date=2022-04-26/p.csv", "date=2022-04-25/p-1.csv", "date=2022-04-25/p-0.csv"):
        (tmp_path / "log" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "log" / name).write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "log" / "_temporary").mkdir()
    for name in ("_SUCCESS", "date=2022-04-25/.p-0.csv.crc", "date=2022-04-25/_SUCCESS", "_temporary/p.csv"):
        (tmp_path / "log" / name).write_text("no table", encoding="utf-8")
    for pattern in ("log/*/*", "log/**", "log/date=*/*.csv"):
        found = list_files(table_of(pattern), "log", str(tmp_path))
        assert [file.path.removeprefix(f"{tmp_path}/log/") for file in found] == [
            "date=2022-04-25/p-0.csv",
            "date=2022-04-25/p-1.csv",
            "date=2022-04-26/p.csv",
        ]


def test_a_hidden_file_is_read_when_the_pattern_names_it(tmp_path):
    write(tmp_path, "_x.csv", b"a,b\n1,2\n")
    assert len(list_files(table_of("_x.csv"), "log", str(tmp_path))) == 1
