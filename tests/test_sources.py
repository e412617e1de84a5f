"""Readers: every format gives the same table, and a bad row is named by the line it stands in."""

import gzip
import json

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf

from clsd_tf.spec.tables import Column, Table
from pipelines.rows.checks import parse_rows
from pipelines.sources import ROW_ID, SourceFile, files, list_files, plan_file, read_slice, row_number, tfds_batches

COLUMNS = (
    Column(name="user_id", type="string"),
    Column(name="item_id", type="string", source_name="item_id:token"),
    Column(name="time", type="int64"),
    Column(name="clicked", type="int64"),
    Column(name="seconds", type="float"),
    Column(name="weight", type="float"),
)
HEADER = [column.name_in_file for column in COLUMNS] + ["unused"]
T0 = 1_700_000_000
# Two rows, the second with an umlaut; `unused` is in the files but not in the spec.
VALUES = [("u1", "i1", T0, 1, 2.5, 1.0, "x"), ("Jürg", "i2", T0 + 9, 0, 3.0, 0.25, "y")]
RECORDS = [dict(zip(HEADER, values, strict=True)) for values in VALUES]


def table_of(path, file_format="csv", columns=COLUMNS):
    return Table(path=path, format=file_format, columns=columns)


def delimited(delimiter, records=RECORDS):
    lines = [delimiter.join(HEADER), *(delimiter.join(str(record[name]) for name in HEADER) for record in records)]
    return "".join(f"{line}\n" for line in lines)


def write_csv(path, rows, header=HEADER):
    path.write_bytes(b"".join(line + b"\n" for line in [",".join(header).encode(), *rows]))


def read_file(file, table):
    return (batch for part in plan_file(file, table).slices for batch in read_slice(part, table))


def read_all(directory, table):
    """(all rows as one table, all bad rows) of the files of a table."""
    batches = [batch for file in list_files(table, "log", str(directory)) for batch in read_file(file, table)]
    return pa.concat_tables([batch.table for batch in batches]), [row for batch in batches for row in batch.bad_rows]


def parsed(directory, table, spec):
    """Rows as the spec types them, without their places."""
    batches = [batch for file in list_files(table, "log", str(directory)) for batch in read_file(file, table)]
    results = [parse_rows(batch, spec) for batch in batches]
    assert [bad for _, bad in results if bad] == []
    return pa.concat_tables([good for good, _ in results]).drop_columns([ROW_ID]).combine_chunks()


@pytest.fixture
def spec(shop_spec):
    """The shop's spec: its log has the columns of ``COLUMNS``."""
    assert shop_spec.tables.log.column_names == [column.name for column in COLUMNS]
    return shop_spec


def numbers(table):
    return [row_number(row_id) for row_id in table.column(ROW_ID).to_pylist()]


# --- Formats ---------------------------------------------------------------------------------------------------------


def write_jsonl(path):
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")


def write_parquet(path):
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), path)


def write_avro(path):  # Names in Avro have no colon.
    kinds = {str: "string", int: "long", float: "double"}
    fields = [{"name": name.replace(":", "_"), "type": ["null", kinds[type(RECORDS[0][name])]]} for name in HEADER]
    records = [{name.replace(":", "_"): value for name, value in record.items()} for record in RECORDS]
    with path.open("wb") as file:
        fastavro.writer(file, {"type": "record", "name": "event", "fields": fields}, records, codec="deflate")


def example_of(record):
    """A record -> a serialized tf.train.Example."""
    kinds = {str: "bytes_list", int: "int64_list", float: "float_list"}
    features = {}
    for name, value in record.items():
        text = value.encode() if isinstance(value, str) else value
        features[name] = tf.train.Feature(**{kinds[type(value)]: {"value": [text]}})
    return tf.train.Example(features={"feature": features}).SerializeToString()


def write_tfrecord(path):
    compression = "GZIP" if path.suffix == ".gz" else ""
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for record in map(example_of, RECORDS):
            writer.write(record)


def write_compressed(path):
    with pa.output_stream(str(path), compression={".zst": "zstd", ".bz2": "bz2"}[path.suffix]) as file:
        file.write(delimited(",").encode())


