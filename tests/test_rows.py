"""What happens to rows: checks with reasons, joins, histories that never look ahead, the time histogram, splits."""

import datetime as dt
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.features import Comparison, Split, parse_spec
from clsd_tf.hashing import hash_keys, mix_row_ids
from pipelines.rows import (
    EVENT_TIME,
    USER_HASH,
    Profiles,
    TimeHistogram,
    evaluate_comparison,
    join_rows,
    parse_rows,
    split_cut_offs,
    split_indices,
    user_histories,
)
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


def test_an_event_without_an_intensity_value_is_no_bad_row(shop_content):
    shop_content["intensity_value"] = "seconds"
    del shop_content["intensity_label"]
    good, bad = parse_rows(raw_batch("log", [{"seconds": ""}]), parse_spec(shop_content, "shop"))
    assert (good.num_rows, bad) == (1, [])


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


# --- Time histogram --------------------------------------------------------------------------------------------------


def test_cut_offs_by_hand():
    # Times 1..10, one row each: 80 % lie before 9, 90 % before 10.
    assert TimeHistogram().add(np.arange(1, 11)).cut_offs([0.8, 0.9]) == [9, 10]


def test_cut_off_is_the_nearest_boundary_between_times():
    # 3 rows at 5, 3 at 6, 4 at 7. Boundaries: 0, 3, 6, 10 rows before; 0.5 -> 5 rows: 6 is nearer than 3.
    histogram = TimeHistogram().add(np.array([5] * 3 + [6] * 3 + [7] * 4))
    assert histogram.cut_offs([0.5]) == [7]
    assert histogram.cut_offs([0.2]) == [6]


def test_rows_of_one_time_are_never_separated():
    histogram = TimeHistogram().add(np.array([1] * 50 + [2] * 50))
    times = np.array([1] * 50 + [2] * 50)
    splits = split_indices(Split(), histogram.cut_offs([0.8, 0.9]), times, np.arange(100))
    assert all(len(set(splits[times == time])) == 1 for time in (1, 2))


def test_cut_offs_work_for_times_before_1970():
    assert TimeHistogram().add(np.arange(-10, 0)).cut_offs([0.8, 0.9]) == [-2, -1]


TIMES = st.lists(st.integers(-(10**15), 4 * 10**15), min_size=1, max_size=8)


