"""Checks of rows: every reason by which a row is bad, and that good rows get their types."""

import datetime as dt
import hashlib
import hmac
import json

import numpy as np
import pyarrow as pa
import pytest

from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.validation import SpecError
from pipelines.rows.checks import parse_rows, user_id_salt
from pipelines.sources import ROW_ID, BadRow, RawBatch, SourceFile

T0 = 1_700_000_000  # 2023-11-14T22:13:20Z
LOG = {"user_id": "u1", "item_id": "i1", "time": str(T0), "clicked": "1", "seconds": "2.5", "weight": "1"}
USER = {"user_id": "u1", "age": "30", "city": "Rome"}
ITEM = {"item_id": "i1", "tags": "a|b", "price": "2.5"}
DEFAULTS = {"log": LOG, "user": USER, "item": ITEM}


def raw_batch(role, rows, bad_rows=(), types=None):
    """A batch of text rows, as a reader gives it; row numbers count from 2, like the lines of a CSV file."""
    rows = [{**DEFAULTS[role], **row} for row in rows]
    columns = {
        name: pa.array([row[name] for row in rows], (types or {}).get(name, pa.string())) for name in DEFAULTS[role]
    }
    file = SourceFile(role, 0, f"raw/{role}.csv")
    columns[ROW_ID] = pa.array(file.row_ids(np.arange(2, 2 + len(rows))), pa.int64())
    return RawBatch(file, pa.table(columns), list(bad_rows))


# --- parse_rows ------------------------------------------------------------------------------------------------------


def test_good_rows_get_the_declared_types(shop_spec):
    good, bad = parse_rows(raw_batch("log", [{}, {"seconds": "1e2", "clicked": "-3"}]), shop_spec)
    assert bad == []
    assert good.schema.names == ["user_id", "item_id", "time", "clicked", "seconds", "weight", ROW_ID]
    assert good.to_pylist() == [
        {"user_id": "u1", "item_id": "i1", "time": T0, "clicked": 1, "seconds": 2.5, "weight": 1.0, ROW_ID: 2},
        {"user_id": "u1", "item_id": "i1", "time": T0, "clicked": -3, "seconds": 100.0, "weight": 1.0, ROW_ID: 3},
    ]


OUTSIDE = "event_time_outside_2020-01-01_to_2030-01-01_in_seconds"


@pytest.mark.parametrize(
    ("role", "row", "reason"),
    [
        ("log", {"user_id": ""}, "missing:user_id"),
        ("log", {"user_id": None}, "missing:user_id"),
        ("log", {"item_id": ""}, "missing:item_id"),
        ("log", {"time": ""}, "missing:time"),
        ("log", {"clicked": ""}, "missing:clicked"),
        ("log", {"seconds": ""}, "missing:seconds"),
        ("log", {"weight": ""}, "missing:weight"),
        ("log", {"clicked": "yes"}, "not_int64:clicked"),
        ("log", {"clicked": "1.0"}, "not_int64:clicked"),
        ("log", {"clicked": " 1"}, "not_int64:clicked"),
        ("log", {"clicked": "1\n"}, "not_int64:clicked"),
        ("log", {"clicked": "9" * 19}, "not_int64:clicked"),  # Would overflow.
        ("log", {"seconds": "2,5"}, "not_float:seconds"),
        ("log", {"seconds": "nan"}, "not_float:seconds"),
        ("log", {"seconds": "inf"}, "not_float:seconds"),
        ("log", {"seconds": "1e999"}, "not_float:seconds"),  # More than a double holds.
        ("log", {"seconds": "."}, "not_float:seconds"),
        ("log", {"seconds": "0x10"}, "not_float:seconds"),
        ("log", {"weight": "-0.5"}, "negative:weight"),
        ("log", {"time": str(T0 * 1000)}, OUTSIDE),  # Milliseconds instead of seconds.
        ("log", {"time": str(T0 * 1_000_000)}, OUTSIDE),
        ("log", {"time": "17" + "0" * 16}, OUTSIDE),
        ("log", {"time": "0"}, OUTSIDE),
        ("log", {"time": "-5"}, OUTSIDE),
        ("user", {"user_id": ""}, "missing:user_id"),
        ("user", {"age": "thirty"}, "not_int64:age"),
        ("item", {"item_id": ""}, "missing:item_id"),
        ("item", {"price": "-1"}, "negative:price"),  # log1p of it would be wrong.
        ("item", {"price": "cheap"}, "not_float:price"),
    ],
)
def test_bad_row_is_taken_out_with_its_reason_and_place(shop_spec, role, row, reason):
    good, bad = parse_rows(raw_batch(role, [{}, row, {}]), shop_spec)
    assert [(entry.role, entry.file, entry.row, entry.reason) for entry in bad] == [(role, f"{role}.csv", 3, reason)]
    assert json.loads(bad[0].raw) == {**DEFAULTS[role], **row}
    assert good.column(ROW_ID).to_pylist() == [2, 4]


