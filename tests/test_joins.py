"""Joins: labels, profiles, histories that never look ahead."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from clsd_tf.data.hashing import hash_keys
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.tables import Comparison, EventTime
from clsd_tf.spec.validation import SpecError
from pipelines.rows.checks import parse_rows
from pipelines.rows.joins import EVENT_TIME, USER_HASH, Profiles, evaluate_comparison, join_rows, microseconds
from pipelines.sources import ROW_ID, RawBatch, SourceFile

T0 = 1_700_000_000  # 2023-11-14T22:13:20Z
LOG = {"user_id": "u1", "item_id": "i1", "time": str(T0), "clicked": "1", "seconds": "2.5", "weight": "1"}
USER = {"user_id": "u1", "age": "30", "city": "Rome"}
ITEM = {"item_id": "i1", "tags": "a|b", "price": "2.5"}
DEFAULTS = {"log": LOG, "user": USER, "item": ITEM}


def events_table(rows):
    """Parsed log rows from (user, item, seconds after T0)."""
    return pa.table(
        {
            "user_id": [user for user, _, _ in rows],
            "item_id": pa.array([item for _, item, _ in rows], pa.string()),
            "time": pa.array([T0 + time for _, _, time in rows], pa.int64()),
            "clicked": pa.array([row % 2 for row in range(len(rows))], pa.int64()),
            "seconds": pa.array([10.0 * row for row in range(len(rows))], pa.float64()),
            "weight": pa.array([1.0 + row for row in range(len(rows))], pa.float64()),
            ROW_ID: pa.array(range(len(rows)), pa.int64()),
        }
    )


def users_table(rows):
    return pa.table(
        {
            "user_id": [row[0] for row in rows],
            "age": pa.array([row[1] for row in rows], pa.int64()),
            "city": pa.array([row[2] for row in rows], pa.string()),
            ROW_ID: pa.array(range(2, 2 + len(rows)), pa.int64()),
        }
    )


def items_table(rows):
    return pa.table(
        {
            "item_id": [row[0] for row in rows],
            "tags": pa.array([row[1] for row in rows], pa.string()),
            "price": pa.array([row[2] for row in rows], pa.float64()),
            ROW_ID: pa.array(range(2, 2 + len(rows)), pa.int64()),
        }
    )


# --- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "expected"),
    [(">=", [0, 1, 1]), ("<=", [1, 1, 0]), ("==", [0, 1, 0]), ("!=", [1, 0, 1]), (">", [0, 0, 1]), ("<", [1, 0, 0])],
)
def test_comparison_gives_float_zeros_and_ones(operator, expected):
    result = evaluate_comparison(Comparison("rating", operator, 4.0), pa.table({"rating": [3, 4, 5]}))
    assert result.dtype == np.float32
    assert result.tolist() == expected


def test_large_integers_are_compared_exactly():
    table = pa.table({"k": pa.array([2**53, 2**53 + 1, 2**53 + 2], pa.int64())})
    assert evaluate_comparison(Comparison.parse(f"k == {2**53 + 1}"), table).tolist() == [0.0, 1.0, 0.0]


def test_comparison_with_text():
    table = pa.table({"action": ["buy", "view", "buy"]})
    assert evaluate_comparison(Comparison("action", "==", "buy"), table).tolist() == [1, 0, 1]


def test_no_comparison_holds_where_the_column_is_missing():
    numbers = pa.table({"rating": pa.array([None, 3, 4], pa.int64())})
    assert evaluate_comparison(Comparison("rating", "!=", 4.0), numbers).tolist() == [0, 1, 0]
    texts = pa.table({"action": pa.array(["view", None], pa.string())})
    assert evaluate_comparison(Comparison("action", ">=", "buy"), texts).tolist() == [1, 0]


# --- Times -----------------------------------------------------------------------------------------------------------


def test_times_become_microseconds_by_their_unit():
    for unit, value in (("seconds", 1_700_000_000), ("milliseconds", 1_700_000_000_000), ("microseconds", 17 * 10**14)):
        time = EventTime(column="t", unit=unit)
        assert microseconds(pa.chunked_array([[value]]), time).tolist() == [1_700_000_000_000_000]


def test_times_with_a_fraction_are_rounded_to_the_nearest_microsecond():
    # 2199444544.775469 s is a little less in binary: cutting would give ...468, a time before that very time.
    values = pa.chunked_array([[2_199_444_544.775469]])
    assert microseconds(values, EventTime(column="t", unit="seconds")).tolist() == [2_199_444_544_775_469]


# --- Join ------------------------------------------------------------------------------------------------------------


def joined_by_row_id(events, profiles, spec):
    table, counts = join_rows(events, profiles, spec)
    return {row[ROW_ID]: row for row in table.to_pylist()}, counts


def profiles_of(users, items):
    return [Profiles("user", "user_id", users_table(users)), Profiles("item", "item_id", items_table(items))]


def test_join_gives_each_event_its_profile_item_label_and_history(shop_spec):
    events = events_table([("u1", "i1", 0), ("u2", "i2", 1), ("u1", "i2", 2), ("u1", "i1", 3)])
    profiles = profiles_of([("u2", 50, "Oslo"), ("u1", 20, "Rome")], [("i1", "a|b", 1.5), ("i2", "c", None)])
    rows, counts = joined_by_row_id(events, profiles, shop_spec)
    assert +counts == {}
    assert rows[3] == {
        ROW_ID: 3,
        EVENT_TIME: (T0 + 3) * 1_000_000,
        USER_HASH: int(hash_keys(pa.array(["u1"]))[0]),
        "label": 1.0,  # clicked is 3 % 2.
        "intensity_label": 1.0,  # seconds is 30.
        "intensity_value": pytest.approx(float("nan"), nan_ok=True),  # None is declared.
        "sample_weight": 4.0,
        "user_id": "u1",
        "item_id": "i1",
        "city": "Rome",
        "tags": "a|b",
        "price": 1.5,
        "age": 20,
        "recent_items": ["i1", "i2"],
    }
    assert (rows[1]["city"], rows[1]["price"], rows[1]["recent_items"]) == ("Oslo", None, [])
    assert [rows[index]["intensity_label"] for index in range(4)] == [0, 0, 1, 1]  # 0, 10, 20, 30 seconds.


def test_join_keeps_events_without_profile_and_counts_them(shop_spec):
    events = events_table([("u1", "i1", 0), ("ghost", "i1", 1), ("ghost", "lost", 2)])
    rows, counts = joined_by_row_id(events, profiles_of([("u1", 20, "Rome")], [("i1", "a", 1.0)]), shop_spec)
    assert len(rows) == 3
    assert (rows[1]["age"], rows[1]["city"], rows[1]["tags"]) == (None, None, "a")
    assert (rows[2]["tags"], rows[2]["price"]) == (None, None)
    assert counts == {"user_profile_missing": 2, "item_profile_missing": 1}


def test_join_with_empty_profile_tables_gives_missing_values(shop_spec):
    empty_users = users_table([]).cast(users_table([("u", 1, "c")]).schema)
    empty_items = items_table([]).cast(items_table([("i", "t", 1.0)]).schema)
    profiles = [Profiles("user", "user_id", empty_users), Profiles("item", "item_id", empty_items)]
    rows, counts = joined_by_row_id(events_table([("u1", "i1", 0)]), profiles, shop_spec)
    assert (rows[0]["age"], rows[0]["city"], rows[0]["price"]) == (None, None, None)
    assert counts == {"user_profile_missing": 1, "item_profile_missing": 1}


def test_join_does_not_depend_on_the_order_of_events(shop_content):
    shop_content["intensity_value"] = "seconds"  # Without it there would be NaN, which equals nothing.
    spec = parse_spec(shop_content, "shop")
    events = events_table([("u1", "i1", 3), ("u2", "i2", 1), ("u1", "i2", 2), ("u1", "i3", 1)])
    profiles = profiles_of([("u1", 20, "Rome"), ("u2", 30, "Oslo")], [("i1", "a", 1.0)])
    expected, _ = join_rows(events, profiles, spec)
    for order in itertools.permutations(range(4)):
        assert join_rows(events.take(pa.array(order)), profiles, spec)[0].equals(expected)


def test_intensity_label_is_the_label_where_none_is_declared(shop_content):
    del shop_content["intensity_label"], shop_content["sample_weight"]
    spec = parse_spec(shop_content, "shop")
    profiles = profiles_of([("u1", 20, "Rome")], [("i1", "a", 1.0)])
    table, _ = join_rows(events_table([("u1", "i1", 0), ("u1", "i1", 1)]), profiles, spec)
    assert table.column("intensity_label").to_pylist() == table.column("label").to_pylist() == [0.0, 1.0]
    assert table.column("sample_weight").to_pylist() == [1.0, 1.0]


def test_intensity_value_is_that_of_the_event_and_nan_where_it_is_missing(shop_content):
    shop_content["intensity_value"] = "seconds"
    spec = parse_spec(shop_content, "shop")
    events = events_table([("u1", "i1", 0), ("u1", "i1", 1), ("u1", "i1", 2)])
    position = events.column_names.index("seconds")
    seconds = pa.array([2.5, None, 40.0], pa.float64())
    rows, _ = joined_by_row_id(
        events.set_column(position, "seconds", seconds), profiles_of([("u1", 20, "Rome")], [("i1", "a", 1.0)]), spec
    )
    assert [rows[index]["intensity_value"] for index in (0, 2)] == [2.5, 40.0]
    assert np.isnan(rows[1]["intensity_value"])


def test_an_integer_intensity_value_becomes_a_float(shop_content):
    shop_content["intensity_value"] = "clicked"
    profiles = profiles_of([("u1", 20, "Rome")], [("i1", "a", 1.0)])
    spec = parse_spec(shop_content, "shop")
    table, _ = join_rows(events_table([("u1", "i1", 0), ("u1", "i1", 1)]), profiles, spec)
    assert table.schema.field("intensity_value").type == pa.float32()
    assert table.column("intensity_value").to_pylist() == [0.0, 1.0]


def test_duplicate_rows_gives_the_number_and_the_first_pair():
    table = users_table([("a", 1, "x"), ("b", 1, "x"), ("a", 2, "y"), ("b", 1, "x"), ("a", 3, "z")])
    # Row numbers count from 2: a is in rows 2, 4, 6 and b in 3, 5; three rows repeat a key.
    assert Profiles("user", "user_id", table).duplicate_rows() == (3, [2, 4])


def test_unique_keys_have_no_duplicate_rows():
    assert Profiles("user", "user_id", users_table([("a", 1, "x"), ("b", 1, "x")])).duplicate_rows() == (0, [])


# --- State tables, histories and windows in the join -----------------------------------------------------------------


@pytest.fixture
def state_content(shop_content):
    """The shop with what is known of users and items as of a time, and features of the user's past."""
    for role, value in (("user", "mood"), ("item", "rank")):
        types = {f"{role}_id": "string", value: "string", f"{value}_since": "int64"}
        shop_content["tables"][f"{role}_state"] = {
            "path": f"{role}_state.csv",
            "format": "csv",
            "key": f"{role}_id",
            "valid_from": {"column": f"{value}_since", "unit": "seconds"},
            "columns": [{"name": name, "type": kind} for name, kind in types.items()],
        }
    shop_content["features"] += [
        {"name": "user_mood", "type": "categorical", "column": "mood"},
        {"name": "item_rank", "type": "categorical", "column": "rank"},
        {"name": "recent_ranks", "type": "history", "of": "item_rank", "max_length": 5},
        {"name": "clicked_items", "type": "history", "of": "item", "where": "clicked == 1", "max_length": 5},
        {"name": "user_ctr", "type": "window", "aggregate": "rate", "where": "clicked == 1", "within_seconds": 2.5},
        {"name": "mean_seconds", "type": "window", "aggregate": "mean", "value": "seconds"},
    ]
    return shop_content


