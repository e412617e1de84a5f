"""Bulk scoring with real Beam runs: the servable's scores in the order of the input, and every row accounted for."""

import json
import subprocess

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet
import pytest
import tensorflow as tf
from commands import run_command
from feed_servables import save_feed_model

from clsd_tf.data.columns import value_to_text
from clsd_tf.serving.servable import LocalServable
from clsd_tf.storage.files import read_json
from pipelines.beam.bulk_scoring import score_files
from pipelines.rows.outcome import BadInputError
from pipelines.sources import files as source_files

IN_MEMORY = ("--direct_num_workers=1", "--direct_running_mode=in_memory")
ADDED = {"ctr", "servable_version"}


@pytest.fixture(scope="module")
def servable(tmp_path_factory):
    return LocalServable(save_feed_model(tmp_path_factory.mktemp("servables"), 7, 0.01))


def rows(count, start=0):
    """Rows with a note that tells them apart, and missing values of every kind."""
    return [
        {
            "note": f"row {k}",
            "user": ["u1", None, "u333"][k % 3],
            "age": None if k % 5 == 0 else 20 + k % 50,
            "price": None if k % 7 == 0 else 0.5 * k,
            "recent": [["a", "b"], [], ["c"]][k % 3],
        }
        for k in range(start, start + count)
    ]


SCHEMA = pa.schema(
    [
        ("note", pa.string()),
        ("user", pa.string()),
        ("age", pa.int64()),
        ("price", pa.float32()),
        ("recent", pa.list_(pa.string())),
    ]
)
AVRO = {
    "type": "record",
    "name": "row",
    "fields": [
        {"name": "user", "type": ["null", "string"]},
        {"name": "age", "type": ["null", "long"]},
        {"name": "price", "type": ["null", "double"]},
        {"name": "recent", "type": {"type": "array", "items": "string"}},
        {"name": "note", "type": "string"},
    ],
}