@pytest.mark.parametrize(("text", "value"), [("+5", 5), ("007", 7), ("-0", 0), ("9" * 18, 10**18 - 1)])
def test_every_accepted_spelling_of_an_integer_is_converted(shop_spec, text, value):
    good, bad = parse_rows(raw_batch("log", [{"clicked": text}]), shop_spec)
    assert bad == []
    assert good.column("clicked").to_pylist() == [value]


@pytest.mark.parametrize(
    ("text", "value"), [("+1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("1E3", 1000.0), ("2e-3", 0.002), ("7", 7.0)]
)
def test_every_accepted_spelling_of_a_float_is_converted(shop_spec, text, value):
    good, bad = parse_rows(raw_batch("log", [{"seconds": text}]), shop_spec)
    assert bad == []
    assert good.column("seconds").to_pylist() == [value]


def test_invalid_utf8_is_a_bad_row_and_its_neighbours_are_kept(shop_spec):
    values = [b"Rome", b"\xff\xfe", "Besançon".encode(), None]
    batch = raw_batch("user", [{"city": value} for value in values], types={"city": pa.binary()})
    good, bad = parse_rows(batch, shop_spec)
    assert [(entry.row, entry.reason) for entry in bad] == [(3, "invalid_utf8:city")]
    assert "\\xff\\xfe" in json.loads(bad[0].raw)["city"]
    assert good.column("city").to_pylist() == ["Rome", "Besançon", None]


def test_invalid_utf8_in_a_key_is_called_invalid_and_not_missing(shop_spec):
    batch = raw_batch("log", [{"user_id": b"\xff"}, {"user_id": b"u1"}], types={"user_id": pa.binary()})
    _, bad = parse_rows(batch, shop_spec)
    assert [entry.reason for entry in bad] == ["invalid_utf8:user_id"]


def test_empty_values_of_features_are_missing_and_not_bad(shop_spec):
    good, bad = parse_rows(raw_batch("item", [{"tags": "", "price": ""}, {"tags": None, "price": None}]), shop_spec)
    assert bad == []
    assert good.column("tags").to_pylist() == [None, None]
    assert good.column("price").to_pylist() == [None, None]


def test_a_row_with_two_faults_is_one_bad_row(shop_spec):
    good, bad = parse_rows(raw_batch("log", [{"clicked": "x", "user_id": ""}]), shop_spec)
    assert good.num_rows == 0
    assert [entry.reason for entry in bad] == ["missing:user_id"]


def test_event_time_range_includes_earliest_and_excludes_latest(shop_spec):
    earliest, latest = 1_577_836_800, 1_893_456_000  # 2020-01-01 and 2030-01-01 UTC.
    times = [earliest - 1, earliest, latest - 1, latest]
    good, bad = parse_rows(raw_batch("log", [{"time": str(time)} for time in times]), shop_spec)
    assert good.column("time").to_pylist() == [earliest, latest - 1]
    assert [entry.row for entry in bad] == [2, 5]


@pytest.mark.parametrize(("unit", "factor"), [("milliseconds", 1000), ("microseconds", 1_000_000)])
def test_event_time_range_is_checked_in_the_declared_unit(shop_content, unit, factor):
    shop_content["event_time"]["unit"] = unit
    spec = parse_spec(shop_content, "shop")
    good, bad = parse_rows(raw_batch("log", [{"time": str(T0 * factor)}, {"time": str(T0)}]), spec)
    assert good.column("time").to_pylist() == [T0 * factor]
    assert [entry.reason for entry in bad] == [f"event_time_outside_2020-01-01_to_2030-01-01_in_{unit}"]


def test_columns_without_rule_may_be_negative(shop_spec):
    good, bad = parse_rows(raw_batch("user", [{"age": "-1"}]), shop_spec)
    assert bad == []
    assert good.column("age").to_pylist() == [-1]


def test_bad_rows_of_the_reader_are_kept(shop_spec):
    unreadable = BadRow("log", "log.csv", 9, "3_columns_instead_of_6", "a,b,c")
    _, bad = parse_rows(raw_batch("log", [{"clicked": "x"}], [unreadable]), shop_spec)
    assert sorted(entry.row for entry in bad) == [2, 9]


def test_batch_without_rows_gives_a_typed_table_without_rows(shop_spec):
    good, bad = parse_rows(raw_batch("log", []), shop_spec)
    assert (good.num_rows, bad) == (0, [])
    assert good.schema.field("time").type == pa.int64()


def test_typed_columns_pass_the_same_checks_as_text(shop_spec):
    types = {"time": pa.int64(), "clicked": pa.bool_(), "seconds": pa.float64(), "weight": pa.float32()}
    rows = [
        {"time": T0, "clicked": True, "seconds": 3.0, "weight": 0.5},
        {"time": T0, "clicked": None, "seconds": 3.0, "weight": 0.5},
        {"time": 5, "clicked": True, "seconds": 3.0, "weight": 0.5},
        {"time": T0, "clicked": True, "seconds": float("nan"), "weight": 0.5},
    ]
    _, bad = parse_rows(raw_batch("log", rows, types=types), shop_spec)
    reasons = {entry.row: entry.reason for entry in bad}
    # Row 2: a Boolean is the text true, which is no int64; the others are refused for their own fault.
    assert reasons == {2: "not_int64:clicked", 3: "missing:clicked", 4: OUTSIDE, 5: "not_int64:clicked"}


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_bad_row_of_a_timestamp_column_is_written_and_not_fatal(shop_content, unit):
    # As Parquet has it: the declared unit is that of the column.
    shop_content["event_time"]["unit"] = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}[unit]
    spec = parse_spec(shop_content, "shop")
    moments = [dt.datetime(2024, 1, 2), dt.datetime(1975, 1, 2)]
    batch = raw_batch("log", [{"time": moment} for moment in moments], types={"time": pa.timestamp(unit)})
    good, bad = parse_rows(batch, spec)
    # 2024-01-02 is 1,704,153,600 s after 1970.
    assert good.column("time").to_pylist() == [1_704_153_600 * {"s": 1, "ms": 1000, "us": 1_000_000}[unit]]
    assert [entry.row for entry in bad] == [3]
    assert "1975" in bad[0].raw


def test_list_column_is_joined_like_that_of_other_formats(shop_spec):
    rows = [{"tags": ["a", "b"]}, {"tags": []}, {"tags": None}]
    batch = raw_batch("item", rows, types={"tags": pa.list_(pa.string())})
    good, bad = parse_rows(batch, shop_spec)
    assert bad == []
    assert good.column("tags").to_pylist() == ["a|b", None, None]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.large_binary()])
