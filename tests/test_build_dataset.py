"""Real Beam runs: what a dataset holds, that nothing looks ahead, and that bad input publishes nothing."""

import csv
import datetime as dt
import functools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import yaml

import feature_specs
from clsd_tf.artifacts import SPLITS, ArtifactError, DatasetDir
from clsd_tf.features import SpecError, parse_spec
from pipelines.build import BadInputError, BuildConfig, build_dataset, inspect_data
from pipelines.feed import FeedConfig, simulate_feed
from pipelines.overrides import override_source, override_split_rule

T0 = 1_700_000_000
LOG = ["user_id", "item_id", "time", "clicked", "seconds", "weight"]
NUM_EVENTS = 200  # A minute apart, so a time split of 80/10/10 is events 0-159, 160-179, 180-199.


def events():
    """Log rows: user k mod 10, item k mod 7; every third is a click, every sixth an intense one."""
    return [
        {
            "user_id": f"u{k % 10}",
            "item_id": f"i{k % 7}",
            "time": T0 + 60 * k,
            "clicked": int(k % 3 == 0),
            "seconds": 30.0 if k % 6 == 0 else 1.5,
            "weight": 0.5 if k % 2 else 1.0,
        }
        for k in range(NUM_EVENTS)
    ]


def users():
    return [{"user_id": f"u{k}", "age": 15 + 5 * k, "city": ("Rome", "Oslo", "Paris")[k % 3]} for k in range(10)]


def items():
    return [{"item_id": f"i{k}", "tags": ("a|b", "b", "")[k % 3], "price": 1.5 * k} for k in range(7)]


