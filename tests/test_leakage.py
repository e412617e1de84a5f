"""No model input knows the future: a feed with planted signals, built by the real job, twice with another future."""

import csv
import datetime as dt

import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf
import yaml

from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir
from pipelines.beam.dataset import BuildConfig, build_dataset

_SPEC = """
name: leaky
tables:
  log:
    path: log.csv
    format: csv
    columns:
      - {name: user_id, type: string}
      - {name: item_id, type: string}
      - {name: impression, type: string}
      - {name: time, type: int64}
      - {name: clicked, type: int64}
      - {name: seconds, type: float}
  user_state:
    path: user_state.csv
    format: csv
    key: user_id
    valid_from: {column: mood_from, unit: microseconds}
    columns:
      - {name: user_id, type: string}
      - {name: mood_from, type: int64}
      - {name: mood, type: string}
  item:
    path: item.csv
    format: csv
    key: item_id
    valid_from: {column: rank_from, unit: microseconds}
    columns:
      - {name: item_id, type: string}
      - {name: rank_from, type: int64}
      - {name: rank, type: string}
user_key: user_id
item_key: item_id
event_time: {column: time, unit: microseconds}
label: clicked == 1
split: {rule: time, validation_from: 2024-01-13, test_from: 2024-01-16}
duplicates: keep_all  # Two impressions of one microsecond may be of one item.
record_layout: named
features:
  - {name: user, type: categorical, column: user_id}
  - {name: item, type: categorical, column: item_id}
  - {name: seen, type: categorical, column: impression, hash_buckets: 100000}
  - {name: user_mood, type: categorical, column: mood, hash_buckets: 100000}
  - {name: item_rank, type: categorical, column: rank, hash_buckets: 100000}
  - {name: recent, type: history, of: seen, max_length: 5}
  - {name: recent_ranks, type: history, of: item_rank, max_length: 5}
  - {name: liked, type: history, of: seen, where: clicked == 1, max_length: 5}
  - {name: session, type: history, of: seen, within_seconds: 172_800, max_length: 5}
  - {name: late, type: history, of: seen, delay_seconds: 86_400, max_length: 5}
  - {name: seen_before, type: window, aggregate: count}
  - {name: click_rate, type: window, aggregate: rate, where: clicked == 1, within_seconds: 604_800}
  - {name: mean_seconds, type: window, aggregate: mean, value: seconds}
  - {name: since_last, type: window, aggregate: seconds_since_last}
user_groups:
  - {name: mood_group, column: mood, values: [changed]}
"""
_SECOND = 1_000_000
_DAY = 86_400 * _SECOND
_START = int(dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc).timestamp()) * _SECOND
# The moment behind which the future is changed: within the test split, so that training rows stay as they are.
NOW = _START + 18 * _DAY


def feed():
    """Events and versions of profiles, as lists of dictionaries; each list has its future, seen from ``NOW``, last.

    Planted: after each event its label becomes the user's mood and the item's rank, from the next microsecond on. At
    ``NOW`` every user sees two items in the same microsecond; the second of them counts as future of the first.
    """
    random = np.random.default_rng(5)
    events, moods, ranks = [], {}, {}
    for user in range(30):
        times = [*random.integers(_START, _START + 20 * _DAY, 20).tolist(), NOW, NOW]
        for index, time in enumerate(sorted(times)):
            name, item, clicked = f"{user}-{index}", f"i{random.integers(12)}", int(random.random() < 0.4)
            twin = time == NOW and events[-1]["time"] == NOW
            events.append(
                {
                    "user_id": f"u{user}",
                    "item_id": item,
                    "impression": name,
                    "time": time,
                    "clicked": clicked,
                    "seconds": round(random.random() * 60, 3),
                    "is_future": time > NOW or twin,
                }
            )
            moods[f"u{user}", time + 1] = ranks[item, time + 1] = f"{name} clicked {clicked}"
            if index % 3 == 0:  # A version of the event's own microsecond, which the event does see.
                moods[f"u{user}", time] = ranks[item, time] = f"at {name}"
    tables = {
        "log": events,
        "user_state": [
            dict(zip(("user_id", "mood_from", "mood"), (*key, mood), strict=True)) for key, mood in moods.items()
        ],
        "item": [dict(zip(("item_id", "rank_from", "rank"), (*key, rank), strict=True)) for key, rank in ranks.items()],
    }
    return {name: sorted(rows, key=is_future) for name, rows in tables.items()}


def is_future(row):
    return row["is_future"] if "is_future" in row else row.get("mood_from", row.get("rank_from")) > NOW


