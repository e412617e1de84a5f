"""Histories: the user's last values strictly before an event, of the events that count, neither too old nor too new."""

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.spec.feature_spec import SpecError, parse_spec
from clsd_tf.spec.past_features import FromPastEvents, HistoryFeature
from pipelines.rows.histories import SortedEvents, past_values, user_histories

SECOND = 1_000_000


def histories(users, times, values, max_length, counts=None, **fields):
    """Histories of events at ``times`` in seconds."""
    feature = HistoryFeature(type="history", name="recent", of="item", max_length=max_length, **fields)
    events = SortedEvents(np.array(users, np.int64), np.array(times, np.int64) * SECOND)
    column = pa.chunked_array([pa.array(values, pa.string())])
    counts = np.ones(len(users), bool) if counts is None else np.array(counts, bool)
    return user_histories(events, column, counts, feature).to_pylist()


def naive_histories(users, times, values, max_length, counts=None, within_seconds=float("inf"), delay_seconds=0):
    """As the documentation says it, event by event."""
    counts = [True] * len(users) if counts is None else counts
    result = []
    for user, time in zip(users, times, strict=True):
        past = [
            value
            for other, earlier, value, counted in zip(users, times, values, counts, strict=True)
            if other == user and delay_seconds < time - earlier <= within_seconds and counted and value is not None
        ]
        result.append(past[-max_length:])
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


def test_events_that_do_not_count_take_no_place():
    counts = [True, False, True, False, False]
    assert histories([1] * 5, range(5), list("abcde"), 2, counts) == [[], ["a"], ["a"], ["a", "c"], ["a", "c"]]


def test_within_seconds_keeps_the_event_of_just_that_age():
    # Ages at the last event: 30, 20, 10.
    assert histories([1] * 4, [0, 10, 20, 30], list("abcd"), 9, within_seconds=20.0)[-1] == ["b", "c"]
    assert histories([1] * 4, [0, 10, 20, 30], list("abcd"), 9, within_seconds=19.5)[-1] == ["c"]


def test_with_a_delay_an_event_is_seen_once_it_is_older():
    # At the last event b is 20 old, c 10: strictly older than 10 is b alone.
    assert histories([1] * 4, [0, 10, 20, 30], list("abcd"), 9, delay_seconds=10.0)[-1] == ["a", "b"]
    assert histories([1] * 4, [0, 10, 20, 30], list("abcd"), 9, delay_seconds=9.5)[-1] == ["a", "b", "c"]


def test_a_delay_does_not_reach_into_another_user():
    assert histories([1, 1, 2, 2], [0, 100, 1, 2], list("abcd"), 9, delay_seconds=50.0) == [[], ["a"], [], []]


@st.composite
def sorted_events(draw):
    """Events sorted by (user, time), with many ties; values and which of them count."""
    pairs = sorted(draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), max_size=40)))
    values = draw(st.lists(st.none() | st.sampled_from("abcdef"), min_size=len(pairs), max_size=len(pairs)))
    counts = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    return [user for user, _ in pairs], [time for _, time in pairs], values, counts


SPANS = st.sampled_from(
    [{}, {"within_seconds": 2.0}, {"delay_seconds": 1.0}, {"within_seconds": 4.0, "delay_seconds": 2.0}]
)


@given(sorted_events(), st.integers(1, 6), SPANS)
@settings(max_examples=300, deadline=None)
def test_histories_equal_a_naive_loop(events, max_length, spans):
    users, times, values, counts = events
    expected = naive_histories(users, times, values, max_length, counts, **spans)
    assert histories(users, times, values, max_length, counts, **spans) == expected


@given(sorted_events(), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_no_history_value_comes_from_an_event_at_or_after_the_events_time(events, max_length):
    users, times, _, _ = events
    # Values say where they come from, so each can be traced to its event.
    values = [str(index) for index in range(len(users))]
    for index, history in enumerate(histories(users, times, values, max_length)):
        for source in map(int, history):
            assert users[source] == users[index]
            assert times[source] < times[index]


# --- The spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"within_seconds": 60, "delay_seconds": 60},
            "within_seconds must be more than delay_seconds. Received: 60 and",
        ),
        ({"within_seconds": 0}, "within_seconds"),
        ({"delay_seconds": -1}, "delay_seconds"),
        ({"where": "age == 1"}, "where of 'recent_items' must be a declared column. Received: 'age'. Allowed: user_id"),
        ({"where": "clicked == 'yes'"}, "where of 'recent_items' compares a int64 column with 'yes'"),
        ({"where": "clicked"}, "is `column operator value`. Received: 'clicked'"),
    ],
)
def test_bad_history_is_refused(shop_content, fields, message):
    shop_content["features"][-1] |= fields
    with pytest.raises(SpecError) as caught:
        parse_spec(shop_content, "shop")
    assert message in str(caught.value)


def test_histories_of_labels_and_of_held_out_columns_are_allowed(shop_content):
    # They describe past events only: nothing of the event itself.
    shop_content["features"][-1]["where"] = "seconds >= 20"
    history = parse_spec(shop_content, "shop").features[-1]
    assert (history.where_comparison.column, history.where_comparison.value) == ("seconds", 20)


def test_history_of_an_item_table_shares_its_vocabulary(shop_content):
    shop_content["tables"]["item"]["columns"].append({"name": "brand", "type": "string"})
    shop_content["features"] += [
        {"name": "item_brand", "type": "categorical", "column": "brand"},
        {"name": "recent_brands", "type": "history", "of": "item_brand", "max_length": 4},
    ]
    inputs = parse_spec(shop_content, "shop").model_inputs({"item": 5, "user_city": 3, "item_tags": 7, "item_brand": 2})
    assert (inputs.categorical[-1].vocabulary, inputs.categorical[-1].vocabulary_size) == ("item_brand", 4)


def test_a_kind_of_feature_without_a_case_is_named():
    class Streak(FromPastEvents):
        counted_as: ClassVar = "numbers"
        meaning: ClassVar = None
        categorical_input: ClassVar = None
        event_column: ClassVar = None

    past = SortedEvents(np.array([1]), np.array([1]))
    with pytest.raises(TypeError, match=r"must have its case here\. Received: Streak"):
        past_values(past, None, np.array([True]), Streak(name="x"))