def state(role, name, rows):
    """A state table from (key, seconds after T0, value)."""
    table = pa.table(
        {
            f"{role}_id": [key for key, _, _ in rows],
            name: [value for _, _, value in rows],
            f"{name}_since": pa.array([T0 + since for _, since, _ in rows], pa.int64()),
            ROW_ID: pa.array(range(len(rows)), pa.int64()),
        }
    )
    return Profiles(f"{role}_state", f"{role}_id", table, EventTime(column=f"{name}_since", unit="seconds"))


def test_join_gives_each_event_the_state_and_the_past_as_of_its_time(state_content):
    spec = parse_spec(state_content, "shop")
    # Clicked is 0, 1, 0, 1 and seconds 0, 10, 20, 30.
    events = events_table([("u1", "i1", 0), ("u1", "i2", 1), ("u1", "i1", 2), ("u1", "i1", 3)])
    profiles = [
        *profiles_of([("u1", 20, "Rome")], [("i1", "a", 1.0), ("i2", "b", 2.0)]),
        state("user", "mood", [("u1", 2, "glad"), ("u1", 1, "sad")]),
        state("item", "rank", [("i1", 0, "high"), ("i1", 3, "low")]),
    ]
    rows, counts = joined_by_row_id(events, profiles, spec)
    column = {name: [rows[index][name] for index in range(4)] for name in rows[0]}
    assert column["mood"] == [None, "sad", "glad", "glad"]
    assert column["rank"] == ["high", None, "high", "low"]
    assert counts["user_state_profile_missing"] == counts["item_state_profile_missing"] == 1
    # The rank that an item had when it was seen, not the one it has now; i2 had none.
    assert column["recent_ranks"] == [[], ["high"], ["high"], ["high", "high"]]
    assert column["clicked_items"] == [[], [], ["i2"], ["i2"]]
    assert column["user_ctr"] == [None, 0, 0.5, 0.5]  # Event 3 no longer sees event 0.
    assert column["mean_seconds"] == [None, 0, 5, 10]
    assert not {"mood_since", "rank_since"} & set(column)