@given(st.lists(TIMES, min_size=1, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_merge_order_of_histograms_does_not_matter(parts, data):
    class Small(TimeHistogram):
        MAX_BUCKETS = 4  # So that coarsening happens.

    def merged(order):
        result = Small()
        for index in order:
            result = result.merge(Small().add(np.array(parts[index], np.int64)))
        return result.to_dict()

    order = data.draw(st.permutations(range(len(parts))))
    at_once = Small().add(np.array(list(itertools.chain(*parts)), np.int64)).to_dict()
    assert merged(range(len(parts))) == merged(order) == at_once


def test_histogram_survives_its_json_form():
    histogram = TimeHistogram().add(np.array([3, 5, 5, 9]))
    again = TimeHistogram(**json.loads(json.dumps(histogram.to_dict())))
    assert again.to_dict() == histogram.to_dict()
    assert again.cut_offs([0.5]) == histogram.cut_offs([0.5])


def test_histogram_size_is_bounded_and_no_row_is_lost():
    random = np.random.default_rng(0)
    histogram = TimeHistogram()
    for _ in range(4):
        histogram = histogram.merge(TimeHistogram().add(random.integers(0, 10**15, 40_000)))
    assert len(histogram.counts) <= TimeHistogram.MAX_BUCKETS == 65_536
    assert histogram.counts.total() == 160_000
    # Uniform times: the 80 % cut lies at 80 % of the range. Sampling error of a quantile: 0.1 %.
    assert histogram.cut_offs([0.8])[0] == pytest.approx(0.8 * 10**15, rel=0.01)


# --- Split -----------------------------------------------------------------------------------------------------------


def test_time_split_puts_a_row_at_the_cut_off_into_the_later_split():
    times = np.array([9, 10, 19, 20, 100])
    assert split_indices(Split(), [10, 20], times, np.arange(5)).tolist() == [0, 1, 1, 2, 2]


def test_cut_off_dates_replace_fractions():
    split = Split(validation_from=dt.datetime(2024, 1, 2), test_from=dt.datetime(2024, 1, 3, 12))
    # 2024-01-02 is 1,704,153,600 s after 1970; without time zone a date is UTC.
    histogram = TimeHistogram().add(np.arange(5))
    assert split_cut_offs(split, histogram) == [1_704_153_600_000_000, 1_704_283_200_000_000]


def test_events_from_until_on_are_left_out():
    day = 86_400_000_000
    split = Split(
        validation_from=dt.datetime(1970, 1, 11), test_from=dt.datetime(1970, 1, 21), until=dt.datetime(1970, 1, 31)
    )
    cut_offs = split_cut_offs(split, TimeHistogram().add(np.arange(5)))
    assert cut_offs == [10 * day, 20 * day, 30 * day]
    times = np.array([0, 10 * day, 20 * day, 30 * day - 1, 30 * day, 99 * day])
    assert split_indices(split, cut_offs, times, np.arange(6)).tolist() == [0, 1, 2, 2, 3, 3]


def test_cut_off_dates_respect_their_time_zone():
    zone = dt.timezone(dt.timedelta(hours=2))
    split = Split(validation_from=dt.datetime(2024, 1, 2, tzinfo=zone), test_from=dt.datetime(2024, 1, 3, tzinfo=zone))
    assert split_cut_offs(split, TimeHistogram())[0] == (1_704_153_600 - 7200) * 1_000_000


def test_random_split_has_the_fractions_and_does_not_follow_time():
    row_ids = np.arange(100_000)
    splits = split_indices(Split(rule="random", seed=4), [], row_ids, row_ids)
    shares = np.bincount(splits) / len(splits)
    # Standard error of a share of 0.8 in 100,000 rows is 0.0013: 5 of them.
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.0065)
    assert np.mean(splits[:50_000] == 0) == pytest.approx(0.8, abs=0.01)


def test_random_split_is_deterministic_and_changes_with_the_seed():
    row_ids = np.arange(1000)
    splits = [split_indices(Split(rule="random", seed=seed), [], row_ids, row_ids) for seed in (1, 1, 2)]
    assert np.array_equal(splits[0], splits[1])
    assert not np.array_equal(splits[0], splits[2])


def test_split_of_a_row_does_not_depend_on_the_other_rows():
    row_ids = np.arange(1000)
    split = Split(rule="random", seed=1)
    whole = split_indices(split, [], row_ids, row_ids)
    assert np.array_equal(split_indices(split, [], row_ids[::-3], row_ids[::-3]), whole[::-3])


# --- Hashes ----------------------------------------------------------------------------------------------------------


def test_mixed_row_ids_are_uniform():
    mixed = mix_row_ids(np.arange(100_000), seed=0)
    assert mixed.dtype == np.uint64
    assert len(np.unique(mixed)) == 100_000
    for bits in (mixed >> np.uint64(60), mixed & np.uint64(15)):  # The high and the low 4 bits.
        counts = np.bincount(bits.astype(np.int64), minlength=16)
        # 16 cells of 6,250 expected: chi-squared with 15 degrees of freedom exceeds 50 with probability 1e-5.
        assert ((counts - 6250) ** 2 / 6250).sum() < 50


def test_mixed_row_ids_are_the_published_splitmix64_sequence():
    # First outputs of SplitMix64 seeded with 0: state 1, 2, 3 times the golden gamma.
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = gamma * np.arange(3, dtype=np.uint64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix_row_ids(states, seed=0).tolist() == expected


def test_mixed_row_ids_of_two_seeds_are_unrelated():
    first, second = (mix_row_ids(np.arange(10_000), seed) / 2.0**64 for seed in (101, 102))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05  # 5 standard errors of 1 / sqrt(10,000).


def test_hash_of_a_key_is_stable_and_63_bit():
    hashes = hash_keys(pa.chunked_array([["u1", "u2"], ["u1"]]))
    assert hashes.dtype == np.int64
    assert hashes[0] == hashes[2] != hashes[1]
    assert (hashes >= 0).all()


def test_hash_of_an_integer_key_is_that_of_its_text():
    assert hash_keys(pa.array([17])).tolist() == hash_keys(pa.array(["17"])).tolist()
