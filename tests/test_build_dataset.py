"""Real Beam runs: what a dataset holds, and that nothing looks ahead."""

import csv
import datetime as dt
import json
import math
import pathlib
import shutil
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf
from shop import (
    T0,
    build,
    events,
    inspected,
    items,
    lines_of,
    lines_of_vocabulary,
    records,
    records_of_file,
    users,
    values_of,
    vocabulary,
    write_shop,
)

import feature_specs
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir
from clsd_tf.storage.files import read_json
from feature_specs.overrides import override_split_rule
from pipelines.beam.dataset import BuildConfig, build_dataset

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
    columns = read_json(shop_dataset.layout.manifest)["records"]
    for path in shop_dataset.record_files("train"):
        rows = [record["row_id"][0] for record in records_of_file(path, columns, "GZIP")]
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
        "data_statistics.json",
        "dead_letter.parquet",
        "feature_spec.json",
        "manifest.json",
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
    assert dataset.counts["accounting"] == {
        "read": 200,
        "written": 178,
        "dead_lettered": 2,
        "duplicates_dropped": 0,
        "left_out": 20,
    }
    sample = pa.parquet.read_table(dataset.layout.serving_sample)
    assert sample.column("row_id").to_pylist() == list(range(142, 182))


def test_more_shards_than_rows_fill_still_give_a_readable_dataset(feed_dir, tmp_path):
    config = BuildConfig(str(feed_dir), rows_per_shard=40)
    counts = build_dataset(feature_specs.get_spec("simulated_feed"), config, tmp_path / "out")
    dataset = DatasetDir(tmp_path / "out")
    for split in ("train", "validation", "test"):
        files = dataset.record_files(split)
        assert len(files) == counts["splits"][split]["rows"] // 40
        assert sum(1 for _ in tf.data.TFRecordDataset(files)) == counts["splits"][split]["rows"]


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


# --- Bad input that the job survives ---------------------------------------------------------------------------------


def test_bad_rows_below_the_limit_are_counted_and_written_with_their_lines(shop_dataset):
    # 2 of 200 is the limit of 1 % itself.
    assert shop_dataset.counts["tables"]["log"] == {
        "rows": 200,
        "bad": {"2_columns_instead_of_6": 1, "not_int64:clicked": 1},
    }
    dead = pa.parquet.read_table(shop_dataset.layout.dead_letter).to_pylist()
    found = sorted((row["table"], row["file"], row["row"], row["reason"]) for row in dead)
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