def write_gzip(path):
    path.write_bytes(gzip.compress(delimited(",").encode()))


@pytest.mark.parametrize(
    ("file_format", "name", "write"),
    [
        ("csv", "log.csv", lambda path: path.write_text(delimited(","), encoding="utf-8")),
        ("tsv", "log.tsv", lambda path: path.write_text(delimited("\t"), encoding="utf-8")),
        ("jsonl", "log.jsonl", write_jsonl),
        ("parquet", "log.parquet", write_parquet),
        ("csv", "log.csv.gz", write_gzip),
        ("csv", "log.csv.zst", write_compressed),
        ("csv", "log.csv.bz2", write_compressed),
        ("avro", "log.avro", write_avro),
        ("tfrecord", "log.tfrecord", write_tfrecord),
        ("tfrecord", "log.tfrecord.gz", write_tfrecord),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_every_format_gives_the_same_rows(tmp_path, spec, file_format, name, write):
    write(tmp_path / name)
    renamed = COLUMNS[1].model_copy(update={"source_name": "item_id_token"})
    columns = (COLUMNS[0], renamed, *COLUMNS[2:]) if file_format == "avro" else COLUMNS
    assert parsed(tmp_path, table_of(name, file_format, columns), spec).to_pylist() == [
        {"user_id": "u1", "item_id": "i1", "time": T0, "clicked": 1, "seconds": 2.5, "weight": 1.0},
        {"user_id": "Jürg", "item_id": "i2", "time": T0 + 9, "clicked": 0, "seconds": 3.0, "weight": 0.25},
    ]


def test_windows_line_ends_and_byte_order_mark_change_nothing(tmp_path, spec):
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbf" + delimited(",").replace("\n", "\r\n").encode())
    table = parsed(tmp_path, table_of("log.csv"), spec)
    assert table.column("user_id").to_pylist() == ["u1", "Jürg"]
    assert table.column("weight").to_pylist() == [1.0, 0.25]


def test_last_line_without_line_end_is_read(tmp_path):
    (tmp_path / "log.csv").write_text(delimited(",").rstrip("\n"), encoding="utf-8")
    table, bad = read_all(tmp_path, table_of("log.csv"))
    assert (numbers(table), bad) == ([2, 3], [])


def test_csv_reads_quotes_and_tsv_keeps_them(tmp_path):
    columns = (Column(name="title", type="string"), Column(name="year", type="int64"))
    (tmp_path / "a.csv").write_text('title,year\n"Rome, ""Open"" City",1945\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('title\tyear\n"Rome\t1945\n', encoding="utf-8")
    csv, _ = read_all(tmp_path, table_of("a.csv", "csv", columns))
    tsv, _ = read_all(tmp_path, table_of("a.tsv", "tsv", columns))
    assert csv.column("title").to_pylist() == [b'Rome, "Open" City']
    assert tsv.column("title").to_pylist() == [b'"Rome']


def test_rows_count_once_when_a_quoted_value_holds_a_line_break(tmp_path):
    columns = (Column(name="title", type="string"), Column(name="year", type="int64"))
    # Rows: 1 header, 2 with a line break, 3, and 4 with three values.
    (tmp_path / "a.csv").write_text('title,year\n"two\nlines",1945\nb,1\nc,2,3\n', encoding="utf-8")
    table, bad = read_all(tmp_path, table_of("a.csv", "csv", columns))
    assert table.column("title").to_pylist() == [b"two\nlines", b"b"]
    assert numbers(table) == [2, 3]
    assert [row.row for row in bad] == [4]


def test_quoted_line_breaks_are_read_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)
    columns = (Column(name="title", type="string"), Column(name="year", type="int64"))
    (tmp_path / "a.csv").write_text("title,year\n" + '"two\nlines",1945\n' * 40, encoding="utf-8")
    table, bad = read_all(tmp_path, table_of("a.csv", "csv", columns))
    assert table.column("title").to_pylist() == [b"two\nlines"] * 40
    assert bad == []


def test_empty_values_are_null_in_every_text_format(tmp_path):
    columns = (Column(name="a", type="string"), Column(name="b", type="float"))
    (tmp_path / "x.csv").write_text("a,b\n,1\nNA,\n", encoding="utf-8")
    (tmp_path / "x.jsonl").write_text('{"b": 1}\n{"a": "NA", "b": null}\n', encoding="utf-8")
    csv, _ = read_all(tmp_path, table_of("x.csv", "csv", columns))
    jsonl, _ = read_all(tmp_path, table_of("x.jsonl", "jsonl", columns))
    assert csv.column("a").to_pylist() == [None, b"NA"]  # NA is a value, not a missing one.
    assert jsonl.column("a").to_pylist() == [None, "NA"]
    assert csv.column("b").to_pylist() == [b"1", None]
    assert jsonl.column("b").to_pylist() == ["1", None]


def test_json_lists_and_booleans_become_text(tmp_path):
    columns = tuple(Column(name=name, type="string") for name in "abc")
    (tmp_path / "x.jsonl").write_text('{"a": ["x", "y"], "b": true, "c": []}\n', encoding="utf-8")
    table, _ = read_all(tmp_path, table_of("x.jsonl", "jsonl", columns))
    assert table.drop_columns([ROW_ID]).to_pylist() == [{"a": "x|y", "b": "true", "c": ""}]


def test_json_text_that_is_no_unicode_does_not_end_the_job(tmp_path):
    columns = (Column(name="a", type="string"),)
    # A lone surrogate: valid JSON, but not a character.
    (tmp_path / "x.jsonl").write_text('{"a": "\\ud800"}\n{"a": "z"}\n', encoding="utf-8")
    table, _ = read_all(tmp_path, table_of("x.jsonl", "jsonl", columns))
    assert table.column("a").to_pylist()[-1] == "z"


# --- Files -----------------------------------------------------------------------------------------------------------


def test_glob_pattern_reads_all_files_in_order_with_unique_row_ids(tmp_path):
    for name, user in (("log-2.csv", b"b"), ("log-1.csv", b"a"), ("other.csv", b"c")):
        write_csv(tmp_path / name, [user + b",i,1,1,1,1,x"] * 2)
    table, _ = read_all(tmp_path, table_of("log-*.csv"))
    assert table.column("user_id").to_pylist() == [b"a", b"a", b"b", b"b"]
    row_ids = table.column(ROW_ID).to_pylist()
    assert row_ids == [2, 3, (1 << 40) + 2, (1 << 40) + 3]
    assert numbers(table) == [2, 3, 2, 3]


def test_files_of_one_name_in_folders_by_date_are_told_apart(tmp_path):
    for day in ("2024-01-01", "2024-01-02"):
        (tmp_path / f"date={day}").mkdir()
        write_csv(tmp_path / f"date={day}" / "part-0.csv", [])
    found = list_files(table_of("date=*/*.csv"), "log", str(tmp_path))
    assert [file.name for file in found] == ["date=2024-01-01/part-0.csv", "date=2024-01-02/part-0.csv"]


def test_a_file_without_its_header_is_refused_without_showing_its_first_row(tmp_path):
    (tmp_path / "x.csv").write_text("alice@example.com,i1,17\nbob@example.com,i2,18\n")
    with pytest.raises(ValueError, match=r"x.csv has none of the columns .* Is the header line missing\?") as caught:
        list_files(table_of("x.csv"), "log", str(tmp_path))
    assert "alice" not in str(caught.value)


def test_no_matching_file_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        list_files(table_of("nothing-*.csv"), "item", str(tmp_path))
    message = str(caught.value)
    assert "tables.item.path must match at least one file" in message
    assert f"Received: {tmp_path}/nothing-*.csv" in message
    assert "relative to --input_dir and may be a glob pattern" in message


@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_missing_column_error_names_the_columns_received_and_the_missing_ones(tmp_path, file_format):
    name = f"log.{file_format}"
    if file_format == "csv":
        write_csv(tmp_path / name, [b"u,1"], header=["user_id", "time"])
    else:
        pa.parquet.write_table(pa.table({"user_id": ["u"], "time": [1]}), tmp_path / name)
    with pytest.raises(ValueError, match=r"lacks columns that tables\.log declares") as caught:
        list_files(table_of(name, file_format), "log", str(tmp_path))
    message = str(caught.value)
    assert name in message
    assert "Received: user_id, time." in message
    assert "Missing: item_id:token, clicked, seconds, weight." in message
    assert "source_name" in message


def test_missing_column_is_found_in_any_file_of_a_pattern(tmp_path):
    write_csv(tmp_path / "log-1.csv", [])
    write_csv(tmp_path / "log-2.csv", [], header=HEADER[1:])
    with pytest.raises(ValueError, match=r"log-2\.csv lacks columns"):
        list_files(table_of("log-*.csv"), "log", str(tmp_path))


def test_file_of_zero_bytes_is_an_error_that_says_so(tmp_path):
    (tmp_path / "log.csv").touch()
    with pytest.raises(ValueError, match=r"log\.csv is empty\. Received: a file of 0 rows\. Allowed: a header line"):
        list_files(table_of("log.csv"), "log", str(tmp_path))


def test_header_without_rows_gives_no_rows(tmp_path):
    write_csv(tmp_path / "log.csv", [])
    table = table_of("log.csv")
    [file] = list_files(table, "log", str(tmp_path))
    assert sum(batch.table.num_rows for batch in read_file(file, table)) == 0


# --- Bad rows and their lines ----------------------------------------------------------------------------------------


GOOD = b"u,i,1,1,1,1,x"


def test_lines_of_good_and_bad_rows_are_right_with_too_short_and_too_long_lines_between(tmp_path):
    # Lines: 1 header, 2 good, 3 too short, 4 good, 5 too long, 6 good.
    write_csv(tmp_path / "log.csv", [GOOD, b"u,i", GOOD, GOOD + b",y,z", GOOD])
    table, bad = read_all(tmp_path, table_of("log.csv"))
    assert numbers(table) == [2, 4, 6]
    assert [(row.role, row.file, row.row, row.reason, row.raw) for row in bad] == [
        ("log", "log.csv", 3, "2_columns_instead_of_7", "u,i"),
        ("log", "log.csv", 5, "9_columns_instead_of_7", "u,i,1,1,1,1,x,y,z"),
    ]


def test_empty_line_is_a_row_without_values_that_keeps_its_line(tmp_path, spec):
    good = b"u,i,%d,1,1,1,x" % T0
    write_csv(tmp_path / "log.csv", [good, b"", good])
    table = table_of("log.csv")
    [file] = list_files(table, "log", str(tmp_path))
    [batch] = read_file(file, table)
    rows, bad = parse_rows(batch, spec)
    assert numbers(rows) == [2, 4]
    assert [(row.row, row.reason) for row in bad] == [(3, "missing:user_id")]


def test_lines_are_right_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 256)  # About 15 rows to a block.
    # Each good row holds its own line number; every 7th line is too short, and lines 100 to 139 all are.
    lines, expected_bad = [], []
    for line in range(2, 402):
        if line % 7 == 0 or 100 <= line < 140:
            lines.append(b"short")
            expected_bad.append(line)
        else:
            lines.append(b"u,i,%d,1,1,1,x" % line)
    write_csv(tmp_path / "log.csv", lines)
    table, bad = read_all(tmp_path, table_of("log.csv"))
    assert numbers(table) == [int(text) for text in table.column("time").to_pylist()]
    assert sorted(row.row for row in bad) == expected_bad
    assert table.num_rows + len(bad) == 400


def test_bad_rows_at_the_end_of_a_file_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 256)
    # 100 short lines fill the last two blocks, which hold no good row.
    write_csv(tmp_path / "log.csv", [GOOD] * 30 + [b"short"] * 100)
    table, bad = read_all(tmp_path, table_of("log.csv"))
    assert table.num_rows == 30
    assert [row.row for row in bad] == list(range(32, 132))