def test_other_text_types_of_parquet_are_read_as_text(shop_spec, kind):
    value = b"Rome" if pa.types.is_large_binary(kind) else "Rome"
    good, bad = parse_rows(raw_batch("user", [{"city": value}, {"city": None}], types={"city": kind}), shop_spec)
    assert bad == []
    assert good.column("city").to_pylist() == ["Rome", None]


def test_invalid_utf8_of_large_binary_is_a_bad_row(shop_spec):
    batch = raw_batch("user", [{"city": b"\xff"}, {"city": b"Rome"}], types={"city": pa.large_binary()})
    _, bad = parse_rows(batch, shop_spec)
    assert [entry.reason for entry in bad] == ["invalid_utf8:city"]


def test_bad_row_as_json_names_file_line_and_reason():
    row = BadRow("log", "log.csv", 17, "missing:user_id", "{}")
    expected = {"role": "log", "file": "log.csv", "row": 17, "reason": "missing:user_id", "raw": "{}", "lines": 1}
    assert json.loads(row.to_json()) == expected


def test_an_event_without_an_intensity_value_is_no_bad_row(shop_content):
    shop_content["intensity_value"] = "seconds"
    del shop_content["intensity_label"]
    good, bad = parse_rows(raw_batch("log", [{"seconds": ""}]), parse_spec(shop_content, "shop"))
    assert (good.num_rows, bad) == (1, [])


