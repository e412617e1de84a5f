"""Joins: labels, profiles, histories that never look ahead."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.features import Comparison, parse_spec
from clsd_tf.hashing import hash_keys
from pipelines.joins import EVENT_TIME, USER_HASH, Profiles, evaluate_comparison, join_rows, user_histories
from pipelines.sources import ROW_ID

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


def test_comparison_with_text():
    table = pa.table({"action": ["buy", "view", "buy"]})
    assert evaluate_comparison(Comparison("action", "==", "buy"), table).tolist() == [1, 0, 1]


# --- Histories -------------------------------------------------------------------------------------------------------


def histories(users, times, values, max_length):
    column = pa.chunked_array([pa.array(values, pa.string())])
    return user_histories(np.array(users, np.int64), np.array(times, np.int64), column, max_length).to_pylist()


def naive_histories(users, times, values, max_length):
    """As the documentation says it, event by event."""
    result = []
    for user, time in zip(users, times, strict=True):
        before = [
            value
            for other, earlier, value in zip(users, times, values, strict=True)
            if other == user and earlier < time and value is not None
        ]
        result.append(before[-max_length:])
    return result


def test_history_is_the_users_last_values_before_the_event_oldest_first():
    users = [1, 1, 1, 1, 2, 2]
    times = [10, 20, 30, 40, 5, 50]
    values = ["a", "b", "c", "d", "e", "f"]
    # Length 2: d's history drops a; user 2 starts empty although user 1's events lie before.
    assert histories(users, times, values, 2) == [[], ["a"], ["a", "b"], ["b", "c"], [], ["e"]]


def test_events_at_the_same_time_do_not_see_each_other():
    users = [1, 1, 1, 1]
    times = [10, 20, 20, 30]
    assert histories(users, times, ["a", "b", "c", "d"], 5) == [[], ["a"], ["a"], ["a", "b", "c"]]


def test_same_time_of_two_users_is_no_tie():
    assert histories([1, 1, 2, 2], [10, 20, 20, 30], ["a", "b", "c", "d"], 5) == [[], ["a"], [], ["c"]]


def test_missing_values_are_left_out_of_histories():
    # The null does not take one of the two places.
    assert histories([1] * 4, [1, 2, 3, 4], ["a", "b", None, "d"], 2) == [[], ["a"], ["a", "b"], ["a", "b"]]


def test_history_never_contains_the_event_itself():
    values = [f"v{index}" for index in range(50)]
    result = histories([7] * 50, list(range(50)), values, 100)
    assert all(values[index] not in history for index, history in enumerate(result))
    assert [len(history) for history in result] == list(range(50))


def test_no_events_give_no_histories():
    assert histories([], [], [], 3) == []


@st.composite
def sorted_events(draw):
    """Events sorted by (user, time), with many ties."""
    pairs = sorted(draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), max_size=40)))
    values = draw(st.lists(st.none() | st.sampled_from("abcdef"), min_size=len(pairs), max_size=len(pairs)))
    return [user for user, _ in pairs], [time for _, time in pairs], values


@given(sorted_events(), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_histories_equal_a_naive_loop(events, max_length):
    assert histories(*events, max_length) == naive_histories(*events, max_length)


@given(sorted_events(), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_no_history_value_comes_from_an_event_at_or_after_the_events_time(events, max_length):
    users, times, _ = events
    # Values say where they come from, so each can be traced to its event.
    values = [str(index) for index in range(len(users))]
    for index, history in enumerate(histories(users, times, values, max_length)):
        for source in map(int, history):
            assert users[source] == users[index]
            assert times[source] < times[index]


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
