"""A spec inferred from files that nobody prepared loads, builds, and says what it rests on."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import run_command

from clsd_tf.spec.feature_spec import load_spec
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.spec_inference.infer import Choices, infer_spec
from pipelines.spec_inference.profiles import profile_table, spec_name
from pipelines.spec_inference.to_yaml import to_yaml


def infer(directory, paths, **choices):
    tables = {role: profile_table(role, path, str(directory), 100_000) for role, path in paths.items()}
    return infer_spec(tables.pop("log"), tables, Choices(**choices))


def spec_of(directory, inferred):
    (directory / "spec.yaml").write_text(to_yaml(inferred, "feed", 100_000), encoding="utf-8")
    return load_spec(directory / "spec.yaml")


def write_messy_log(path, delimiter=";"):
    """3,000 rides: semicolons, gzip, odd names, missing values, ids of two kinds, a leak without a telling name."""
    random = np.random.default_rng(5)
    clicks = random.random(3000) < 0.3
    lines = [
        ["Visitor ID", "article-id", "Unix Time", "clicked", "position", "1st colour", "prix", "topics", "zz", "memo"]
    ]
    for row in range(3000):
        lines.append(
            [
                f"{random.integers(200):05d}",  # With leading zeros: a name, not a number.
                f"a{random.integers(100)}",
                1_700_000_000 + 60 * row,
                int(clicks[row]),
                random.integers(1, 9),
                random.choice(["rouge", "bleu", "", "vert"]),
                round(float(random.lognormal(1, 2)), 3),
                "|".join(random.choice(["a", "b", "c", "d"], random.integers(1, 4), replace=False)),
                round(float(random.random() * clicks[row]), 3),  # Not zero after a click alone.
                f'"words; number {row}"',
            ]
        )
    text = "".join(delimiter.join(map(str, line)) + "\r\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()))


def test_spec_of_the_simulated_feed_finds_what_its_own_spec_declares(feed_dir, tmp_path):
    inferred = infer(feed_dir, {"log": "log.csv", "user": "users.csv", "item": "items.csv"})
    spec = spec_of(tmp_path, inferred)
    assert (spec.user_key, spec.item_key, spec.label) == ("user_id", "item_id", "click == 1")
    assert (spec.event_time.column, spec.event_time.unit) == ("time_ms", "milliseconds")
    assert spec.intensity_value == "read_seconds"
    assert [(table.path, table.key) for _, table in spec.tables.items()] == [
        ("log.csv", None),
        ("users.csv", "user_id"),
        ("items.csv", "item_id"),
    ]
    kinds = {feature.name: feature.type for feature in spec.features}
    assert kinds == {
        "user_id": "categorical",
        "item_id": "categorical",
        "recent_item_id": "history",
        "device": "categorical",
        "age": "numeric",
        "gender": "categorical",
        "category": "categorical",
        "tags": "multi_valued",
        "duration_seconds": "numeric",
    }
    assert spec.feature("tags").separator == "|"
    assert spec.feature("duration_seconds").log1p  # Log-normal: a long tail.
    assert [group.column for group in spec.user_groups] == ["age", "gender"]
    assert "liked" not in spec.column_types
    counts = build_dataset(spec, BuildConfig(input_dir=str(feed_dir)), tmp_path / "dataset")
    assert sum(entry["rows"] for entry in counts["splits"].values()) == 4000


def test_a_messy_compressed_file_becomes_a_spec_that_builds(tmp_path):
    write_messy_log(tmp_path / "rides.txt.gz")
    inferred = infer(tmp_path, {"log": "rides.txt.gz"})
    spec = spec_of(tmp_path, inferred)
    log = spec.tables.log
    assert (log.format, log.delimiter) == ("csv", ";")
    assert (spec.user_key, spec.item_key, spec.label) == ("Visitor_ID", "article_id", "clicked == 1")
    assert (spec.event_time.column, spec.event_time.unit) == ("Unix_Time", "seconds")
    assert log.column("Visitor_ID").type == "string"
    assert log.column("column_1st_colour").source_name == "1st colour"
    kinds = {feature.name: feature.type for feature in spec.features}
    assert kinds["position"] == kinds["column_1st_colour"] == "categorical"
    assert kinds["prix"] == "numeric"
    assert kinds["topics"] == "multi_valued"
    reasons = {entry.column: entry.reason for entry in inferred.left_out}
    assert sorted(reasons) == ["memo", "zz"]
    assert "AUC of 1.00" in reasons["zz"]
    assert "nearly every value is another" in reasons["memo"]
    counts = build_dataset(spec, BuildConfig(input_dir=str(tmp_path)), tmp_path / "dataset")
    assert sum(entry["rows"] for entry in counts["splits"].values()) == 3000


def test_every_guess_has_a_comment_and_what_is_left_out_its_reason(feed_dir):
    text = to_yaml(infer(feed_dir, {"log": "log.csv", "item": "items.csv"}), "feed", 100_000)
    lines = text.split("\n")
    assert all("#" in line for line in lines if line.lstrip().startswith("- {"))
    [line] = [line for line in lines if "name: liked" in line]
    assert line.lstrip().startswith("# - {")
    assert "known only after the event" in line
    [line] = [line for line in lines if line.startswith("label:")]
    assert "of the rows are 1" in line
    [line] = [line for line in lines if line.startswith("event_time:")]
    assert "4,000 distinct in 4,000 rows, 0.0% missing, from 1700000000000 to" in line


def test_parquet_with_timestamps_and_lists_of_two_files(tmp_path):
    for part in range(2):
        moments = pa.array(np.arange(500) * 1_000_000 + (1_650_000_000 + part * 1000) * 1_000_000, pa.timestamp("us"))
        rows = pa.table(
            {
                "uid": [f"u{row % 40}" for row in range(500)],
                "sku": [f"s{row % 30}" for row in range(500)],
                "ts": moments,
                "label": [row % 3 == 0 for row in range(500)],
                "tags": [["x", "y"][: 1 + row % 2] for row in range(500)],
                "is_click": pa.array([int(row % 3 == 0) for row in range(500)], pa.int8()),
            }
        )
        (tmp_path / f"date={part}").mkdir()
        pa.parquet.write_table(rows, tmp_path / f"date={part}" / "p.parquet")
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "date=*/*.parquet"}))
    assert spec.tables.log.format == "parquet"
    assert (spec.user_key, spec.item_key, spec.event_time.unit) == ("uid", "sku", "microseconds")
    assert spec.label == "is_click == 1"
    assert spec.feature("tags").separator == "|"


def write_lines(path, header, rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [header, *rows]), encoding="utf-8")


def test_a_rating_without_clicks_becomes_the_label_at_its_upper_part(tmp_path):
    # A fifth of the rows has each rating: 3 and more is the largest upper part of at most 60 %.
    write_lines(
        tmp_path / "r.csv",
        ["user", "movie", "timestamp", "rating"],
        [(i % 9, i % 7, 10**9 + i, 1 + i % 5) for i in range(100)],
    )
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "r.csv"}))
    assert spec.label == "rating >= 3"
    assert (spec.user_key, spec.item_key) == ("user", "movie")


def test_key_of_another_name_and_type_is_joined_and_repeated_names_are_renamed(tmp_path):
    header = ["user_id", "item_id", "time", "click", "score"]
    write_lines(tmp_path / "log.csv", header, [(i % 5, f"i{i % 3}", 10**9 + i, i % 2, i % 4) for i in range(60)])
    write_lines(
        tmp_path / "u.csv",
        ["uid", "city", "score"],
        [(user, "Rome" if user else "Oslo", user % 3) for user in range(5)],
    )
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.csv", "user": "u.csv"}))
    assert spec.tables.user.column("user_id").source_name == "uid"
    assert spec.tables.user.column("user_score").source_name == "score"
    assert spec.tables.log.column("user_id").type == spec.tables.user.column("user_id").type == "int64"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (["who", "item_id", "time", "click"], r"no column of the log looks like the id of the user.*--user_key="),
        (["user_id", "what", "time", "click"], r"no column of the log looks like the id of the item.*--item_key="),
        (["user_id", "item_id", "n", "click"], r"no column of the log looks like the time.*--event_time="),
        (["user_id", "item_id", "time", "n"], r"no column of the log looks like the label.*--label="),
    ],
)
def test_what_cannot_be_guessed_is_an_error_that_names_the_flag(tmp_path, header, expected):
    write_lines(tmp_path / "log.csv", header, [(i % 5, f"i{i % 3}", 10**9 + i, 2 * i) for i in range(60)])
    with pytest.raises(ValueError, match=expected) as caught:
        infer(tmp_path, {"log": "log.csv"})
    assert ", ".join(header) in str(caught.value)


def test_two_values_that_are_not_0_and_1_are_no_label(tmp_path):
    rows = [(i % 5, i % 3, 10**9 + i, 5 if i == 1999 else 0) for i in range(2000)]
    write_lines(tmp_path / "log.csv", ["user_id", "item_id", "time", "click"], rows)
    with pytest.raises(ValueError, match="looks like the label"):
        infer(tmp_path, {"log": "log.csv"})


def test_dates_as_text_are_pointed_out(tmp_path):
    write_lines(
        tmp_path / "log.csv", ["user_id", "item_id", "when", "click"], [(i, i, "2024-01-02", i % 2) for i in range(9)]
    )
    with pytest.raises(ValueError, match="when has dates as text"):
        infer(tmp_path, {"log": "log.csv"})


def test_choices_override_guesses(tmp_path):
    header = ["user_id", "account_id", "item_id", "doc_id", "time", "created", "click", "n"]
    rows = [(i % 5, i % 4, i % 3, i % 6, 10**9 + i, 10**9 - i, i % 2, i % 9) for i in range(90)]
    write_lines(tmp_path / "log.csv", header, rows)
    choices = {"user_key": "account_id", "item_key": "doc_id", "event_time": "created", "label": "n >= 5"}
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.csv"}, **choices))
    assert (spec.user_key, spec.item_key) == ("account_id", "doc_id")
    assert (spec.event_time.column, spec.label) == ("created", "n >= 5")
    with pytest.raises(
        ValueError, match=r"--user_key must be a column of the log\. Received: 'nobody'\. Allowed: user_id"
    ):
        infer(tmp_path, {"log": "log.csv"}, user_key="nobody")


@pytest.mark.parametrize(
    ("source_name", "name"),
    [
        ("user_id:token", "user_id"),
        ("1st colour", "column_1st_colour"),
        ("é", "column"),
        ("ctr", "ctr_value"),
        ("a.b", "a_b"),
    ],
)
def test_names_of_any_file_become_names_of_a_spec(source_name, name):
    assert spec_name(source_name) == name


def test_the_command_writes_the_spec_and_prints_what_it_decided(feed_dir, tmp_path):
    output = tmp_path / "my feed.yaml"
    done = run_command("pipelines.infer_spec", "--log=log.csv", f"--input_dir={feed_dir}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert load_spec(output).name == "my_feed"
    assert "left out: its name (like...) says that it is known only after the event" in done.stdout
