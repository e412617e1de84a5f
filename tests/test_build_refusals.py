"""Builds that must fail: with a message that helps, and without anything that looks finished."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from commands import run_command
from shop import events, items, refused, users, write_shop

import feature_specs
from clsd_tf.spec.feature_spec import SpecError, parse_spec
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError
from pipelines.beam.dataset import BadInputError, BuildConfig, build_dataset
from pipelines.public_data.feed import FeedConfig, simulate_feed

# --- Bad input that the job refuses ----------------------------------------------------------------------------------


def test_unknown_spec_key_ends_the_command_with_its_message_and_writes_nothing(shop_content, tmp_path):
    shop_content["event_time"]["units"] = "seconds"
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(shop_content), encoding="utf-8")
    raw = write_shop(tmp_path / "raw")
    with pytest.raises(SpecError, match="units"):
        feature_specs.get_spec(str(tmp_path / "shop.yaml"))
    output = tmp_path / "out" / "dataset"
    result = run_command(
        "pipelines.build_dataset", f"--spec={tmp_path / 'shop.yaml'}", f"--input_dir={raw}", f"--dataset_dir={output}"
    )
    assert result.returncode == 1
    assert "event_time.units: unknown key. Received: 'units'. Allowed: column, earliest, latest, unit" in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.parent.exists()


def test_missing_column_is_refused(shop_spec, tmp_path):
    raw = write_shop(tmp_path / "raw", log_header=["user_id", "item_id", "time", "seconds", "weight"])
    message = refused(shop_spec, raw, tmp_path, ValueError)
    assert "log.csv lacks columns that tables.log declares" in message
    assert "Received: user_id, item_id, time, seconds, weight. Missing: clicked" in message


def test_missing_file_is_refused(shop_spec, tmp_path):
    raw = write_shop(tmp_path / "raw")
    (raw / "items.csv").unlink()
    message = refused(shop_spec, raw, tmp_path, FileNotFoundError)
    assert f"tables.item.path must match at least one file. Received: {raw}/items.csv" in message


def test_too_many_bad_rows_are_refused_and_kept_beside_the_output(shop_spec, tmp_path):
    rows = events()
    rows[3] = "u1,i1"
    rows[50]["seconds"] = "long"
    rows[60]["user_id"] = ""
    message = refused(shop_spec, write_shop(tmp_path / "raw", rows), tmp_path, max_bad_fraction=0.01)
    assert "too many bad rows in tables.log. Received: 3 of 200" in message
    assert "1 2_columns_instead_of_6, 1 missing:user_id, 1 not_float:seconds" in message
    assert "Allowed: max_bad_fraction=0.01" in message
    kept = tmp_path / "out" / "dataset.dead_letter.parquet"
    assert f"The bad rows are in {kept}" in message
    found = sorted((row["row"], row["file"], row["reason"]) for row in pa.parquet.read_table(kept).to_pylist())
    assert found == [
        (5, "log.csv", "2_columns_instead_of_6"),
        (52, "log.csv", "not_float:seconds"),
        (62, "log.csv", "missing:user_id"),
    ]


def test_bad_rows_of_a_profile_table_are_refused_under_its_name(shop_spec, tmp_path):
    rows = users()
    rows[4]["age"] = "unknown"
    message = refused(shop_spec, write_shop(tmp_path / "raw", user_rows=rows), tmp_path)
    assert "too many bad rows in tables.user. Received: 1 of 10 (1 not_int64:age)" in message


def test_constant_label_is_refused(shop_spec, tmp_path):
    rows = [{**row, "clicked": 0} for row in events()]
    message = refused(shop_spec, write_shop(tmp_path / "raw", rows), tmp_path)
    assert "the label must not be constant. Received: 0 clicks in 160 rows of train, by label `clicked == 1`" in message
    assert "Allowed: both values" in message


def test_label_that_is_constant_in_the_test_split_only_is_refused(shop_spec, tmp_path):
    rows = [{**row, "clicked": 1 if k >= 180 else row["clicked"]} for k, row in enumerate(events())]
    message = refused(shop_spec, write_shop(tmp_path / "raw", rows), tmp_path)
    assert "Received: 20 clicks in 20 rows of test" in message


def test_timestamps_in_the_wrong_unit_are_refused(shop_spec, tmp_path):
    rows = [{**row, "time": row["time"] * 1000} for row in events()]
    message = refused(shop_spec, write_shop(tmp_path / "raw", rows), tmp_path)
    assert "Received: 200 of 200 (200 event_time_outside_2020-01-01_to_2030-01-01_in_seconds)" in message


@pytest.mark.parametrize(
    ("validation_from", "test_from", "sizes"),
    [
        ("2028-01-01T00:00:00", "2029-01-01T00:00:00", "train 200, validation 0, test 0"),
        ("2021-01-01T00:00:00", "2022-01-01T00:00:00", "train 0, validation 0, test 200"),
    ],
)
def test_cut_off_dates_that_leave_a_split_empty_are_refused(shop_content, tmp_path, validation_from, test_from, sizes):
    shop_content["split"] = {"validation_from": validation_from, "test_from": test_from}
    message = refused(parse_spec(shop_content, "shop"), write_shop(tmp_path / "raw"), tmp_path)
    assert f"every split must have rows. Received: {sizes}" in message
    assert f"{validation_from[:4]}-01-01T00:00:00+00:00" in message
    assert "Change the spec's split" in message


@pytest.mark.parametrize("role", ["log", "user", "item"])
def test_table_of_a_header_only_is_refused(shop_spec, tmp_path, role):
    empty = {"log": "log", "user": "user_rows", "item": "item_rows"}[role]
    message = refused(shop_spec, write_shop(tmp_path / "raw", **{empty: []}), tmp_path)
    assert f"a table must have rows. Received: tables.{role} with 0 rows. Allowed: at least 1" in message


def test_table_of_zero_bytes_is_refused(shop_spec, tmp_path):
    raw = write_shop(tmp_path / "raw")
    (raw / "log.csv").write_bytes(b"")
    message = refused(shop_spec, raw, tmp_path, ValueError)
    assert "log.csv is empty. Received: a file of 0 rows. Allowed: a header line and rows" in message


def test_log_of_bad_rows_only_is_refused_even_if_every_row_may_be_bad(shop_spec, tmp_path):
    rows = [{**row, "clicked": "maybe"} for row in events()]
    message = refused(shop_spec, write_shop(tmp_path / "raw", rows), tmp_path, max_bad_fraction=1.0)
    assert "tables.log" in message
    assert "Received" in message


def test_duplicate_user_is_refused_by_row_numbers_and_without_the_user_id(shop_spec, tmp_path):
    log = [{**row, "user_id": "private-person" if k % 10 == 3 else row["user_id"]} for k, row in enumerate(events())]
    profiles = users()
    profiles[3]["user_id"] = "private-person"
    profiles += [{"user_id": "private-person", "age": 50, "city": "Rome"}]
    message = refused(shop_spec, write_shop(tmp_path / "raw", log, user_rows=profiles), tmp_path)
    # u0 is in line 2 of users.csv, so the fourth user in line 5, and the added one in line 12.
    assert "a key of tables.user must be unique" in message
    assert "Received: row 5 of users.csv and row 12 of users.csv with the same user_id (1 such row(s))" in message
    assert "Remove the duplicates" in message
    assert "private-person" not in message


def test_duplicate_item_is_refused_once_by_row_numbers(shop_spec, tmp_path):
    message = refused(shop_spec, write_shop(tmp_path / "raw", item_rows=[*items(), items()[0], items()[0]]), tmp_path)
    # i0 is in lines 2, 9 and 10: two rows too many.
    assert "a key of tables.item must be unique" in message
    assert "Received: row 2 of items.csv and row 9 of items.csv with the same item_id (2 such row(s))" in message


def test_vocabulary_without_any_value_is_refused(shop_content, tmp_path):
    shop_content["features"][2]["vocabulary"] = {"min_count": 1000}
    message = refused(parse_spec(shop_content, "shop"), write_shop(tmp_path / "raw"), tmp_path)
    assert "the vocabulary of 'user_city' is empty. Received: no value with min_count=1000" in message
    assert "Lower min_count, or use hash_buckets" in message


def test_numeric_feature_without_any_value_is_refused(shop_spec, tmp_path):
    raw = write_shop(tmp_path / "raw", item_rows=[{**item, "price": ""} for item in items()])
    message = refused(shop_spec, raw, tmp_path)
    assert "numeric feature 'item_price' has no value in the training split. Received: column 'price'" in message


def test_existing_output_directory_is_refused_and_left_as_it_was(shop_spec, tmp_path):
    raw, output = write_shop(tmp_path / "raw"), tmp_path / "dataset"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(FileExistsError, match=r"must not exist yet\. Received: .*dataset\. Choose another name"):
        build_dataset(shop_spec, BuildConfig(input_dir=str(raw)), output)
    assert [path.name for path in output.iterdir()] == ["mine"]
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "dataset"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction must be in \[0, 1\]\. Received: 1\.5"),
        ({"max_bad_fraction": -0.1}, r"Received: -0\.1"),
        ({"rows_per_shard": 0}, r"rows_per_shard must be at least 1\. Received: 0"),
    ],
)
def test_bad_build_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        BuildConfig(input_dir="", **config)


def test_a_stray_quote_fails_the_job_by_the_lines_it_swallowed(feed_dir, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(feed_dir, raw)
    lines = (raw / "log.csv").read_text().replace('"', "").splitlines()
    # The quote opens in line 1001 and closes in line 1401: 401 lines become one cell.
    lines[1000] = lines[1000].replace(lines[1000].split(",")[3], '"phone')
    lines[1400] = lines[1400].replace(lines[1400].split(",")[3], 'phone"')
    (raw / "log.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(BadInputError, match=r"too many bad rows in tables.log. Received: 401 of 4,000"):
        build_dataset(feature_specs.get_spec("simulated_feed"), BuildConfig(str(raw)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistyped_flag_is_refused():
    with pytest.raises(ValueError, match=r"unknown flags. Received: --max_bad_fractoin=0.5"):
        BuildConfig("raw", beam_arguments=("--direct_num_workers=2", "--max_bad_fractoin=0.5"))


# --- A killed job ----------------------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "pipelines.build_dataset", *arguments]


def test_job_killed_half_way_leaves_no_directory_that_looks_finished(tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "out" / "dataset"
    simulate_feed(FeedConfig(num_rows=100_000, num_users=2000, num_items=500, seed=1), raw)
    arguments = ("--spec=simulated_feed", f"--input_dir={raw}", f"--dataset_dir={output}")
    with (tmp_path / "output.txt").open("w") as log:
        process = subprocess.Popen(command(*arguments), stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 100
            # Half-way: the join has written its files, and fitting and encoding are still to come.
            while not list(tmp_path.glob("out/.dataset.incomplete-*/scratch/by_shard/*.arrow")):
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    [staging] = (tmp_path / "out").iterdir()
    assert staging.name.startswith(".dataset.incomplete-")
    with pytest.raises(ArtifactError, match="is complete when it holds _SUCCESS"):
        DatasetDir(staging)
    with pytest.raises(ArtifactError, match="does not exist"):
        DatasetDir(output)