def test_features_of_user_state_are_user_features(state_content):
    spec = parse_spec(state_content, "shop")
    lengths = dict.fromkeys(spec.vocabularies, 3)
    assert spec.model_inputs(lengths).user_features == ("user_city", "user_age", "user_mood")
    assert list(spec.user_tables) == ["user", "user_state"]
    assert list(spec.item_tables) == ["item", "item_state"]
    assert spec.time_columns["mood_since"].unit == "seconds"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tables: tables["user_state"].pop("valid_from"),
            "tables.user_state must have valid_from. Received: none",
        ),
        (lambda tables: tables["log"].update(valid_from={"column": "time", "unit": "seconds"}), "time is event_time"),
        (
            lambda tables: tables["user_state"]["valid_from"].update(column="mood"),
            "Received: 'mood'. Allowed: ['mood_s",
        ),
        (lambda tables: tables["item_state"].update(key="rank"), "tables.item_state.key must be 'item_id'"),
    ],
)
def test_bad_state_table_is_refused(state_content, change, message):
    change(state_content["tables"])
    with pytest.raises(SpecError) as caught:
        parse_spec(state_content, "shop")
    assert message in str(caught.value)


def test_the_time_a_row_is_valid_from_is_no_feature(state_content):
    state_content["features"].append({"name": "since", "type": "numeric", "column": "mood_since"})
    with pytest.raises(SpecError, match=r"used as tables.user_state.valid_from cannot be a model input"):
        parse_spec(state_content, "shop")


def test_a_row_without_the_time_it_is_valid_from_or_with_an_absurd_one_is_bad(state_content):
    spec = parse_spec(state_content, "shop")
    table = pa.table(
        {
            "user_id": ["u1", "u2", "u3"],
            "mood": ["sad"] * 3,
            "mood_since": [str(T0), None, str(T0 * 1000)],
            ROW_ID: pa.array([2, 3, 4], pa.int64()),
        }
    )
    good, bad = parse_rows(RawBatch(SourceFile("user_state", 0, "state.csv"), table, []), spec)
    assert good.column("user_id").to_pylist() == ["u1"]
    reasons = [row.reason for row in bad]
    assert reasons == ["missing:mood_since", "valid_from_outside_1990-01-01_to_2100-01-01_in_seconds"]
