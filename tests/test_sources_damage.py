"""Damaged files: what stands before the damage is read, and what cannot be read is said, never raised."""

import gzip
import json
import zlib

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.tables import Column, Table
from pipelines.rows.checks import parse_rows
from pipelines.sources import ROW_ID, SourceFile, files, list_files, plan_file, read_slice, row_number

NUM_ROWS = 3000
T0 = 1_700_000_000
RANDOM = np.random.default_rng(0)
RECORDS = [
    {
        "user_id": f"u{RANDOM.integers(1 << 40)}",
        "item_id": f"i{row}",
        "time": T0 + row,
        "clicked": row % 2,
        "seconds": 2.5,
        "weight": 1.0,
    }
    for row in range(NUM_ROWS)
]


def csv_bytes(num_copies=1):
    rows = [",".join(map(str, record.values())) for record in RECORDS]
    lines = [
        ",".join(RECORDS[0]),
        *(f"{copy * RANDOM.integers(1 << 40)}{row}" for copy in range(num_copies) for row in rows),
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def jsonl_bytes():
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def compress(content, path, compression):
    with pa.output_stream(str(path), compression=compression) as file:
        file.write(content)


def write_avro(path):
    kinds = {str: "string", int: "long", float: "double"}
    fields = [{"name": name, "type": kinds[type(value)]} for name, value in RECORDS[0].items()]
    with path.open("wb") as file:
        schema = {"type": "record", "name": "event", "fields": fields}
        fastavro.writer(file, schema, RECORDS, codec="deflate", sync_interval=4000)


def example_of(record):
    kinds = {str: "bytes_list", int: "int64_list", float: "float_list"}
    features = {}
    for name, value in record.items():
        text = value.encode() if isinstance(value, str) else value
        features[name] = tf.train.Feature(**{kinds[type(value)]: {"value": [text]}})
    return tf.train.Example(features={"feature": features}).SerializeToString()


def write_tfrecord(path, records=None, options=""):
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for record in records or map(example_of, RECORDS):
            writer.write(record)


WRITERS = {
    "x.csv": lambda path: path.write_bytes(csv_bytes()),
    "x.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_bytes())),
    "x.csv.zst": lambda path: compress(csv_bytes(), path, "zstd"),
    "x.csv.bz2": lambda path: compress(csv_bytes(), path, "bz2"),
    "x.jsonl": lambda path: path.write_bytes(jsonl_bytes()),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl_bytes())),
    "x.parquet": lambda path: pa.parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=500),
    "x.avro": write_avro,
    "x.tfrecord": write_tfrecord,
    "x.tfrecord.gz": lambda path: write_tfrecord(path, options="GZIP"),
}
FIRST_ROWS = {"csv": 2, "jsonl": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Name -> the bytes of a sound file."""
    directory = tmp_path_factory.mktemp("whole")
    for name, write in WRITERS.items():
        write(directory / name)
    return {name: (directory / name).read_bytes() for name in WRITERS}


def table_of(spec, name):
    return spec.tables.log.model_copy(update={"path": name, "format": name.split(".")[1]})


def read(directory, table, slice_bytes=50_000):
    [file] = list_files(table, "log", str(directory))
    return [batch for part in plan_file(file, table, slice_bytes).slices for batch in read_slice(part, table)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_sound_file_is_read_to_its_end(tmp_path, shop_spec, whole, name):
    (tmp_path / name).write_bytes(whole[name])
    batches = read(tmp_path, table_of(shop_spec, name))
    assert [batch.unreadable for batch in batches if batch.unreadable] == []
    assert sum(batch.table.num_rows for batch in batches) == NUM_ROWS


@pytest.mark.parametrize(
    "name", ["x.csv.gz", "x.csv.zst", "x.csv.bz2", "x.jsonl.gz", "x.avro", "x.tfrecord", "x.tfrecord.gz"]
)
def test_rows_before_the_cut_of_a_truncated_file_are_read_and_the_rest_is_unreadable(
    tmp_path, shop_spec, whole, name, monkeypatch
):
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)
    content = whole[name]
    if name in ("x.csv.bz2", "x.csv.zst"):  # These compress blocks larger than the file of the other tests.
        compress(csv_bytes(20), tmp_path / name, name[-3:].replace("zst", "zstd").replace(".", ""))
        content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    batches = read(tmp_path, table_of(shop_spec, name))
    rows = [row_number(row_id) for batch in batches for row_id in batch.table.column(ROW_ID).to_pylist()]
    first = FIRST_ROWS.get(name.split(".")[1], 0)
    assert rows == list(range(first, first + len(rows)))
    assert NUM_ROWS // 4 < len(rows) < (20 if name in ("x.csv.bz2", "x.csv.zst") else 1) * NUM_ROWS
    assert [batch.unreadable is not None for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert batches[-1].unreadable.endswith(f"after row {first + len(rows) - 1}")


def test_a_gzip_file_that_was_cut_exactly_between_two_examples_is_not_taken_for_a_whole_one(tmp_path, shop_spec):
    write_tfrecord(tmp_path / "half.tfrecord", [example_of(record) for record in RECORDS[:100]])
    half = (tmp_path / "half.tfrecord").read_bytes()
    stream = zlib.compressobj(wbits=31)  # gzip
    (tmp_path / "x.tfrecord.gz").write_bytes(stream.compress(half) + stream.flush(zlib.Z_FULL_FLUSH))
    batches = read(tmp_path, table_of(shop_spec, "x.tfrecord.gz"))
    assert sum(batch.table.num_rows for batch in batches) == 100
    assert batches[-1].unreadable.endswith("after row 99")


def test_damage_in_one_row_group_leaves_the_other_slices_readable(tmp_path, shop_spec, whole):
    content = bytearray(whole["x.parquet"])
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    (tmp_path / "x.parquet").write_bytes(content)
    batches = read(tmp_path, table_of(shop_spec, "x.parquet"), 1)
    assert any(batch.unreadable for batch in batches)
    assert sum(batch.table.num_rows for batch in batches) >= NUM_ROWS - 1000


@pytest.mark.parametrize("name", ["x.csv.gz", "x.parquet", "x.avro"])
def test_a_file_whose_columns_cannot_be_read_is_refused_by_name(tmp_path, shop_spec, name):
    (tmp_path / name).write_bytes(b"nothing of that kind")
    with pytest.raises(ValueError, match=rf"{name} must be a readable"):
        list_files(table_of(shop_spec, name), "log", str(tmp_path))


@pytest.mark.parametrize("name", ["x.csv.gz", "x.parquet"])
def test_a_file_damaged_after_it_was_listed_is_refused_by_name(tmp_path, shop_spec, name):
    (tmp_path / name).write_bytes(b"nothing of that kind")
    with pytest.raises(ValueError, match=rf"{name} must be a readable"):
        plan_file(SourceFile("log", 0, str(tmp_path / name)), table_of(shop_spec, name))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(WRITERS)))
def test_any_damage_ends_with_rows_bad_rows_or_a_reason(tmp_path, shop_spec, whole, data, name):
    content = bytearray(whole[name])
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        junk = data.draw(st.sampled_from([b"\x00", b'"', b"\n", b"\xff\xfe", b"\r\n,,", b"9" * 30, bytes(50)]))
        content[start : start + data.draw(st.integers(0, 20))] = junk
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(1, len(content)))]
    (tmp_path / name).write_bytes(content)
    log = table_of(shop_spec, name)
    try:
        list_files(log, "log", str(tmp_path))
    except ValueError as error:
        batches, unnamed = [], name not in str(error)
    else:
        batches, unnamed = read(tmp_path, log), False
    assert not unnamed
    spec = shop_spec.model_copy(update={"tables": shop_spec.tables.model_copy(update={"log": log})})
    for batch in batches:
        good, bad = parse_rows(batch, spec)
        assert good.num_rows + len(bad) == batch.table.num_rows + len(batch.bad_rows)


# --- Records that are no rows ----------------------------------------------------------------------------------------


def test_records_of_another_type_and_malformed_ones_are_bad_rows(tmp_path, shop_spec):
    good = RECORDS[0]
    records = [
        example_of(good),
        b"\xff\xff no example",
        example_of({**good, "clicked": 1.0}),
        example_of({name: value for name, value in good.items() if name != "seconds"}),
        example_of(good),
    ]
    write_tfrecord(tmp_path / "x.tfrecord", records)
    [batch] = read(tmp_path, table_of(shop_spec, "x.tfrecord"))
    assert [row_number(row_id) for row_id in batch.table.column(ROW_ID).to_pylist()] == [0, 3, 4]
    assert [(row.row, row.reason) for row in batch.bad_rows] == [(1, "not_a_tf_example"), (2, "not_int64:clicked")]
    assert batch.table.column("seconds").to_pylist() == [2.5, None, 2.5]


def test_features_of_several_values_are_lists_and_moments_of_avro_integers(tmp_path):
    columns = (Column(name="tags", type="string"), Column(name="at", type="int64"))
    features = {
        "tags": tf.train.Feature(bytes_list={"value": [b"a", b"b"]}),
        "at": tf.train.Feature(int64_list={"value": [5]}),
    }
    write_tfrecord(tmp_path / "x.tfrecord", [tf.train.Example(features={"feature": features}).SerializeToString()])
    [batch] = read(tmp_path, Table(path="x.tfrecord", format="tfrecord", columns=columns))
    assert batch.table.column("tags").to_pylist() == [[b"a", b"b"]]
    moment = {"type": "long", "logicalType": "timestamp-millis"}
    fields = [{"name": "tags", "type": {"type": "array", "items": "string"}}, {"name": "at", "type": ["null", moment]}]
    with (tmp_path / "x.avro").open("wb") as file:
        rows = [{"tags": ["a", "b"], "at": 1_700_000_000_123}, {"tags": [], "at": None}]
        fastavro.writer(file, {"type": "record", "name": "event", "fields": fields}, rows)
    [batch] = read(tmp_path, Table(path="x.avro", format="avro", columns=columns))
    assert batch.table.column("tags").to_pylist() == ["a|b", ""]
    assert batch.table.column("at").to_pylist() == ["1700000000123", None]


@pytest.mark.parametrize(
    "values", [pa.array([{"x": 1}]), pa.array([[{"x": 1}]]), pa.array([[[1]]])], ids=["struct", "structs", "lists"]
)
def test_nested_columns_of_parquet_are_bad_rows(tmp_path, shop_content, values):
    shop_content["tables"]["item"] |= {"path": "x.parquet", "format": "parquet"}
    spec = parse_spec(shop_content, "shop")
    pa.parquet.write_table(pa.table({"item_id": ["i"], "tags": values, "price": [1.0]}), tmp_path / "x.parquet")
    [file] = list_files(spec.tables.item, "item", str(tmp_path))
    [batch] = [
        batch for part in plan_file(file, spec.tables.item).slices for batch in read_slice(part, spec.tables.item)
    ]
    good, bad = parse_rows(batch, spec)
    assert (good.num_rows, [row.reason for row in bad]) == (0, ["not_string:tags"])