@pytest.mark.parametrize(("file_format", "lines"), [("csv", 3), ("jsonl", 1), ("parquet", 1)])
def test_line_ends_within_a_value_are_lines_of_a_csv_file_alone(shop_content, file_format, lines):
    shop_content["tables"]["log"]["format"] = file_format
    spec = parse_spec(shop_content, "shop")
    _, bad = parse_rows(raw_batch("log", [{"item_id": "a\nb\n", "clicked": "x"}, {"clicked": "y"}]), spec)
    assert [row.lines for row in bad] == [lines, 1]


# --- What must not be seen -------------------------------------------------------------------------------------------

SALT = b"a salt of 16 or more bytes"


def declare_sensitive(content, role, name):
    [column] = [column for column in content["tables"][role]["columns"] if column["name"] == name]
    column["sensitive"] = True


def drop_features(content, *names):
    content["features"] = [entry for entry in content["features"] if entry["name"] not in names]


def test_raw_values_of_a_sensitive_column_are_withheld(shop_content):
    declare_sensitive(shop_content, "log", "user_id")
    shop_content["user_id_salt_env"] = "SHOP_SALT"
    drop_features(shop_content, "user")
    spec = parse_spec(shop_content, "shop")
    reader = BadRow("log", "log.csv", 9, "3_columns_instead_of_6", "secret-user,b,c")
    good, bad = parse_rows(raw_batch("log", [{"user_id": "secret-user", "clicked": "x"}, {}], [reader]), spec)
    assert good.num_rows == 1
    assert [(row.row, row.reason) for row in bad] == [(9, "3_columns_instead_of_6"), (2, "not_int64:clicked")]
    assert bad[0].raw == "<withheld>"
    assert json.loads(bad[1].raw) == {**LOG, "user_id": "<withheld>", "clicked": "x"}


def test_tables_without_sensitive_columns_show_their_raw_values(shop_content):
    declare_sensitive(shop_content, "log", "user_id")
    shop_content["user_id_salt_env"] = "SHOP_SALT"
    drop_features(shop_content, "user")
    reader = BadRow("item", "items.csv", 9, "1_columns_instead_of_3", "i1")
    _, bad = parse_rows(raw_batch("item", [{"price": "x"}], [reader]), parse_spec(shop_content, "shop"))
    assert bad[0].raw == "i1"
    assert json.loads(bad[1].raw)["item_id"] == "i1"


@pytest.mark.parametrize(("role", "name", "use"), [("user", "city", "user_city"), ("log", "user_id", "user")])
def test_no_feature_may_use_a_sensitive_column(shop_content, role, name, use):
    declare_sensitive(shop_content, role, name)
    shop_content["features"] = [entry for entry in shop_content["features"] if entry["name"] in (use, "item")]
    shop_content["user_groups"] = []
    with pytest.raises(SpecError, match=rf"a sensitive column cannot be a model input\. Received: '{name}' in '{use}'"):
        parse_spec(shop_content, "shop")


