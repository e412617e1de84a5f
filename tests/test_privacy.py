"""Sensitive columns and user ids: nothing that a build writes or prints holds their values."""

import pyarrow.parquet
import pytest
from shop import build, events, inspected, items, refused, users, vocabulary, write_shop

from clsd_tf.data.hashing import hash_user_ids
from clsd_tf.spec.feature_spec import SpecError, parse_spec
from clsd_tf.storage.dataset_dir import SPLITS

MARK = "secret-"
SALT = "0123456789abcdef-of-the-tests"


def marked(rows):
    return [{**row, "user_id": MARK + row["user_id"]} for row in rows]


@pytest.fixture
def raw(tmp_path):
    """The shop, every user id with a mark; lines 14, 25 and 36 are bad, each in another way."""
    log = marked(events())
    log[12] = f"{MARK}u2,i5"
    log[23]["clicked"] = "maybe"
    log[34]["time"] = 12
    return write_shop(tmp_path / "raw", log, user_rows=marked(users()))


def everything_written(directory):
    """Text of all files below a directory; Parquet is decompressed."""
    texts = []
    for path in directory.rglob("*"):
        if path.suffix == ".parquet":
            texts.append(str(pyarrow.parquet.read_table(path).to_pylist()))
        elif path.is_file():
            texts.append(path.read_bytes().decode(errors="replace"))
    return texts


def sensitive_items(content):
    for table in ("log", "item"):
        [column] = [entry for entry in content["tables"][table]["columns"] if entry["name"] == "item_id"]
        column["sensitive"] = True
    content["features"] = [
        feature for feature in content["features"] if feature["name"] not in ("item", "recent_items")
    ]
    return content


def test_values_of_a_sensitive_column_are_in_no_file_and_in_no_output(shop_content, tmp_path, capfd):
    log = [{**row, "item_id": MARK + row["item_id"]} for row in events()]
    log[12] = f"u2,{MARK}i5"
    log[23]["clicked"] = "maybe"
    log[34]["time"] = 12
    raw = write_shop(tmp_path / "raw", log, item_rows=[{**row, "item_id": MARK + row["item_id"]} for row in items()])
    # What the search below would find, if it were there: the same shop with nothing sensitive.
    open_dataset = build(parse_spec(shop_content, "shop"), raw, tmp_path / "open", max_bad_fraction=0.02)
    assert any(MARK in text for text in everything_written(open_dataset.path))
    capfd.readouterr()
    spec = parse_spec(sensitive_items(shop_content), "shop")
    dataset = build(spec, raw, tmp_path / "dataset", max_bad_fraction=0.02)
    assert not [text for text in everything_written(dataset.path) if MARK in text]
    assert MARK not in "".join(capfd.readouterr())
    dead = pyarrow.parquet.read_table(dataset.layout.dead_letter).to_pylist()
    assert [row["row"] for row in dead] == [14, 25, 36]
    assert "<withheld>" in dead[0]["raw"]
    assert "item_profile_missing" not in dataset.counts  # Rows of the log still find their items.


@pytest.mark.parametrize(
    ("changes", "use"),
    [
        ({}, "'time' as event_time"),
        ({"sample_weight": "weight"}, "'weight' as sample_weight"),
        ({"intensity_value": "seconds", "intensity_label": None}, "'seconds' as intensity_value"),
        (
            {"features": [{"name": "w", "type": "window", "aggregate": "mean", "value": "seconds"}]},
            "'seconds' as w.value",
        ),
        (
            {"features": [{"name": "w", "type": "window", "aggregate": "rate", "where": "weight > 1"}]},
            "'weight' as w.where",
        ),
    ],
)
def test_no_way_leads_from_a_sensitive_column_into_a_dataset(shop_content, changes, use):
    shop_content["sample_weight"] = None
    for column in shop_content["tables"]["log"]["columns"]:
        column["sensitive"] = column["name"] in (("seconds", "weight") if changes else ("time",))
    content = {**shop_content, **changes}
    content["features"] = [*shop_content["features"], *changes.get("features", [])]
    with pytest.raises(SpecError, match=f"a sensitive column cannot be in a dataset. Received: {use}"):
        parse_spec(content, "shop")


def test_past_events_may_be_chosen_by_a_sensitive_label(shop_content):
    for column in shop_content["tables"]["log"]["columns"]:
        column["sensitive"] = column["name"] == "clicked"
    shop_content["features"].append({"name": "w", "type": "window", "aggregate": "rate", "where": "clicked == 1"})
    assert parse_spec(shop_content, "shop").sensitive_columns == {"clicked"}


def test_a_sensitive_user_key_needs_a_salt(shop_content):
    for table in ("log", "user"):
        shop_content["tables"][table]["columns"][0]["sensitive"] = True
    shop_content["features"] = shop_content["features"][1:]  # The first is the user id.
    with pytest.raises(SpecError, match="a sensitive user_key needs user_id_salt_env"):
        parse_spec(shop_content, "shop")
    shop_content["user_id_salt_env"] = "SHOP_SALT"
    assert parse_spec(shop_content, "shop").sensitive_columns == {"user_id"}


def test_salted_user_ids_stand_for_the_same_users_and_the_ids_are_nowhere(shop_content, raw, tmp_path, monkeypatch):
    shop_content["features"][0] = {"name": "user", "type": "categorical", "column": "user_id"}
    shop_content["user_id_salt_env"] = "SHOP_SALT"
    monkeypatch.setenv("SHOP_SALT", SALT)
    dataset = build(parse_spec(shop_content, "shop"), raw, tmp_path / "dataset", max_bad_fraction=0.02)
    written = everything_written(dataset.path)
    assert not [text for text in written if MARK in text or SALT in text]
    ids = [f"{MARK}u{k}" for k in range(10)]
    assert set(vocabulary(dataset, "user")) == set(hash_user_ids(pyarrow.array(ids), SALT.encode()).to_pylist())
    groups = dataset.counts["splits"]["train"]["groups"]["city_group"]
    assert groups["unknown"]["rows"] == 0
    assert sum(dataset.num_rows(split) for split in SPLITS) == 197
    # Another salt would make every id a new one; no salt would write the ids themselves.
    monkeypatch.setenv("SHOP_SALT", SALT[::-1])
    message = refused(parse_spec(shop_content, "shop"), raw, tmp_path, SpecError, grow_from=dataset.path)
    assert "a dataset that grows from another hashes user ids as it does" in message
    assert SALT not in message
    del shop_content["user_id_salt_env"]
    message = refused(parse_spec(shop_content, "shop"), raw, tmp_path, SpecError, grow_from=dataset.path)
    assert "Received: ids as they are in shop" in message


def test_a_build_without_its_salt_is_refused_before_anything_is_read(shop_content, raw, tmp_path, monkeypatch):
    shop_content["user_id_salt_env"] = "SHOP_SALT"
    monkeypatch.delenv("SHOP_SALT", raising=False)
    with pytest.raises(ValueError, match="the environment variable SHOP_SALT must hold the salt of user ids"):
        inspected(parse_spec(shop_content, "shop"), raw, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