def write(path, records):
    """Writes records by the name's ending."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(records, SCHEMA), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "avro":
        with path.open("wb") as file:
            fastavro.writer(file, AVRO, records)
    elif kind == "tfrecord":
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(example(record).SerializeToString())
    else:
        delimiter = "\t" if kind == "tsv" else ","
        lines = [
            [value_to_text(value) or "" for value in record.values()]
            for record in [dict(zip(SCHEMA.names, SCHEMA.names, strict=True)), *records]
        ]
        path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    return path


def example(record):
    message = tf.train.Example()
    for name, value in record.items():
        feature = message.features.feature[name]
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if name == "age":
            feature.int64_list.value.extend(values)
        elif name == "price":
            feature.float_list.value.extend(values)
        else:
            feature.bytes_list.value.extend(entry.encode() for entry in values)
    return message


def scored(output):
    """All scored rows, files in the order of their names."""
    return pa.concat_tables(pa.parquet.read_table(path) for path in sorted((output / "scores").iterdir()))


def expected(servable, records):
    return servable.score(pa.Table.from_pylist(records, SCHEMA))


# --- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet", "avro", "tfrecord"])
def test_every_format_gets_the_scores_of_the_servable_in_the_order_of_the_rows(servable, tmp_path, ending):
    records = rows(300)
    source = write(tmp_path / f"rows.{ending.removesuffix('.gz')}", records)
    if ending.endswith(".gz"):
        subprocess.run(["gzip", str(source)], check=True)
        source = source.with_suffix(".jsonl.gz")
    manifest = score_files(servable.path, str(source), tmp_path / "out", beam_arguments=IN_MEMORY)
    found = scored(tmp_path / "out")
    np.testing.assert_allclose(found["ctr"], expected(servable, records), atol=1e-6)
    assert found["note"].to_pylist() == [record["note"] for record in records]
    assert found["age"].to_pylist() == [record["age"] for record in records]
    assert [recent or [] for recent in found["recent"].to_pylist()] == [record["recent"] for record in records]
    assert found["servable_version"].unique().to_pylist() == [7]
    assert manifest["rows"] == {"read": 300, "scored": 300, "bad": 0}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "scores"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with three files of JSON lines, 1,200 rows each."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(3):
        write(folder / f"part-{index}.jsonl", rows(1200, start=1200 * index))
    return folder


@pytest.mark.parametrize("beam_arguments", [IN_MEMORY, ()], ids=["in memory", "threads"])
def test_the_order_holds_within_and_between_files(servable, many, tmp_path, monkeypatch, beam_arguments):
    monkeypatch.setattr(source_files, "BLOCK_BYTES", 10_000)  # Some hundred rows.
    manifest = score_files(
        servable.path.parent, f"{many}/part-*.jsonl", tmp_path / "out", beam_arguments=beam_arguments
    )
    found = scored(tmp_path / "out")
    assert found["note"].to_pylist() == [f"row {k}" for k in range(3600)]
    np.testing.assert_allclose(found["ctr"], expected(servable, rows(3600)), rtol=1e-6, atol=1e-6)
    assert pa.dataset.dataset(tmp_path / "out" / "scores").count_rows() == 3600
    assert len(list((tmp_path / "out" / "scores").iterdir())) > 20
    assert [entry["file"] for entry in manifest["inputs"]] == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]


def test_the_command_tells_how_many_rows_it_scored(servable, tmp_path):
    write(tmp_path / "rows.csv", rows(30))
    files = (f"--input={tmp_path}/rows.csv", f"--output={tmp_path / 'out'}")
    done = run_command("pipelines.predict", f"--servable={servable.path.parent}", *files, *IN_MEMORY)
    assert done.returncode == 0, done.stderr
    assert "30 rows read = 30 scored + 0 bad; scores in" in done.stdout
    np.testing.assert_allclose(scored(tmp_path / "out")["ctr"], expected(servable, rows(30)), atol=1e-6)


def test_a_text_file_of_another_delimiter_is_read(servable, tmp_path):
    (tmp_path / "rows.txt").write_text("user;age;price;recent\nu1;30;1;a|b\n")
    score_files(servable.path, str(tmp_path / "rows.txt"), tmp_path / "out", beam_arguments=IN_MEMORY)
    np.testing.assert_allclose(scored(tmp_path / "out")["ctr"], [0.35], rtol=1e-6)  # 30 + 1 + 2 letters + 2 recent.


def test_the_manifest_says_what_was_scored_by_what(servable, tmp_path):
    source = write(tmp_path / "rows.csv", rows(10))
    other = LocalServable(save_feed_model(tmp_path / "other", 7, 0.02))
    same = LocalServable(save_feed_model(tmp_path / "same", 8, 0.01))
    (same.path / "assets.extra").mkdir()
    (same.path / "assets.extra" / "note.txt").write_text("decides no score")
    manifest = score_files(servable.path, str(source), tmp_path / "out", beam_arguments=IN_MEMORY)
    assert manifest == read_json(tmp_path / "out" / "manifest.json")
    assert manifest["servable"] == {"model_name": "feed", "version": 7, "fingerprint": servable.fingerprint()}
    assert len({found.fingerprint() for found in (servable, other)}) == 2
    assert manifest["inputs"][0]["bytes"] == source.stat().st_size


def test_columns_of_parquet_that_the_model_does_not_read_stay_as_they_are(servable, tmp_path):
    table = pa.Table.from_pylist(rows(4), SCHEMA).append_column("2nd blob", pa.array([b"\xff", None, b"", b"x"]))
    table = table.append_column("nested", pa.array([{"a": 1}, None, {"a": 2}, {"a": 3}]))
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    score_files(servable.path, str(tmp_path / "rows.parquet"), tmp_path / "out", beam_arguments=IN_MEMORY)
    assert scored(tmp_path / "out").select(["2nd blob", "nested"]) == table.select(["2nd blob", "nested"])


# --- Bad rows --------------------------------------------------------------------------------------------------------

BAD = """note,user,age,price,recent
fine,u1,30,1.5,a|b
wrong age,u1,secret,1.5,
"fine, with
three
lines",u1,32,,
short,u1
fine,u1,31,,
wrong price,u1,30,1e99,
wrong user,"two
lines",30,1,
fine,u2,,2,
"stray,u1,33,,
fine,u1,34,,
"swallowed them,u1,35,,
"""


def test_rows_that_cannot_be_scored_are_named_and_counted(servable, tmp_path):
    (tmp_path / "rows.csv").write_text(BAD)
    manifest = score_files(
        servable.path, str(tmp_path / "rows.csv"), tmp_path / "out", max_bad_fraction=0.7, beam_arguments=IN_MEMORY
    )
    found = scored(tmp_path / "out")
    assert found["note"].to_pylist() == ["fine", "fine, with\nthree\nlines", "fine", "fine"]
    np.testing.assert_allclose(found["ctr"], [0.355, 0.34, 0.33, 0.04], rtol=1e-6)
    dead = pa.parquet.read_table(tmp_path / "out" / "dead_letter.parquet")
    assert dead.to_pylist() == [
        {"file": "rows.csv", "row": 3, "reason": "not_int64:age", "lines": 1},
        {"file": "rows.csv", "row": 5, "reason": "2_columns_instead_of_5", "lines": 1},
        {"file": "rows.csv", "row": 7, "reason": "not_float:price", "lines": 1},
        {"file": "rows.csv", "row": 8, "reason": "line_break:user", "lines": 2},
        {"file": "rows.csv", "row": 10, "reason": "line_break:note", "lines": 3},
    ]
    assert manifest["rows"] == {"read": 12, "scored": 4, "bad": 8}
    assert manifest["bad_rows"]["line_break:note"] == 3
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()


def test_too_many_bad_rows_leave_the_dead_letter_and_nothing_else(servable, tmp_path):
    (tmp_path / "rows.csv").write_text(BAD)
    with pytest.raises(BadInputError, match=r"Received: 8 of 12 \(.*1 not_int64:age.*The bad rows are in") as caught:
        score_files(servable.path, str(tmp_path / "rows.csv"), tmp_path / "out", beam_arguments=IN_MEMORY)
    assert "secret" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.dead_letter.parquet", "rows.csv"]
    assert pa.parquet.read_table(tmp_path / "out.dead_letter.parquet").num_rows == 5


@pytest.mark.parametrize("ending", ["jsonl", "tfrecord", "parquet"])
def test_values_of_another_type_are_bad_rows_in_typed_formats(servable, tmp_path, ending):
    records = rows(20)
    records[4]["note"] = "\n" * 20  # One row all the same.
    if ending == "jsonl":
        records[4]["age"] = "secret"
        write(tmp_path / "rows.jsonl", records)
    elif ending == "tfrecord":
        with tf.io.TFRecordWriter(str(tmp_path / "rows.tfrecord")) as writer:
            for record in records[:4]:
                writer.write(example(record).SerializeToString())
            wrong = example({**records[4], "age": None})
            wrong.features.feature["age"].bytes_list.value.append(b"secret")
            for message in (wrong, *map(example, records[5:])):
                writer.write(message.SerializeToString())
    else:
        table = pa.Table.from_pylist(records, SCHEMA)
        recent = [[entry.encode() for entry in record["recent"]] for record in records]
        recent[4] = [b"fine", b"caf\xe9"]
        table = table.set_column(4, "recent", pa.array(recent, pa.list_(pa.binary())))
        pa.parquet.write_table(table, tmp_path / "rows.parquet")
    manifest = score_files(
        servable.path, str(tmp_path / f"rows.{ending}"), tmp_path / "out", max_bad_fraction=0.1,
        beam_arguments=IN_MEMORY,
    )  # fmt: skip
    reason = "invalid_utf8:recent" if ending == "parquet" else "not_int64:age"
    assert manifest["bad_rows"] == {reason: 1}
    assert manifest["rows"] == {"read": 20, "scored": 19, "bad": 1}
    good = [record for k, record in enumerate(rows(20)) if k != 4]
    np.testing.assert_allclose(scored(tmp_path / "out")["ctr"], expected(servable, good), atol=1e-6)


def test_features_that_the_model_does_not_read_may_change_their_type(servable, tmp_path):
    messages = [example({**record, "note": None}) for record in rows(1006)]
    for k, message in enumerate(messages[:1003]):  # As integers in what is looked at first.
        message.features.feature["note"].int64_list.value.append(k)
    messages[1003].features.feature["note"].bytes_list.value.append(b"a text")
    messages[1004].features.feature["note"].float_list.value.extend([0.5, 2.0])
    with tf.io.TFRecordWriter(str(tmp_path / "rows.tfrecord")) as writer:
        for message in messages:
            writer.write(message.SerializeToString())
    source = str(tmp_path / "rows.tfrecord")
    manifest = score_files(servable.path, source, tmp_path / "out", beam_arguments=IN_MEMORY)
    assert manifest["rows"] == {"read": 1006, "scored": 1006, "bad": 0}
    found = scored(tmp_path / "out")
    np.testing.assert_allclose(found["ctr"], expected(servable, rows(1006)), atol=1e-6)
    assert found["note"].to_pylist() == [*map(str, range(1003)), "a text", "0.5|2", None]


# --- What is refused -------------------------------------------------------------------------------------------------


def refused(servable, tmp_path, pattern, error=ValueError, **options):
    """The message of a run that must fail, after a check that it left nothing that looks finished."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        score_files(
            servable.path, str(tmp_path / pattern), tmp_path / "out", **{"beam_arguments": IN_MEMORY, **options}
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.tsv"])
def test_a_file_without_rows_is_refused(servable, tmp_path, name):
    write(tmp_path / name, [])
    assert "--input must have rows. Received: 0 rows" in refused(servable, tmp_path, name, BadInputError)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.tfrecord", "rows.parquet"])
