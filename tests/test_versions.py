"""Versioned profiles: each event gets the latest row that was valid at its time, never a later one."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.spec.tables import EventTime
from pipelines.rows.joins import Profiles
from pipelines.sources import ROW_ID

T0 = 1_700_000_000  # 2023-11-14T22:13:20Z
VALID_FROM = EventTime(column="since", unit="seconds")


def versions(rows, valid_from=VALID_FROM):
    """A user table from (user, seconds after T0, city)."""
    table = pa.table(
        {
            "user_id": pa.array([user for user, _, _ in rows], pa.string()),
            "since": pa.array([T0 + since for _, since, _ in rows], pa.int64()),
            "city": pa.array([city for _, _, city in rows], pa.string()),
            ROW_ID: pa.array(range(2, 2 + len(rows)), pa.int64()),
        }
    )
    return Profiles("user", "user_id", table, valid_from)


def cities(profiles, asked):
    """The city of each (user, seconds after T0)."""
    times = np.array([(T0 + time) * 1_000_000 for _, time in asked], np.int64)
    found, missing = profiles.lookup(pa.chunked_array([pa.array([user for user, _ in asked], pa.string())]), times)
    assert list(found) == ["city"]
    values = found["city"].to_pylist()
    assert missing == sum(value is None for value in values)  # These tables have no null of their own.
    return values


def test_each_event_gets_the_latest_version_at_or_before_its_time():
    table = versions([("u1", 20, "Oslo"), ("u2", 0, "Paris"), ("u1", 10, "Rome")])  # In no order.
    asked = [("u1", 9), ("u1", 10), ("u1", 19), ("u1", 20), ("u1", 99), ("u2", 5), ("ghost", 50)]
    assert cities(table, asked) == [None, "Rome", "Rome", "Oslo", "Oslo", "Paris", None]


def test_an_event_before_the_only_version_gets_nothing():
    assert cities(versions([("u1", 10, "Rome")]), [("u1", 9)]) == [None]


def test_a_version_one_microsecond_after_the_event_is_not_seen():
    table = pa.table(
        {
            "user_id": ["u1", "u1"],
            "since": pa.array([5, 7], pa.int64()),
            "city": ["Rome", "Oslo"],
            ROW_ID: pa.array([0, 1], pa.int64()),
        }
    )
    profiles = Profiles("user", "user_id", table, EventTime(column="since", unit="microseconds"))
    found, _ = profiles.lookup(pa.chunked_array([["u1", "u1"]]), np.array([6, 7]))
    assert found["city"].to_pylist() == ["Rome", "Oslo"]


def test_an_empty_versioned_table_knows_nothing():
    assert cities(versions([]), [("u1", 0), ("u2", 5)]) == [None, None]


VERSIONS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-5, 5)), unique=True, max_size=15)
ASKED = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-7, 7)), max_size=20)


@given(VERSIONS, ASKED)
@settings(max_examples=300, deadline=None)
def test_versions_equal_a_naive_loop(rows, asked):
    expected = []
    for user, time in asked:
        known = [(since, f"{user}{since}") for other, since in rows if other == user and since <= time]
        expected.append(max(known)[1] if known else None)
    assert cities(versions([(user, since, f"{user}{since}") for user, since in rows]), asked) == expected


def test_a_repeated_pair_of_key_and_time_is_a_duplicate_and_a_new_time_is_none():
    table = versions([("a", 1, "x"), ("b", 1, "x"), ("a", 2, "y"), ("b", 1, "z"), ("a", 1, "w")])
    assert table.duplicate_rows() == (2, [3, 5])  # Rows 3 and 5 are b at 1; rows 2 and 6 are a at 1.
    assert versions([("a", 1, "x"), ("b", 1, "x"), ("a", 2, "y")]).duplicate_rows() == (0, [])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=12))
@settings(max_examples=200, deadline=None)
def test_duplicates_equal_a_naive_loop(pairs):
    count, places = 0, []
    for row, pair in enumerate(pairs):
        if pair in pairs[:row]:
            count += 1
            places = places or [2 + pairs.index(pair), 2 + row]
    assert versions([(user, since, "x") for user, since in pairs]).duplicate_rows() == (count, places)