def write_csv(path, rows, header):
    lines = [",".join(header)]
    lines += [row if isinstance(row, str) else ",".join(str(row[name]) for name in header) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_shop(directory, log=None, user_rows=None, item_rows=None, log_header=LOG):
    """Writes the three tables of the shop; a row may be given as its raw line."""
    directory.mkdir(exist_ok=True)
    write_csv(directory / "log.csv", events() if log is None else log, log_header)
    write_csv(directory / "users.csv", users() if user_rows is None else user_rows, ["user_id", "age", "city"])
    write_csv(directory / "items.csv", items() if item_rows is None else item_rows, ["item_id", "tags", "price"])
    return directory


def build(spec, raw, output, **config):
    build_dataset(spec, BuildConfig(input_dir=str(raw), **config), output)
    return DatasetDir(output)


def refused(spec, raw, tmp_path, error=BadInputError, **config):
    """The message of a build that must fail, after a check that it left nothing that looks finished."""
    output = tmp_path / "out" / "dataset"
    with pytest.raises(error) as caught:
        build_dataset(spec, BuildConfig(input_dir=str(raw), **config), output)
    assert not output.exists()
    if output.parent.exists():
        left = {path.name for path in output.parent.iterdir()}
        assert left <= {"dataset.dead_letter.jsonl"}
    return str(caught.value)


@functools.cache
def records_of_file(path):
    """The records of a shard, as {name: list}, read without the project's code."""
    compression = "GZIP" if path.endswith(".gz") else ""
    rows = []
    for serialized in tf.data.TFRecordDataset(path, compression).as_numpy_iterator():
        entries = tf.train.Example.FromString(serialized).features.feature.items()
        rows.append({name: list(getattr(entry, entry.WhichOneof("kind")).value) for name, entry in entries})
    return rows


def records(dataset, split):
    """The records of a split in file order."""
    return [row for path in dataset.record_files(split) for row in records_of_file(path)]


def lines_of(dataset, split):
    """The line of log.csv that each record of a split comes from."""
    return [record["row_id"][0] for record in records(dataset, split)]


def vocabulary(dataset, name):
    return lines_of_vocabulary(dataset.path, name)


def lines_of_vocabulary(directory, name):
    return (directory / "vocabularies" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def inspected(spec, raw, directory):
    """(counts, statistics) of a build that stops before it encodes."""
    directory.mkdir()
    return inspect_data(spec, BuildConfig(input_dir=str(raw)), directory)


def values_of(ids, values, num_oov):
    """Ids back to text: None where out of vocabulary; padding left out."""
    return [values[index - 1 - num_oov] if index > num_oov else None for index in ids if index]


@pytest.fixture(scope="module")
def shop_dir(tmp_path_factory):
    """The shop with planted rows.

    Events 185 and 190, in the test period, show the item "late"; event 100 (of user u0) shows the item "once"; lines
    14 and 25 (events 12 and 23) are bad.
    """
    rows = events()
    rows[185]["item_id"] = rows[190]["item_id"] = "late"
    rows[100]["item_id"] = "once"
    rows[12] = "u2,i5"
    rows[23]["clicked"] = "maybe"
    extra = [{"item_id": "once", "tags": "c", "price": 2.0}, {"item_id": "late", "tags": "rare", "price": 2.0}]
    return write_shop(tmp_path_factory.mktemp("shop") / "raw", rows, item_rows=[*items(), *extra])


@pytest.fixture(scope="module")
def shop_dataset(shop_dir, shop_spec, tmp_path_factory):
    """Built from ``shop_dir`` in compressed shards of 30 rows."""
    path = tmp_path_factory.mktemp("shop_dataset") / "dataset"
    return build(shop_spec, shop_dir, path, max_bad_fraction=0.01, rows_per_shard=30, compressed=True)


# --- Contents --------------------------------------------------------------------------------------------------------


def test_rows_and_clicks_of_each_split_match_the_counts(feed_dataset):
    for split in SPLITS:
        rows, counts = records(feed_dataset, split), feed_dataset.counts["splits"][split]
        assert len(rows) == counts["rows"] == feed_dataset.num_rows(split)
        assert sum(row["label"][0] for row in rows) == counts["clicks"]
        assert sum(row["intensity_label"][0] for row in rows) == counts["intense"]
        for group in feed_dataset.inputs.groups:
            found = Counter(row[group.name][0] for row in rows)
            clicked = Counter(row[group.name][0] for row in rows if row["label"][0])
            for index, label in enumerate(group.labels):
                expected = counts["groups"][group.name][label]
                assert (found[index], clicked[index]) == (expected["rows"], expected["clicks"])


def test_every_row_of_the_log_is_in_exactly_one_split(feed_dataset):
    lines = [line for split in SPLITS for line in lines_of(feed_dataset, split)]
    assert sorted(lines) == list(range(2, 4002))  # Line 1 is the header.
    assert [feed_dataset.num_rows(split) for split in SPLITS] == [3200, 400, 400]


def test_training_ends_before_validation_begins_and_validation_before_test(feed_dataset, feed_dir):
    with (feed_dir / "log.csv").open(encoding="utf-8") as file:
        times = [int(row["time_ms"]) for row in csv.DictReader(file)]
    spans = {split: [times[line - 2] for line in lines_of(feed_dataset, split)] for split in SPLITS}
    assert max(spans["train"]) < min(spans["validation"])
    assert max(spans["validation"]) < min(spans["test"])


def test_records_hold_labels_weights_and_ids_of_their_own_row(shop_dataset):
    log = events()
    log[100]["item_id"], log[185]["item_id"], log[190]["item_id"] = "once", "late", "late"
    item_values, cities = vocabulary(shop_dataset, "item"), vocabulary(shop_dataset, "user_city")
    for split in SPLITS:
        for record in records(shop_dataset, split):
            event = log[record["row_id"][0] - 2]
            profile = users()[int(event["user_id"][1:])]
            assert record["label"] == [event["clicked"]]
            assert record["intensity_label"] == [event["seconds"] >= 20]
            assert record["sample_weight"] == [event["weight"]]
            assert record["event_time"] == [event["time"] * 1_000_000]
            assert math.isnan(record["intensity_value"][0])  # The shop declares none.
            expected = [event["item_id"]] if event["item_id"] != "late" else [None]
            assert values_of(record["item"], item_values, 2) == expected
            assert values_of(record["user_city"], cities, 1) == [profile["city"]]
            # Boundaries 18, 30.5, 60: <18 is 1 and ages stop at 60.
            age = profile["age"]
            assert record["age_group"] == [1 if age < 18 else 2 if age < 30.5 else 3 if age < 60 else 4]
            assert record["city_group"] == [{"Rome": 1, "Oslo": 2, "Paris": 3}[profile["city"]]]


def test_records_hold_the_declared_intensity_value(feed_dataset, feed_dir):
    with (feed_dir / "log.csv").open(encoding="utf-8") as file:
        seconds = [float(row["read_seconds"]) for row in csv.DictReader(file)]
    for split in SPLITS:
        for record in records(feed_dataset, split):
            assert record["intensity_value"] == [pytest.approx(seconds[record["row_id"][0] - 2], rel=1e-6)]


def test_user_hash_tells_users_apart(shop_dataset):
    users_of_hash = defaultdict(set)
    for split in SPLITS:
        for record in records(shop_dataset, split):
            users_of_hash[record["user_hash"][0]].add((record["row_id"][0] - 2) % 10)
    assert len(users_of_hash) == 10
    assert all(len(group) == 1 for group in users_of_hash.values())


def test_vocabularies_are_counted_on_the_training_split_only(shop_dataset):
    # The item "late" and its tag "rare" occur in the test period alone.
    assert "late" not in vocabulary(shop_dataset, "item")
    assert "rare" not in vocabulary(shop_dataset, "item_tags")
    ids = [record["item"][0] for record in records(shop_dataset, "test") if record["row_id"][0] in (187, 192)]
    assert len(ids) == 2
    assert set(ids) <= {1, 2}  # Out of vocabulary.


def test_vocabulary_is_ordered_by_count_in_training_and_ties_by_text(shop_dataset):
    counts = Counter()
    for line in lines_of(shop_dataset, "train"):
        counts["once" if line == 102 else f"i{(line - 2) % 7}"] += 1
    expected = sorted(counts, key=lambda item: (-counts[item], item))
    assert vocabulary(shop_dataset, "item") == expected
    assert expected[-1] == "once"


def test_vocabulary_respects_min_count_and_max_size(shop_content, shop_dir, tmp_path):
    shop_content["features"][1]["vocabulary"] = {"min_count": 2}
    shop_content["features"][3]["vocabulary"] = {"max_size": 1}
    _, statistics = inspected(parse_spec(shop_content, "shop"), shop_dir, tmp_path / "scratch")
    assert sorted(lines_of_vocabulary(tmp_path / "scratch", "item")) == [f"i{k}" for k in range(7)]  # Without "once".
    assert lines_of_vocabulary(tmp_path / "scratch", "item_tags") == ["b"]  # The tag of most items.
    assert statistics.vocabulary_lengths == {"item": 7, "user_city": 3, "item_tags": 1}


def test_statistics_are_those_of_the_training_rows(shop_dataset):
    prices = [math.log1p(2.0 if line == 102 else 1.5 * ((line - 2) % 7)) for line in lines_of(shop_dataset, "train")]
    fitted = shop_dataset.statistics.numeric["item_price"]
    assert fitted.count == len(prices) == shop_dataset.num_rows("train")
    assert fitted.mean == pytest.approx(np.mean(prices))
    assert fitted.std == pytest.approx(np.std(prices))
    assert (fitted.minimum, fitted.maximum) == (0.0, pytest.approx(math.log(10)))  # Prices 0 and 9.


def test_quantile_buckets_hold_about_the_same_number_of_training_rows(feed_dataset):
    # 8 buckets of 3,200 rows: 400 each; ages are whole years, of which 120 users have about 53, so buckets are coarse.
    assert len(feed_dataset.statistics.numeric["user_age"].boundaries) == 7
    counts = np.bincount([record["user_age"][0] for record in records(feed_dataset, "train")], minlength=9)
    assert counts[0] == 0
    assert counts[1:].sum() == 3200
    assert counts[1:] == pytest.approx(np.full(8, 400), abs=150)


# --- No look-ahead ---------------------------------------------------------------------------------------------------


def test_histories_of_a_dataset_equal_a_naive_loop_over_the_log(feed_dataset, feed_dir):
    with (feed_dir / "log.csv").open(encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    known = vocabulary(feed_dataset, "item")
    found = {
        record["row_id"][0]: values_of(record["recent_items"], known, 1)
        for split in SPLITS
        for record in records(feed_dataset, split)
    }
    seen = defaultdict(list)
    for line, row in enumerate(log, start=2):  # The feed is in time order, without ties.
        expected = [item if item in known else None for item in seen[row["user_id"]][-5:]]
        assert found[line] == expected, line
        seen[row["user_id"]].append(row["item_id"])


def test_item_is_in_the_users_history_only_after_its_event(shop_dataset):
    known = vocabulary(shop_dataset, "item")
    seen_in = sorted(
        record["row_id"][0] - 2
        for split in SPLITS
        for record in records(shop_dataset, split)
        if "once" in values_of(record["recent_items"], known, 2)
    )
    # User u0 saw "once" in event 100; the next three events of u0 have it in a history of length 3.
    assert seen_in == [110, 120, 130]


def test_histories_do_not_depend_on_the_order_of_the_log_and_ties_do_not_see_each_other(shop_spec, tmp_path):
    rows = events()
    rows[100]["item_id"] = "once"
    rows[100]["time"] = rows[110]["time"]  # Two events of u0 at one time.
    raw = write_shop(tmp_path / "raw", rows[::-1], item_rows=[*items(), {"item_id": "once", "tags": "", "price": 1}])
    dataset = build(shop_spec, raw, tmp_path / "dataset")
    known = vocabulary(dataset, "item")
    found = {
        record["row_id"][0]: values_of(record["recent_items"], known, 2)
        for split in SPLITS
        for record in records(dataset, split)
    }
    in_time_order = sorted(enumerate(rows[::-1], start=2), key=lambda numbered: (numbered[1]["time"], numbered[0]))
    for line, event in in_time_order:
        before = [
            row["item_id"]
            for _, row in in_time_order
            if row["user_id"] == event["user_id"] and row["time"] < event["time"]
        ]
        assert found[line] == before[-3:], line
    # Events 100 and 110 follow events 70, 80 and 90, of items 70 mod 7 = 0, 80 mod 7 = 3 and 90 mod 7 = 6.
    assert found[201 - 100] == found[201 - 110] == ["i0", "i3", "i6"]


# --- Shards ----------------------------------------------------------------------------------------------------------


def test_compressed_shards_hold_every_row_exactly_once(shop_dataset):
    # 198 good rows: 158 or 159 train, so 6 shards of 30; about 20 in the others, so one each.
    files = shop_dataset.record_files("train")
    assert [pathlib.Path(path).name for path in files] == [
        f"train-{index:05d}-of-00006.tfrecord.gz" for index in range(6)
    ]
    lines = [line for split in SPLITS for line in lines_of(shop_dataset, split)]
    assert sorted(lines) == sorted(set(range(2, 202)) - {14, 25})
    with open(files[0], "rb") as file:
        assert file.read(2) == b"\x1f\x8b"  # The magic number of gzip.


def test_rows_of_a_shard_are_in_time_order(shop_dataset):
    for path in shop_dataset.record_files("train"):
        examples = tf.data.TFRecordDataset(path, "GZIP").as_numpy_iterator()
        rows = [tf.train.Example.FromString(text).features.feature["row_id"].int64_list.value[0] for text in examples]
        assert rows == sorted(rows)  # The log is in time order.


def test_the_same_input_twice_gives_byte_identical_shards(shop_dataset, shop_dir, shop_spec, tmp_path):
    again = build(shop_spec, shop_dir, tmp_path / "dataset", rows_per_shard=30, compressed=True)

    def contents(dataset):
        return {path.name: path.read_bytes() for path in (dataset.path / "records").iterdir()}

    assert contents(again) == contents(shop_dataset)
    assert again.fingerprint == shop_dataset.fingerprint


def test_finished_dataset_holds_no_intermediate_files(shop_dataset):
    assert {path.name for path in shop_dataset.path.iterdir()} == {
        "_SUCCESS",
        "counts.json",
        "dead_letter.jsonl",
        "feature_spec.json",
        "records",
        "serving_sample.parquet",
        "statistics.json",
        "vocabularies",
    }
    assert [path.name for path in shop_dataset.path.parent.iterdir()] == ["dataset"]


def test_serving_sample_holds_raw_test_rows(shop_dataset, shop_spec):
    sample = pa.parquet.read_table(shop_dataset.layout.serving_sample)
    assert sample.column_names == ["row_id", "label", *(entry.name for entry in shop_spec.raw_inputs)]
    # Fewer than 10,000 test rows: all of them.
    assert sample.column("row_id").to_pylist() == sorted(lines_of(shop_dataset, "test"))
    row = sample.filter(pa.compute.equal(sample.column("row_id"), 187)).to_pylist()[0]
    # Event 185 of user u5, after 155, 165 and 175: items 155 mod 7 = 1, 165 mod 7 = 4, 175 mod 7 = 0.
    assert (row["user_id"], row["item_id"], row["age"], row["city"]) == ("u5", "late", 40, "Paris")
    assert row["recent_items"] == ["i1", "i4", "i0"]


def test_split_rule_can_be_overridden(shop_spec, shop_dir, tmp_path):
    counts, _ = inspected(override_split_rule(shop_spec, "random"), shop_dir, tmp_path / "scratch")
    sizes = [counts["splits"][split]["rows"] for split in SPLITS]
    assert counts["split_rule"] == "random"
    assert sum(sizes) == 198
    assert sizes != [158, 20, 20]  # What the time rule gives.
    assert "test_from" not in counts


def test_days_from_until_on_are_kept_back(shop_content, shop_dir, tmp_path):
    # Events are a minute apart: 100 train, 40 validate, 40 test, the last 20 are in no split and in no vocabulary.
    moments = (100, 140, 180)
    names = ("validation_from", "test_from", "until")
    texts = [dt.datetime.fromtimestamp(T0 + 60 * event, dt.timezone.utc).isoformat() for event in moments]
    shop_content["split"] = dict(zip(names, texts, strict=True))
    dataset = build(parse_spec(shop_content, "shop"), shop_dir, tmp_path / "dataset")
    for split, first, end in (("train", 0, 100), ("validation", 100, 140), ("test", 140, 180)):
        assert sorted(lines_of(dataset, split)) == [2 + event for event in range(first, end) if event not in (12, 23)]
    assert [dataset.counts[name] for name in names] == texts
    assert dataset.counts["tables"]["log"]["rows"] == 200
    sample = pa.parquet.read_table(dataset.layout.serving_sample)
    assert sample.column("row_id").to_pylist() == list(range(142, 182))


# --- Bad input that the job survives ---------------------------------------------------------------------------------


def test_bad_rows_below_the_limit_are_counted_and_written_with_their_lines(shop_dataset):
    # 2 of 200 is the limit of 1 % itself.
    assert shop_dataset.counts["tables"]["log"] == {
        "rows": 200,
        "bad": {"2_columns_instead_of_6": 1, "not_int64:clicked": 1},
    }
    dead = [json.loads(line) for line in shop_dataset.layout.dead_letter.read_text(encoding="utf-8").splitlines()]
    found = sorted((row["role"], row["file"], row["row"], row["reason"]) for row in dead)
    assert found == [
        ("log", "log.csv", 14, "2_columns_instead_of_6"),
        ("log", "log.csv", 25, "not_int64:clicked"),
    ]
    assert {row["raw"] for row in dead if row["row"] == 14} == {"u2,i5"}
    assert [json.loads(row["raw"])["clicked"] for row in dead if row["row"] == 25] == ["maybe"]


def test_user_without_profile_is_in_the_unknown_group_and_counted(shop_spec, tmp_path):
    raw = write_shop(tmp_path / "raw", user_rows=users()[:9], item_rows=items()[1:])
    counts, _ = inspected(shop_spec, raw, tmp_path / "scratch")
    # u9 has 20 events: 16 in training (of 160), 2 and 2 in the others; clicks are events 9, 39, 69, 99, 129, 159.
    for group in ("age_group", "city_group"):
        unknown = [counts["splits"][split]["groups"][group]["unknown"] for split in SPLITS]
        assert [entry["rows"] for entry in unknown] == [16, 2, 2]
        assert unknown[0]["clicks"] == 6
    assert counts["user_profile_missing"] == 20
    assert counts["item_profile_missing"] == 29  # Events 0, 7, ..., 196 show i0.


# --- Bad input that the job refuses ----------------------------------------------------------------------------------


def test_unknown_spec_key_ends_the_command_with_its_message_and_writes_nothing(shop_content, tmp_path):
    shop_content["event_time"]["units"] = "seconds"
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(shop_content), encoding="utf-8")
    raw = write_shop(tmp_path / "raw")
    with pytest.raises(SpecError, match="units"):
        feature_specs.get_spec(str(tmp_path / "shop.yaml"))
    output = tmp_path / "out" / "dataset"
    result = run_command(f"--spec={tmp_path / 'shop.yaml'}", f"--input_dir={raw}", f"--dataset_dir={output}")
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
    kept = tmp_path / "out" / "dataset.dead_letter.jsonl"
    assert f"The bad rows are in {kept}" in message
    found = sorted((row["row"], row["file"], row["reason"]) for row in map(json.loads, kept.read_text().splitlines()))
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


# --- A killed job ----------------------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "pipelines.build_dataset", *arguments]


def run_command(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def test_job_killed_half_way_leaves_no_directory_that_looks_finished(tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "out" / "dataset"
    simulate_feed(FeedConfig(num_rows=100_000, num_users=2000, num_items=500, seed=1), raw)
    arguments = ("--spec=simulated_feed", f"--input_dir={raw}", f"--dataset_dir={output}")
    with (tmp_path / "output.txt").open("w") as log:
        process = subprocess.Popen(command(*arguments), stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 100
            # Half-way: the join has written its files, and fitting and encoding are still to come.
            while not list(tmp_path.glob("out/.dataset.incomplete-*/joined/*.parquet")):
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


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------


NUM_RATINGS = 60


class FilmRatings(tfds.core.GeneratorBasedBuilder):
    """Ratings with the features of MovieLens that feature_specs/movielens_100k_tfds.yaml reads."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "user_id": tfds.features.Text(),
                    "movie_id": tfds.features.Text(),
                    "user_rating": tf.float32,
                    "timestamp": tf.int64,
                    "raw_user_age": tf.float32,
                    "user_gender": tf.bool,
                    "user_occupation_text": tfds.features.Text(),
                    "movie_genres": tfds.features.Sequence(tfds.features.ClassLabel(names=["drama", "comedy", "noir"])),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(NUM_RATINGS):
            yield k, rating(k)


def rating(k):
    """Rating k: users 0 to 5 of ages 10, 20, ..., 60, a minute apart in 1997; 1 to 5 stars in turn."""
    return {
        "user_id": str(k % 6),
        "movie_id": str(k % 4),
        "user_rating": 1.0 + k % 5,
        "timestamp": 880_000_000 + 60 * k,
        "raw_user_age": 10.0 * (1 + k % 6),
        "user_gender": k % 6 < 2,
        "user_occupation_text": ("artist", "writer")[k % 2],
        "movie_genres": [(), (0,), (1, 2), (2, 0)][k % 4],
    }


@pytest.fixture(scope="module")
def film_dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    tfds.builder("film_ratings", data_dir=path / "data").download_and_prepare()
    spec = override_source(feature_specs.get_spec("movielens_100k_tfds"), "tfds:film_ratings")
    return build(spec, path / "data", path / "dataset")


def test_tfds_source_gives_every_rating_once(film_dataset):
    rows = [record for split in SPLITS for record in records(film_dataset, split)]
    assert len({record["row_id"][0] for record in rows}) == NUM_RATINGS
    assert film_dataset.counts["tables"]["log"] == {"rows": 60, "bad": {}}
    # 60 ratings in time order: 48, 6 and 6. Labels: 4 or 5 of 1..5 stars in turn; 5 is intense.
    stars = [1 + k % 5 for k in range(NUM_RATINGS)]
    for split, part in (("train", stars[:48]), ("validation", stars[48:54]), ("test", stars[54:])):
        found = records(film_dataset, split)
        assert len(found) == len(part)
        assert sum(record["label"][0] for record in found) == sum(star >= 4 for star in part)
        assert sum(record["intensity_label"][0] for record in found) == sum(star == 5 for star in part)


def test_tfds_source_counts_age_groups(film_dataset):
    # Boundaries 18, 25, 35, 45, 50, 56; ages 10 to 60, 8 training ratings each.
    groups = film_dataset.counts["splits"]["train"]["groups"]["age_group"]
    rows = {label: entry["rows"] for label, entry in groups.items()}
    assert rows == {
        "unknown": 0,
        "<18": 8,  # 10
        "18-25": 8,  # 20
        "25-35": 8,  # 30
        "35-45": 8,  # 40
        "45-50": 0,
        "50-56": 8,  # 50
        ">=56": 8,  # 60
    }


def test_tfds_features_become_the_texts_of_their_values(film_dataset):
    assert sorted(vocabulary(film_dataset, "gender")) == ["false", "true"]
    assert sorted(vocabulary(film_dataset, "occupation")) == ["artist", "writer"]
    assert sorted(vocabulary(film_dataset, "genre")) == ["0", "1", "2"]
    known, films = vocabulary(film_dataset, "genre"), vocabulary(film_dataset, "item")
    genres = {"0": [], "1": ["0"], "2": ["1", "2"], "3": ["2", "0"]}
    for record in records(film_dataset, "train"):
        [film] = values_of(record["item"], films, 1)
        assert values_of(record["genre"], known, 1) == genres[film]


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


def test_more_shards_than_rows_fill_still_give_a_readable_dataset(feed_dir, tmp_path):
    config = BuildConfig(str(feed_dir), rows_per_shard=3)
    counts = build_dataset(feature_specs.get_spec("simulated_feed"), config, tmp_path / "out")
    dataset = DatasetDir(tmp_path / "out")
    for split in ("train", "validation", "test"):
        files = dataset.record_files(split)
        assert len(files) == -(-counts["splits"][split]["rows"] // 3)
        assert sum(1 for _ in tf.data.TFRecordDataset(files)) == counts["splits"][split]["rows"]


def test_a_mistyped_flag_is_refused():
    with pytest.raises(ValueError, match=r"unknown flags. Received: --max_bad_fractoin=0.5"):
        BuildConfig("raw", beam_arguments=("--direct_num_workers=2", "--max_bad_fractoin=0.5"))


def test_other_rows_give_another_fingerprint(feed_dir, feed_dataset, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(feed_dir, raw)
    lines = (raw / "log.csv").read_text().replace('"', "").splitlines()
    # Two training rows swap their devices: every count stays what it was.
    one = next(index for index in range(1, 400) if ",phone," in lines[index])
    two = next(index for index in range(1, 400) if ",desktop," in lines[index])
    lines[one] = lines[one].replace(",phone,", ",desktop,")
    lines[two] = lines[two].replace(",desktop,", ",phone,")
    (raw / "log.csv").write_text("\n".join(lines) + "\n")
    build_dataset(feature_specs.get_spec("simulated_feed"), BuildConfig(str(raw)), tmp_path / "out")
    assert DatasetDir(tmp_path / "out").fingerprint != feed_dataset.fingerprint
