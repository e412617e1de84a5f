"""Files of raw rows: what is a missing value, what is refused, and that batch borders decide nothing."""

import json
import time

import pyarrow as pa
import pyarrow.parquet
import pytest

from clsd_tf.data.request_files import _ROWS_PER_BATCH, convert_rows, read_rows, rows_of, typed_rows
from clsd_tf.spec.model_inputs import RawInput

INPUTS = (RawInput("user", "string"), RawInput("age", "int64"), RawInput("recent", "string", is_list=True))


def typed(path, inputs=INPUTS):
    """The rows of the file, as one list of records."""
    return [row for rows in read_rows(path) for row in typed_rows(rows, inputs).to_pylist()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# --- JSON lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_key_that_a_whole_batch_lacks_is_a_missing_value(tmp_path, first):
    full = {"user": "u", "age": 30, "recent": ["i"]}
    short = [{"user": "u"}] * _ROWS_PER_BATCH
    records = [full, *short] if first else [*short, full]
    found = typed(write_lines(tmp_path / "rows.jsonl", records))
    assert [(row["user"], row["age"], row["recent"] or []) for row in found] == [
        (record["user"], record.get("age"), record.get("recent", [])) for record in records
    ]


def test_a_raw_input_that_no_line_has_is_refused(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"user": "u", "age": 30}] * 3)
    with pytest.raises(ValueError, match=r"Received: user, age\. Missing: recent"):
        typed(path)


def test_integers_beyond_64_bits_are_texts_and_no_numbers(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"user": 5}, {"user": 2**63}, {"user": 2**70}])
    assert typed(path, INPUTS[:1]) == [{"user": "5"}, {"user": str(2**63)}, {"user": str(2**70)}]
    path = write_lines(tmp_path / "ages.jsonl", [{"age": 5}, {"age": 2**70}])
    with pytest.raises(ValueError, match="not_int64:age in row 2 of the batch") as caught:
        typed(path, INPUTS[1:2])
    assert str(2**70) not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, "x"], ["5", "x"]),
        ([5, 2**70], ["5", str(2**70)]),
        ([2**60, 2.5], [str(2**60), "2.5"]),
        ([5, 2.5], [5.0, 2.5]),
        ([["a", 1], "b"], ["a|1", "b"]),
        ([["a", 1], None], [["a", "1"], None]),
        ([{"b": [1]}, None], ['{"b": [1]}', None]),
    ],
)
@pytest.mark.parametrize("repeats", [1, _ROWS_PER_BATCH])
def test_a_column_has_one_type_in_the_whole_file(tmp_path, values, expected, repeats):
    path = write_lines(tmp_path / "rows.jsonl", [{"note": value} for value in values for _ in range(repeats)])
    batches = list(read_rows(path))
    assert len({str(batch.schema) for batch in batches}) == 1
    found = [value for batch in batches for value in batch.column("note").to_pylist()]
    assert found == [value for value in expected for _ in range(repeats)]


@pytest.mark.parametrize("line", [b'{"user": "caf\xe9"}', b'{"user": "\\ud800"}', b"[1]", b"{", b"[" * 100_000])
def test_lines_that_are_no_json_objects_are_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"user": "u"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"in line 2 of .*rows\.jsonl\. Correct the line") as caught:
        typed(path, INPUTS[:1])
    assert type(caught.value) is ValueError
    assert "caf" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("rows.jsonl", '{"user": "ü"}\r\n'), ("rows.csv", "user\r\nü\r\n")])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    assert typed(tmp_path / name, INPUTS[:1]) == [{"user": "ü"}]


def test_rows_are_made_of_objects_as_of_lines(tmp_path):
    records = [{"user": 7, "recent": ["a", 1]}, {"user": "u", "age": 30}]
    lines = typed(write_lines(tmp_path / "rows.jsonl", records))
    assert typed_rows(rows_of(records), INPUTS).to_pylist() == lines
    assert lines == [{"user": "7", "age": None, "recent": ["a", "1"]}, {"user": "u", "age": 30, "recent": None}]


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_matter_in_raw_inputs_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"user,note\nu1,plain\nu2,caf\xe9\n")
    assert typed(path, INPUTS[:1]) == [{"user": "u1"}, {"user": "u2"}]
    with pytest.raises(ValueError, match="invalid_utf8:note in row 2 of the batch") as caught:
        typed(path, [RawInput("note", "string")])
    assert "caf" not in str(caught.value)
    with pytest.raises(ValueError, match="invalid_utf8:note in row 2 of the batch"):
        typed(path, [RawInput("note", "string", is_list=True)])


@pytest.mark.parametrize("num_good", [0, 1])
def test_rows_with_another_number_of_values_are_refused_wherever_they_stand(tmp_path, num_good):
    path = tmp_path / "rows.csv"
    path.write_text("user,age\n" + "u1,30\n" * num_good + "secret\n" * 2)
    with pytest.raises(ValueError, match=rf"row\(s\) {num_good + 2}, {num_good + 3}\. Allowed: 2") as caught:
        list(read_rows(path))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_stands_in_a_file_twice_is_named(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("user,age,user\nu1,30,u2\n")
    else:
        table = pa.table([pa.array(["u1"]), pa.array([30]), pa.array(["u2"])], names=["user", "age", "user"])
        pa.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"have each column once\. Received: 'user' 2 times\. Rename"):
        list(read_rows(path))


def test_a_late_repetition_among_many_columns_is_found_in_one_pass(tmp_path):
    path = tmp_path / "rows.csv"
    names = [f"column_{number}" for number in range(30_000)]
    path.write_text(",".join([*names, names[-1]]) + "\n")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"Received: 'column_29999' 2 times"):
        list(read_rows(path))
    assert time.monotonic() - start < 3.0  # Comparing each with each takes half a minute.


@pytest.mark.parametrize("content", [b"", b"us\xe9r\nu1\n"])
def test_a_header_that_cannot_be_read_is_named_by_file(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Received: another line 1 in .*rows\.csv\. Save the file as UTF-8") as caught:
        list(read_rows(path))
    assert type(caught.value) is ValueError


# --- Rows that do not fit --------------------------------------------------------------------------------------------


def test_values_that_do_not_fit_are_told_row_by_row():
    recent = pa.array([[b"a"], [b"b", b"caf\xe9"], None, []], pa.list_(pa.binary()))
    rows = pa.table({"user": ["u", "v", "", None], "age": ["1", "x", "", "1.5"], "recent": recent})
    converted, failures = convert_rows(rows, INPUTS)
    assert {reason: mask.tolist() for reason, mask in failures.items()} == {
        "not_int64:age": [False, True, False, True],
        "invalid_utf8:recent": [False, True, False, False],
    }
    assert converted.to_pylist()[0] == {"user": "u", "age": 1, "recent": ["a"]}
    assert converted.column("recent").to_pylist()[2:] == [None, []]