def altered(row):
    """Another future: other labels, items, values and profiles, a little later."""
    if "impression" in row:
        later = row["time"] + (7 if row["time"] > NOW else 0)
        other = {"item_id": "i99", "impression": f"other {row['impression']}", "clicked": 1 - row["clicked"]}
        return {**row, **other, "time": later, "seconds": 1000.0}
    name, since = ("mood", "mood_from") if "mood" in row else ("rank", "rank_from")
    return {**row, name: "changed", since: row[since] + 7}


def build(tables, directory):
    directory.mkdir()
    for name, rows in tables.items():
        with open(directory / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    spec = parse_spec(yaml.safe_load(_SPEC), "leaky")
    build_dataset(spec, BuildConfig(input_dir=str(directory)), directory / "dataset")
    return DatasetDir(directory / "dataset")


@pytest.fixture(scope="module")
def tables():
    return feed()


@pytest.fixture(scope="module")
def dataset(tables, tmp_path_factory):
    return build(tables, tmp_path_factory.mktemp("leakage") / "feed")


def records(dataset):
    """Row of log.csv, counted from 0 -> the bytes of its record."""
    found = {}
    for split in SPLITS:
        for path in dataset.record_files(split):
            for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
                row_id = tf.train.Example.FromString(record).features.feature["row_id"].int64_list.value[0]
                found[row_id - 2] = record  # The header is line 1.
    return found


def serving_sample(dataset):
    """Row of log.csv -> the raw inputs of a request, for every test row."""
    rows = pyarrow.parquet.read_table(dataset.path / "serving_sample.parquet").to_pylist()
    return {row.pop("row_id") - 2: row for row in rows}


def fitted(dataset):
    """What was learnt from data, file by file."""
    files = [*dataset.path.glob("vocabularies/*"), dataset.path / "statistics.json"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("future", ["altered", "removed"])
def test_no_record_changes_with_its_future(future, tables, dataset, tmp_path):
    kept = {name: [row for row in rows if not is_future(row)] for name, rows in tables.items()}
    changed = {
        name: kept[name] + [altered(row) for row in rows[len(kept[name]) :] if future == "altered"]
        for name, rows in tables.items()
    }
    other = build(changed, tmp_path / "feed")
    assert fitted(other) == fitted(dataset)  # On training rows alone.
    before, after = records(dataset), records(other)
    past = range(len(kept["log"]))
    assert len(past) > 500
    assert [row for row in past if before[row] != after[row]] == []
    sample, other_sample = serving_sample(dataset), serving_sample(other)
    in_sample = [row for row in past if row in sample]
    assert len(in_sample) > 60
    assert [row for row in in_sample if sample[row] != other_sample[row]] == []
    if future == "altered":  # Where the past ends, the change must show.
        assert all(before[row] != after[row] for row in range(len(past), len(tables["log"])))


def known(event, tables):
    """What may be known of an event, by a loop over all rows."""
    past = [row for row in tables["log"] if row["user_id"] == event["user_id"] and row["time"] < event["time"]]
    past.sort(key=lambda row: row["time"])  # Stable: ties stay in the order of the file.
    age = {row["impression"]: (event["time"] - row["time"]) / _SECOND for row in past}
    week = [row for row in past if age[row["impression"]] <= 604_800]

    def names(rows):
        return [row["impression"] for row in rows][-5:]

    def rank(row):
        return latest(tables["item"], "item_id", "rank", row)

    return {
        "mood": latest(tables["user_state"], "user_id", "mood", event),
        "rank": rank(event),
        "recent": names(past),
        "recent_ranks": [name for row in past if (name := rank(row)) is not None][-5:],
        "liked": names(row for row in past if row["clicked"]),
        "session": names(row for row in past if age[row["impression"]] <= 172_800),
        "late": names(row for row in past if age[row["impression"]] > 86_400),
        "seen_before": len(past),
        "click_rate": np.mean([row["clicked"] for row in week]) if week else None,
        "mean_seconds": np.mean([row["seconds"] for row in past]) if past else None,
        "since_last": min(age.values(), default=None),
    }


def latest(versions, key, value, event):
    rows = [row for row in versions if row[key] == event[key] and row[f"{value}_from"] <= event["time"]]
    return max(rows, key=lambda row: row[f"{value}_from"])[value] if rows else None


def test_every_request_of_the_test_split_holds_what_was_known_and_no_more(tables, dataset):
    sample = serving_sample(dataset)
    assert len(sample) > 100
    for row, raw in sample.items():
        for name, value in known(tables["log"][row], tables).items():
            expected = pytest.approx(value) if isinstance(value, float) else value
            assert raw[name] == expected, (tables["log"][row]["impression"], name)


def test_histories_reach_over_the_border_of_the_split(tables, dataset):
    train_ends = _START + 12 * _DAY
    in_training = {row["impression"] for row in tables["log"] if row["time"] < train_ends}
    assert any(set(raw["recent"]) & in_training for raw in serving_sample(dataset).values())
