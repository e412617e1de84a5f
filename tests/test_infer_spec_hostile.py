"""Files that would lead a guess astray: leaks without numbers, huge ids, clashing names, damage, personal data."""

import gzip
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import run_command

from clsd_tf.spec.feature_spec import load_spec
from clsd_tf.spec.tables import Column
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.spec_inference.infer import Choices, infer_spec
from pipelines.spec_inference.profiles import profile_table, unique_name
from pipelines.spec_inference.to_yaml import to_yaml

NUM_ROWS = 600
RANDOM = np.random.default_rng(3)
CLICKS = RANDOM.random(NUM_ROWS) < 0.3


def infer(directory, paths, **choices):
    tables = {role: profile_table(role, path, str(directory), 100_000) for role, path in paths.items()}
    return infer_spec(tables.pop("log"), tables, Choices(**choices))


def spec_of(directory, inferred):
    (directory / "spec.yaml").write_text(to_yaml(inferred, "feed", 100_000), encoding="utf-8")
    return load_spec(directory / "spec.yaml")


def num_built_rows(directory, spec):
    counts = build_dataset(spec, BuildConfig(input_dir=str(directory)), directory / "dataset")
    return sum(entry["rows"] for entry in counts["splits"].values())


def write_table(path, columns):
    """A CSV file of columns; a name may be any text."""
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(f'"{name}"' for name in columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def log_columns(**others):
    rows = range(NUM_ROWS)
    return {
        "user_id": [row % 20 for row in rows],
        "item_id": [f"i{row % 30}" for row in rows],
        "time": [1_700_000_000 + row for row in rows],
        "click": CLICKS.astype(int).tolist(),
    } | others


def write_log(directory, **others):
    write_table(directory / "log.csv", log_columns(**others))


def infer_by_command(directory, *arguments):
    return run_command("pipelines.infer_spec", f"--input_dir={directory}", *arguments)


# --- What is known only after the event ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("is_like", np.where(RANDOM.random(NUM_ROWS) < 0.5, "true", "false"), "its name .like"),
        ("purchased", np.where(RANDOM.random(NUM_ROWS) < 0.5, "True", "False"), "its name .purchas"),
        ("event_type", np.where(CLICKS, "click", "view"), "AUC of 1.00"),
        ("state", np.where(CLICKS, 3, np.where(np.arange(NUM_ROWS) % 2, 1, 5)), "AUC of 1.00"),
        ("kind", np.where(CLICKS, "opened", ""), "only clicked rows"),
        ("note", np.where(CLICKS, [f"w{i % 200}" for i in range(NUM_ROWS)], ""), "only clicked rows"),
        ("span", np.where(CLICKS, [f"{i / 7:.2f}" for i in range(NUM_ROWS)], ""), "only clicked rows"),
        (
            "memo",
            np.where(CLICKS | (np.arange(NUM_ROWS) % 20 == 0), [f"w{i % 200}" for i in range(NUM_ROWS)], ""),
            "0.9",
        ),
        ("order", np.where(CLICKS & (np.arange(NUM_ROWS) % 2 > 0), [f"{i % 90}" for i in range(NUM_ROWS)], ""), "only"),
    ],
)
def test_what_follows_the_click_is_no_feature(tmp_path, name, values, reason):
    write_log(tmp_path, **{name: values, "device": ["a", "b", "c"] * (NUM_ROWS // 3)})
    inferred = infer(tmp_path, {"log": "log.csv"})
    spec = spec_of(tmp_path, inferred)
    assert {"user_id", "item_id", "device"} <= {feature.name for feature in spec.features}
    assert name not in {feature.column for feature in spec.features if hasattr(feature, "column")}
    [entry] = [entry for entry in inferred.left_out if entry.column == name]
    assert re.search(reason, entry.reason)


def test_what_only_goes_along_with_clicks_stays_a_feature(tmp_path):
    # Mobile rows are 0.8 of the clicked rows and 0.3 of the others: an AUC of 0.75.
    mobile = RANDOM.random(NUM_ROWS) < np.where(CLICKS, 0.8, 0.3)
    half = np.where(RANDOM.random(NUM_ROWS) < 0.5, "x", "")
    ids = [f"c{i}" for i in RANDOM.integers(50, size=NUM_ROWS)]
    write_log(tmp_path, app=np.where(mobile, "true", "false"), extra=half, campaign=ids)
    features = {feature.name for feature in spec_of(tmp_path, infer(tmp_path, {"log": "log.csv"})).features}
    assert {"app", "campaign"} <= features


# --- Ids, names ------------------------------------------------------------------------------------------------------


def test_ids_of_19_digits_and_keys_with_a_point_are_text(tmp_path):
    users = [1_234_567_890_123_456_000 + row % 20 for row in range(NUM_ROWS)]
    write_log(tmp_path, user_id=users, item_id=[f"{row % 30}.0" for row in range(NUM_ROWS)])
    write_table(tmp_path / "items.csv", {"item_id": [f"{row}.0" for row in range(30)], "size": range(30)})
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.csv", "item": "items.csv"}))
    assert [spec.tables.log.column(name).type for name in ("user_id", "item_id")] == ["string", "string"]
    assert spec.tables.item.column("item_id").type == "string"
    assert num_built_rows(tmp_path, spec) == NUM_ROWS


def test_a_key_is_text_if_it_is_in_either_table(tmp_path):
    write_log(tmp_path)
    write_table(tmp_path / "users.csv", {"user_id": [*range(19), "guest"], "size": range(20)})
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.csv", "user": "users.csv"}))
    assert spec.tables.log.column("user_id").type == spec.tables.user.column("user_id").type == "string"


def test_names_that_clash_are_numbered(tmp_path):
    letters = ["a", "b"] * (NUM_ROWS // 2)
    write_log(tmp_path, recent_item_id=letters, category=letters, hash=letters)
    write_table(
        tmp_path / "users.csv",
        {
            "user_id": range(20),
            "age": [15 + 3 * user for user in range(20)],
            "age_group": ["young", "old"] * 10,
            "hash": ["p", "q"] * 10,
        },
    )
    items = {
        "item_id": [f"i{item}" for item in range(30)],
        "category": ["a", "b"] * 15,
        "item_category": ["c", "d"] * 15,
    }
    write_table(tmp_path / "items.csv", items)
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.csv", "user": "users.csv", "item": "items.csv"}))
    names = {feature.name for feature in spec.features}
    assert {"recent_item_id", "recent_item_id_2", "age", "age_group", "item_category", "item_category_2"} <= names
    assert spec.tables.item.column("item_category").name_in_file == "item_category"
    assert spec.tables.item.column("item_category_2").name_in_file == "category"
    assert spec.tables.user.column("user_hash_2").name_in_file == "hash"
    assert {group.name for group in spec.user_groups} >= {"age_group_2", "age_group_group"}
    assert num_built_rows(tmp_path, spec) == NUM_ROWS


def test_unique_name_passes_over_what_is_taken_or_reserved():
    assert [unique_name(name, {"a", "a_2"}) for name in ("b", "a", "user_hash", "ctr")] == [
        "b",
        "a_3",
        "user_hash_2",
        "ctr_2",
    ]


def test_an_index_column_without_a_name_is_left_alone(tmp_path):
    write_table(tmp_path / "log.csv", {"": range(NUM_ROWS), **log_columns()})
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.csv"}))
    assert spec.tables.log.column_names == ["user_id", "item_id", "time", "click"]
    assert num_built_rows(tmp_path, spec) == NUM_ROWS
    assert Column(name="a", type="string", source_name="").name_in_file == ""


@pytest.mark.parametrize("name", ["b\x7fc", "b\x85c", "b\u2028c", "b\tc", "b\ufeffc", "b\x07\U0001f600"])
def test_names_with_control_characters_load_as_they_are(tmp_path, name):
    columns = log_columns(**{name: ["a", "b"] * (NUM_ROWS // 2)})
    pa.parquet.write_table(pa.table({key: pa.array(values) for key, values in columns.items()}), tmp_path / "p.parquet")
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "p.parquet"}))
    assert spec.tables.log.columns[-1].name_in_file == name


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,time,click,size,size\n1,2,1700000000,1,3,4\n")
    with pytest.raises(ValueError, match=r"log\.csv must have each column once\. Received: 'size' 2 times"):
        infer(tmp_path, {"log": "log.csv"})


# --- Damage ----------------------------------------------------------------------------------------------------------


def test_a_file_without_rows_is_refused_alone_and_passed_over_among_others(tmp_path):
    (tmp_path / "log0.csv").write_text("user_id,item_id,time,click\n")
    with pytest.raises(ValueError, match=r"--log must have rows\. Received: log0\.csv"):
        infer(tmp_path, {"log": "log0.csv"})
    write_table(tmp_path / "log1.csv", log_columns())
    assert infer(tmp_path, {"log": "log*.csv"}).tables["log"].columns[0].num_rows == NUM_ROWS


def test_what_could_not_be_read_is_reported(tmp_path):
    write_table(tmp_path / "log.csv", log_columns())
    whole = gzip.compress((tmp_path / "log.csv").read_bytes())
    (tmp_path / "log1.csv.gz").write_bytes(whole)
    (tmp_path / "log2.csv.gz").write_bytes(whole[: len(whole) // 2])
    log = profile_table("log", "log*.csv.gz", str(tmp_path), 100_000)
    [unreadable] = log.unreadable
    assert re.match(r".*log2\.csv\.gz: .*(truncated|compressed|end)", unreadable)
    done = infer_by_command(tmp_path, "--log=log*.csv.gz", f"--output={tmp_path / 'feed.yaml'}")
    assert done.returncode == 0, done.stderr
    assert f"warning: log: not looked at behind what cannot be read. {unreadable}" in done.stdout + done.stderr


# --- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "label"), [("rating>=4", "rating >= 4"), (" rating  <0.50 ", "rating < 0.5")])
def test_a_label_without_spaces(tmp_path, given, label):
    write_log(tmp_path, rating=[row % 6 for row in range(NUM_ROWS)])
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.csv"}, label=given))
    assert spec.label == label


@pytest.mark.parametrize("label", ["click == 1", "click >= 1", "rating == 'x'"])
def test_a_label_of_another_type_than_its_column_is_refused(tmp_path, label):
    write_log(tmp_path, click=np.where(CLICKS, "true", "false"), rating=[row % 6 for row in range(NUM_ROWS)])
    with pytest.raises(ValueError, match="--label must compare"):
        infer(tmp_path, {"log": "log.csv"}, label=label)


def test_boolean_labels_build(tmp_path):
    columns = {
        name: pa.array(values) for name, values in log_columns(liked=CLICKS & (RANDOM.random(600) < 0.2)).items()
    }
    columns["click"] = pa.array(CLICKS)
    pa.parquet.write_table(pa.table(columns), tmp_path / "log.parquet")
    spec = spec_of(tmp_path, infer(tmp_path, {"log": "log.parquet"}))
    assert (spec.label, spec.intensity_label) == ("click == 'true'", "liked == 'true'")
    assert spec.tables.log.column("click").type == "string"
    assert num_built_rows(tmp_path, spec) == NUM_ROWS


# --- What is written and printed -------------------------------------------------------------------------------------


def test_no_value_of_users_stands_in_comments_or_on_the_console(tmp_path):
    users = [700_000_100 + row % 20 for row in range(NUM_ROWS)]
    write_log(tmp_path, user_id=users)
    write_table(
        tmp_path / "users.csv",
        {
            "user_id": [700_000_100 + user for user in range(20)],
            "phone": [491_700_000_000 + user % 10 for user in range(20)],
            "email": [f"u{user % 4}@example.org" for user in range(20)],
            "name": [f"Ada{user % 3}" for user in range(20)],
            "customer_no": [8_100_000 + user % 10 for user in range(20)],
            "age": [20 + user for user in range(20)],
        },
    )
    output = tmp_path / "feed.yaml"
    done = infer_by_command(tmp_path, "--log=log.csv", "--user=users.csv", f"--output={output}")
    assert done.returncode == 0, done.stderr
    for text in (output.read_text(), done.stdout, done.stderr):
        assert not [value for value in ("7000001", "4917000", "example.org", "Ada", "81000") if value in text]
    assert "from 20 to 39" in output.read_text()


def test_nothing_is_written_when_the_spec_does_not_load(tmp_path):
    write_log(tmp_path)
    output = tmp_path / "feed.yaml"
    done = infer_by_command(tmp_path, "--log=log.csv", "--user_key=item_id", "--item_key=item_id", f"--output={output}")
    assert done.returncode != 0
    assert "which is not written" in done.stderr
    assert not output.exists()
