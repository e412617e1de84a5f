"""Where a dataset comes from: ids that go on from another one, and the manifest; the two layouts of records."""

import datetime as dt
import hashlib

import numpy as np
import tensorflow as tf
from shop import T0, build, events, items, records, refused, users, vocabulary, write_shop

from clsd_tf.data.examples import packed_columns
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.spec.feature_spec import SpecError, parse_spec
from clsd_tf.storage.dataset_dir import SPLITS
from clsd_tf.storage.files import read_json

# --- A dataset that grows from another -------------------------------------------------------------------------------


def test_ids_keep_their_meaning_when_a_dataset_grows_from_another(shop_spec, shop_dataset, tmp_path):
    # Another day: item i3 is now the most frequent, and two items are new.
    rows = [{**row, "item_id": ("i3", "i3", "new-b", "new-a")[k % 4]} for k, row in enumerate(events())]
    raw = write_shop(tmp_path / "raw", rows, item_rows=[{"item_id": "i3", "tags": "z", "price": 1.0}])
    grown = build(shop_spec, raw, tmp_path / "dataset", grow_from=shop_dataset.path)
    before = vocabulary(shop_dataset, "item")
    assert vocabulary(grown, "item") == [*before, "new-a", "new-b"]
    ids = {record["item"][0] for record in records(grown, "train")}
    assert 1 + 2 + before.index("i3") in ids  # 2 out-of-vocabulary ids.
    assert read_json(grown.layout.manifest)["grown_from"] == shop_dataset.fingerprint
    assert vocabulary(grown, "item_tags") == [*vocabulary(shop_dataset, "item_tags"), "z"]


def test_numbers_keep_their_meaning_when_a_dataset_grows_from_another(shop_spec, shop_dataset, tmp_path):
    older = [{**row, "age": row["age"] + 40} for row in users()]
    dearer = [{**row, "price": 10 * row["price"]} for row in items()]
    raw = write_shop(tmp_path / "raw", user_rows=older, item_rows=dearer)
    before = shop_dataset.statistics.numeric
    grown = build(shop_spec, raw, tmp_path / "dataset", grow_from=shop_dataset.path)
    assert grown.statistics.numeric == before
    # Standardized log1p of the new prices by the old mean and deviation.
    prices = {np.log1p(np.float32(row["price"])) for row in dearer}
    expected = sorted((price - before["item_price"].mean) / before["item_price"].std for price in prices)
    found = np.unique(read_columns(grown, "train", ["item_price"])["item_price"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    anew = build(shop_spec, raw, tmp_path / "anew").statistics.numeric
    assert anew["user_age"].boundaries != before["user_age"].boundaries
    assert anew["item_price"].mean > before["item_price"].mean + 1


def test_growing_from_ids_of_another_meaning_is_refused(shop_content, shop_dir, shop_dataset, tmp_path):
    shop_content["features"][1]["vocabulary"] = {"num_oov_indices": 5}
    message = refused(parse_spec(shop_content, "shop"), shop_dir, tmp_path, SpecError, grow_from=shop_dataset.path)
    assert "item.vocabulary.num_oov_indices. Received: 5. Allowed: 2" in message


# --- Where it comes from ---------------------------------------------------------------------------------------------


def test_manifest_says_from_what_and_by_what_a_dataset_was_built(shop_dataset, shop_dir, shop_spec):
    manifest = read_json(shop_dataset.layout.manifest)
    assert manifest["dataset_fingerprint"] == shop_dataset.fingerprint
    assert manifest["grown_from"] is None
    assert manifest["spec"] == {"name": "shop", "fingerprint": shop_spec.fingerprint}
    expected = [
        {
            "table": role,
            "file": name,
            "bytes": (shop_dir / name).stat().st_size,
            "sha256": hashlib.sha256((shop_dir / name).read_bytes()).hexdigest(),
        }
        for role, name in (("item", "items.csv"), ("log", "log.csv"), ("user", "users.csv"))
    ]
    assert manifest["inputs"] == expected
    assert manifest["code"]["tensorflow"] == tf.__version__
    assert set(manifest["seconds"]) == {"ingest", "join and fit", "encode"}
    assert manifest["bad_rows"]["log"] == {"2_columns_instead_of_6": 1, "not_int64:clicked": 1}
    assert manifest["split"]["rule"] == "time"
    # 198 good rows, the 159th in time is event 160: 12 and 23 are bad.
    assert dt.datetime.fromisoformat(manifest["split"]["validation_from"]).timestamp() == T0 + 60 * 160
    times = [record["event_time"][0] for record in records(shop_dataset, "validation")]
    clicks = [record["label"][0] for record in records(shop_dataset, "validation")]
    found = manifest["splits"]["validation"]
    assert (found["rows"], found["click_rate"]) == (len(clicks), np.mean(clicks))
    assert dt.datetime.fromisoformat(found["first_event"]).timestamp() == min(times) / 1e6
    assert dt.datetime.fromisoformat(found["last_event"]).timestamp() == max(times) / 1e6


def test_named_records_hold_an_entry_per_name_and_the_same_values(shop_content, shop_dir, shop_dataset, tmp_path):
    shop_content["record_layout"] = "named"
    named = build(parse_spec(shop_content, "shop"), shop_dir, tmp_path / "dataset", rows_per_shard=30, compressed=True)
    [path, *_] = named.record_files("test")
    [serialized, *_] = tf.data.TFRecordDataset(path, "GZIP").as_numpy_iterator()
    assert {"item", "label", "row_id"} < set(tf.train.Example.FromString(serialized).features.feature)
    for split in SPLITS:
        names = [*packed_columns(named.inputs)[0], "label", "item_price"]
        for name, values in read_columns(named, split, names).items():
            assert values.tolist() == read_columns(shop_dataset, split, [name])[name].tolist(), name