def test_no_user_group_may_use_a_sensitive_column(shop_content):
    declare_sensitive(shop_content, "user", "age")
    drop_features(shop_content, "user_age")
    with pytest.raises(SpecError, match=r"a sensitive column cannot be a model input\. Received: 'age' in 'age_group'"):
        parse_spec(shop_content, "shop")


@pytest.mark.parametrize(("role", "name"), [("log", "item_id"), ("log", "clicked")])
def test_what_is_no_model_input_may_be_sensitive(shop_content, role, name):
    declare_sensitive(shop_content, role, name)
    drop_features(shop_content, "item", "recent_items")
    assert parse_spec(shop_content, "shop").sensitive_columns == {name}


def by_hand(user_id):
    return hmac.new(SALT, user_id.encode(), hashlib.sha256).hexdigest()[:16]


@pytest.mark.parametrize("role", ["log", "user"])
def test_user_ids_become_salted_hashes_and_nothing_else_changes(shop_spec, role):
    users = ["Zoë", "u1", "Zoë", ""]
    batch = raw_batch(role, [{"user_id": user} for user in users])
    good, bad = parse_rows(batch, shop_spec, SALT)
    assert good.column("user_id").to_pylist() == [by_hand("Zoë"), by_hand("u1"), by_hand("Zoë")]
    plain, _ = parse_rows(batch, shop_spec)
    assert good.drop_columns("user_id").equals(plain.drop_columns("user_id"))
    assert [json.loads(row.raw)["user_id"] for row in bad] == ["<withheld>"]


def test_items_have_no_user_to_hash(shop_spec):
    batch = raw_batch("item", [{}])
    assert parse_rows(batch, shop_spec, SALT)[0].equals(parse_rows(batch, shop_spec)[0])


def test_the_salt_comes_from_the_environment_and_must_be_long(shop_content, monkeypatch):
    assert user_id_salt(parse_spec(shop_content, "shop")) is None
    shop_content["user_id_salt_env"] = "FEED_SALT"
    spec = parse_spec(shop_content, "shop")
    monkeypatch.delenv("FEED_SALT", raising=False)
    with pytest.raises(ValueError, match=r"FEED_SALT must hold the salt of user ids\. Received: 0 characters"):
        user_id_salt(spec)
    monkeypatch.setenv("FEED_SALT", "fifteen letters")
    with pytest.raises(ValueError, match=r"Received: 15 characters\. Allowed: at least 16") as caught:
        user_id_salt(spec)
    assert "fifteen" not in str(caught.value)
    monkeypatch.setenv("FEED_SALT", "sixteen letters!")
    assert user_id_salt(spec) == b"sixteen letters!"


def test_only_text_can_be_hashed(shop_content):
    shop_content["user_id_salt_env"] = "FEED_SALT"
    for role in ("log", "user"):
        shop_content["tables"][role]["columns"][0]["type"] = "int64"
    with pytest.raises(SpecError, match=r"a hashed user_key must be a string\. Received: user_id: int64"):
        parse_spec(shop_content, "shop")


def test_numbers_that_are_infinite_for_a_model_are_bad_rows(shop_spec):
    rows = [{"seconds": "3.4e38"}, {"seconds": "3.5e38"}, {"seconds": "1e300"}, {"seconds": "-1e39"}]
    good, bad = parse_rows(raw_batch("log", rows), shop_spec)
    assert good.column("seconds").to_pylist() == [3.4e38]
    assert [row.reason for row in bad] == ["not_float:seconds"] * 3


def test_weights_are_at_most_a_million(shop_spec):
    good, bad = parse_rows(raw_batch("log", [{"weight": "1000000"}, {"weight": "1000001"}]), shop_spec)
    assert good.column("weight").to_pylist() == [1e6]
    assert [row.reason for row in bad] == ["above_1e+06:weight"]