def test_an_empty_file_is_refused_by_name(servable, tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert name in refused(servable, tmp_path, name)


def test_a_damaged_file_is_refused_by_name(servable, tmp_path):
    path = write(tmp_path / "rows.tfrecord", rows(1200))  # Damaged behind what is looked at first.
    path.write_bytes(path.read_bytes()[:-7])
    assert "readable to its end. Received: rows.tfrecord" in refused(servable, tmp_path, path.name, BadInputError)


def test_columns_that_do_not_fit_are_refused_before_anything_is_read(servable, tmp_path):
    write(tmp_path / "rows.csv", rows(3))
    lines = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(lines.replace("age", "years", 1))
    assert "Missing: age. A column of empty values" in refused(servable, tmp_path, "rows.csv")
    (tmp_path / "rows.csv").write_text(lines.replace("note", "ctr", 1))
    assert "Rename 'ctr'" in refused(servable, tmp_path, "rows.csv")
    (tmp_path / "rows.csv").write_text(lines.replace("note", "age", 1))
    assert "each column once. Received: 'age' 2 times" in refused(servable, tmp_path, "rows.csv")
    (tmp_path / "rows.csv").write_text(lines)
    (tmp_path / "rows_2.csv").write_text(lines.replace("note", "other", 1))
    assert "Received: rows_2.csv with other, user" in refused(servable, tmp_path, "rows*.csv")


def test_what_cannot_begin_is_refused(servable, tmp_path):
    assert "Received: " in refused(servable, tmp_path, "none-*.csv", FileNotFoundError)
    write(tmp_path / "rows.csv", rows(3))
    assert "unknown flags. Received: --wokers=3" in refused(
        servable, tmp_path, "rows.csv", beam_arguments=("--wokers=3",)
    )
    (tmp_path / "out").mkdir()
    assert "must not exist yet" in refused(servable, tmp_path, "rows.csv", FileExistsError)
    with pytest.raises(FileNotFoundError, match="a servable is a directory with"):
        score_files(tmp_path, str(tmp_path / "rows.csv"), tmp_path / "new")
