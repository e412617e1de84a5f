"""JSON lines: whole blocks and single lines give the same text."""

import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clsd_tf.data.columns import value_to_text
from clsd_tf.spec.tables import Column, Table
from pipelines.sources import ROW_ID, SourceFile, jsonl, plan_file, read_slice, row_number
from pipelines.sources.row_blocks import RowBlock

COLUMNS = tuple(Column(name=name, type=kind) for name, kind in (("a", "string"), ("b", "int64"), ("c", "float")))
TABLE = Table(path="x.jsonl", format="jsonl", columns=COLUMNS)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70) | st.integers(-9, 9),
    st.floats() | st.sampled_from([1700000000123.0, -0.0, 1e-7, 3e-5, 1e22, 123456.75, 2.0**53 + 2]),
    st.text(max_size=4) | st.sampled_from(["2024-01-02", "2024-01-02T03:04:05Z", "1", "é\u2028", '"\\', "\ud800", ""]),
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from("ab"), SCALARS, max_size=2)
KINDS = st.sampled_from(
    [
        VALUES,
        st.integers(-99, 99),
        st.floats(-1e6, 1e6) | st.just(3e-5),
        st.text(max_size=3),
        st.booleans(),
        st.lists(st.text(max_size=2), max_size=2),
        st.floats(-9, 9) | st.integers(-9, 9),
    ]
)


@st.composite
def uniform_records(draw):
    """Records whose columns mostly have one type each, as real files do."""
    kinds = {name: draw(KINDS) | st.none() for name in "abcd"}
    return draw(st.lists(st.fixed_dictionaries({}, optional=kinds), max_size=6))


ODD_LINES = [
    '{"a": 1} {"a": 2}',
    '{"a":',
    '"x"}',
    '{"a": 1, "a": 2}',
    '{"a": "x", "b": {"a": 1}}',
    "",
    "[1]",
    " {} ",
    "null",
    '{"a": 01}',
    '{"c": NaN}',
    '{"c": Infinity}',
    '{"a": "\t"}',
    '{"a": "\\u0000"}',
    '{"a": "\\ud83d\\ude00"}',
    '{"\\u0061": "y"}',
    "{}",
    '{"c": 1e999}',
    '{"b": 9223372036854775808}',
    '{"c": 9007199254740993}',
    '{"a": [null, "x"]}',
    '{"a": {}}',
    '{"b": 1.0}',
    '{"b": -0}',
    '{"a": "x",}',
    "{'a': 1}",
    '{"a": tru}',
    '{"a": "x"} // no',
    '{"a"',
    "{}}",
    '{"a": [1, 2}',
]


def by_hand(lines):
    """(number, values) of the good lines and numbers of the others, by the standard library alone."""
    rows, bad = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()
            good = isinstance(record, dict)
        except ValueError:
            good = False
        if good:
            rows.append((number, *(value_to_text(record.get(name)) for name in "abc")))
        else:
            bad.append(number)
    return rows, bad


def read(path):
    file = SourceFile("log", 0, str(path))
    batches = [batch for part in plan_file(file, TABLE).slices for batch in read_slice(part, TABLE)]
    assert [batch.unreadable for batch in batches if batch.unreadable] == []
    rows = [row for batch in batches for row in batch.table.to_pylist()]
    bad = [row.row for batch in batches for row in batch.bad_rows]
    return [(row_number(row[ROW_ID]), row["a"], row["b"], row["c"]) for row in rows], bad


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=uniform_records(),
    odd=st.lists(st.sampled_from(ODD_LINES), max_size=2),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_every_line_is_read_as_the_standard_library_reads_it(tmp_path, records, odd, ascii_only, end):
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records] + odd
    content = end.join(lines).encode("utf-8", errors="surrogatepass")
    (tmp_path / "x.jsonl").write_bytes(content)
    decoded = [line.decode("utf-8", errors="backslashreplace") for line in content.split(b"\n")]
    assert read(tmp_path / "x.jsonl") == by_hand(decoded if decoded[-1] else decoded[:-1])


@pytest.mark.parametrize(
    "line", ['{"a": "x", "b": 3, "c": 2.5}', '{"a": ["x", "y"], "b": 3, "c": 2}', '{"b": 1, "d": {"e": [1]}}']
)
def test_ordinary_lines_are_parsed_as_a_block(line):
    block = RowBlock((line + "\n").encode() * 9, start=0, first_row=1, num_rows=9)
    assert jsonl._parse_block(block, TABLE).schema.types == [pa.string()] * 3


def test_null_inside_a_json_list_does_not_end_the_job(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": ["x", null, "y"]}\n{"a": "z"}\n', encoding="utf-8")
    rows, bad = read(tmp_path / "x.jsonl")
    assert [a for _, a, *_ in rows] == ["x|y", "z"]
    assert bad == []