def test_file_of_bad_rows_only_reports_each(tmp_path):
    write_csv(tmp_path / "log.csv", [b"short"] * 3)
    table = table_of("log.csv")
    [file] = list_files(table, "log", str(tmp_path))
    batches = list(read_file(file, table))
    assert [row.row for batch in batches for row in batch.bad_rows] == [2, 3, 4]


def test_invalid_utf8_is_a_bad_row_with_its_line(tmp_path, spec):
    good = b"u,i,%d,1,1,1,x" % T0
    write_csv(tmp_path / "log.csv", [good, b"\xff\xfe,i,%d,1,1,1,x" % T0, good])
    table = table_of("log.csv")
    [file] = list_files(table, "log", str(tmp_path))
    [batch] = read_file(file, table)
    rows, bad = parse_rows(batch, spec)
    assert numbers(rows) == [2, 4]
    assert [(row.row, row.reason) for row in bad] == [(3, "invalid_utf8:user_id")]


def test_jsonl_lines_that_are_no_object_are_bad_rows_with_their_lines(tmp_path):
    columns = (Column(name="a", type="string"),)
    lines = [b'{"a": "x"}', b'{"a": ', b"[1]", b'{"a": "\xff"}', b"", b'{"a": "y"}']
    (tmp_path / "x.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    table, bad = read_all(tmp_path, table_of("x.jsonl", "jsonl", columns))
    assert numbers(table) == [1, 6]
    assert [(row.row, row.reason) for row in bad] == [(line, "not_a_json_object") for line in (2, 3, 4, 5)]
    assert bad[2].raw == '{"a": "\\xff"}'


def test_parquet_rows_are_numbered_from_zero_over_row_groups(tmp_path):
    pa.parquet.write_table(pa.table({"a": [str(row) for row in range(10)]}), tmp_path / "x.parquet", row_group_size=3)
    columns = (Column(name="a", type="string"),)
    table, _ = read_all(tmp_path, table_of("x.parquet", "parquet", columns))
    assert numbers(table) == [int(text) for text in table.column("a").to_pylist()] == list(range(10))


def test_file_larger_than_a_batch_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS_PER_BATCH", 4)
    (tmp_path / "x.jsonl").write_text("".join(f'{{"a": "{row}"}}\n' for row in range(1, 11)), encoding="utf-8")
    table = table_of("x.jsonl", "jsonl", (Column(name="a", type="string"),))
    [file] = list_files(table, "log", str(tmp_path))
    assert [batch.table.num_rows for batch in read_file(file, table)] == [4, 4, 2]
    assert numbers(read_all(tmp_path, table)[0]) == list(range(1, 11))


# --- TFDS ------------------------------------------------------------------------------------------------------------


def test_tfds_examples_become_text_with_ids_of_shard_and_position():
    columns = tuple(Column(name=name, type="string") for name in ("user", "rating", "genres", "gender"))
    examples = [
        {
            "tfds_id": b"films-train.tfrecord-00003-of-00010__17",
            "user": "Zoë".encode(),
            "rating": np.float32(4.0),
            "genres": np.array([4, 7]),
            "gender": np.bool_(True),
        }
    ]
    name = "films-train.tfrecord-00003-of-00010"
    [batch] = tfds_batches(table_of("films", "tfds", columns), examples, {name: 3})
    assert batch.file == SourceFile("log", 3, name)
    [row] = batch.table.to_pylist()
    row_id = row.pop(ROW_ID)
    assert row == {"user": "Zoë", "rating": "4", "genres": "4|7", "gender": "true"}
    assert row_id == (3 << 40) + 17  # The file's number above the low 40 bits, the position in them.


def test_tfds_examples_of_two_splits_have_different_row_ids():
    columns = (Column(name="user", type="string"),)
    files = [f"films-{split}.tfrecord-00000-of-00001" for split in ("test", "train")]
    examples = [{"tfds_id": f"{file}__0".encode(), "user": b"u"} for file in files]
    batches = tfds_batches(table_of("films", "tfds", columns), examples, {file: i for i, file in enumerate(files)})
    row_ids = [row_id for batch in batches for row_id in batch.table.column(ROW_ID).to_pylist()]
    assert row_ids[0] != row_ids[1]
