"""Window aggregates: counts, rates, means and the time since the last event, of the user's past alone."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.examples import arrow_to_tensors
from clsd_tf.data.transform import numeric_values
from clsd_tf.spec.feature_spec import SpecError, parse_spec
from clsd_tf.spec.model_inputs import NumericStatistics, RawInput
from clsd_tf.spec.number_features import NumberFeature
from clsd_tf.spec.past_features import WindowFeature
from pipelines.rows.histories import SortedEvents, window_values

SECOND = 1_000_000


def window(aggregate, **fields):
    if aggregate == "rate":
        fields = {"where": "clicked == 1", **fields}
    if aggregate == "mean":
        fields = {"value": "seconds", **fields}
    return WindowFeature(type="window", name="w", aggregate=aggregate, **fields)


def aggregates(feature, users, times, holds=None, values=None):
    """Values of events at ``times`` in seconds, None where missing."""
    events = SortedEvents(np.array(users, np.int64), np.array(times, np.int64) * SECOND)
    holds = np.ones(len(users), bool) if holds is None else np.array(holds, bool)
    column = None if values is None else pa.chunked_array([pa.array(values, pa.float64())])
    result = window_values(events, column, holds, feature)
    assert result.type == pa.float64()
    return result.to_pylist()


USERS, TIMES = [1, 1, 1, 1, 2, 2], [0, 10, 20, 30, 5, 25]


def test_count_is_of_the_users_events_before_and_zero_without_any():
    assert aggregates(window("count"), USERS, TIMES) == [0, 1, 2, 3, 0, 1]
    assert aggregates(window("count", within_seconds=10.0), USERS, TIMES) == [0, 1, 1, 1, 0, 0]


def test_count_with_a_comparison_is_of_the_events_for_which_it_holds():
    assert aggregates(window("count", where="clicked == 1"), USERS, TIMES, [1, 0, 1, 1, 0, 1]) == [0, 1, 1, 2, 0, 0]


def test_rate_is_the_share_of_events_for_which_it_holds_and_missing_without_events():
    assert aggregates(window("rate"), USERS, TIMES, [1, 0, 0, 1, 1, 0]) == [None, 1, 1 / 2, 1 / 3, None, 1]
    assert aggregates(window("rate", min_count=2), USERS, TIMES, [1, 0, 0, 1, 1, 0]) == [
        None, None, 1 / 2, 1 / 3, None, None,
    ]  # fmt: skip


def test_mean_is_over_the_events_that_have_the_value():
    values = [1.0, None, 4.0, 8.0, 16.0, 32.0]
    assert aggregates(window("mean"), USERS, TIMES, values=values) == [None, 1, 1, 2.5, None, 16]
    assert aggregates(window("mean", within_seconds=10.0), USERS, TIMES, values=values) == [
        None, 1, None, 4, None, None,
    ]  # fmt: skip


def test_seconds_since_last_is_the_time_since_the_users_previous_event():
    assert aggregates(window("seconds_since_last"), USERS, TIMES) == [None, 10, 10, 10, None, 20]
    assert aggregates(window("seconds_since_last"), [1, 1, 1], [0, 10, 10]) == [None, 10, 10]
    clicks = [1, 0, 0, 0, 0, 1]
    feature = window("seconds_since_last", where="clicked == 1")
    assert aggregates(feature, USERS, TIMES, clicks) == [None, 10, 20, 30, None, None]


def test_no_events_give_no_values():
    for aggregate in ("count", "rate", "mean", "seconds_since_last"):
        assert aggregates(window(aggregate), [], [], values=[]) == []


def test_a_mean_does_not_depend_on_other_users_in_the_table():
    # Differences of running sums would lose user 2's small numbers beside user 1's large ones.
    values = [1e17, 3e16, 0.1, 0.2, 0.3]
    assert aggregates(window("mean"), [1, 1, 2, 2, 2], [0, 1, 0, 1, 2], values=values)[2:] == [
        None,
        0.1,
        (0.1 + 0.2) / 2,
    ]


@st.composite
def sorted_events(draw):
    pairs = sorted(draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=30)))
    size = {"min_size": len(pairs), "max_size": len(pairs)}
    holds = draw(st.lists(st.booleans(), **size))
    values = draw(st.lists(st.none() | st.floats(-100, 100), **size))
    return [user for user, _ in pairs], [time for _, time in pairs], holds, values


def naive(feature, users, times, holds, values):
    """As the documentation says it, event by event."""
    within = feature.within_seconds or math.inf
    result = []
    for user, time in zip(users, times, strict=True):
        past = [
            (earlier, hold, value)
            for other, earlier, hold, value in zip(users, times, holds, values, strict=True)
            if other == user and feature.delay_seconds < time - earlier <= within
        ]
        held = [(earlier, value) for earlier, hold, value in past if hold]
        numbers = [value for _, value in held if value is not None]
        result.append(
            {
                "count": lambda held=held: len(held),
                "rate": lambda held=held, past=past: len(held) / len(past) if len(past) >= feature.min_count else None,
                "mean": lambda numbers=numbers: (
                    math.fsum(numbers) / len(numbers) if len(numbers) >= feature.min_count else None
                ),
                "seconds_since_last": lambda held=held, time=time: time - held[-1][0] if held else None,
            }[feature.aggregate]()
        )
    return result


SPANS = st.sampled_from(
    [{}, {"within_seconds": 3.0}, {"delay_seconds": 1.0}, {"within_seconds": 4.0, "delay_seconds": 2.0}]
)


@pytest.mark.parametrize("aggregate", ["count", "rate", "mean", "seconds_since_last"])
@given(sorted_events(), SPANS, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_aggregates_equal_a_naive_loop(aggregate, events, spans, min_count):
    users, times, holds, values = events
    feature = window(aggregate, min_count=min_count, **spans)
    expected = naive(feature, users, times, holds, values)
    result = aggregates(feature, users, times, holds, values)
    assert [value is None for value in result] == [value is None for value in expected]
    pairs = [(ours, theirs) for ours, theirs in zip(result, expected, strict=True) if theirs is not None]
    assert [ours for ours, _ in pairs] == pytest.approx([theirs for _, theirs in pairs], abs=1e-9)


# --- The spec and the transform --------------------------------------------------------------------------------------


def with_window(content, **fields):
    content["features"].append({"name": "user_ctr", "type": "window", **fields})
    return content


def test_a_window_is_a_numeric_input_and_a_number_of_the_request(shop_content):
    content = with_window(shop_content, aggregate="rate", where="clicked == 1", within_seconds=86_400)
    spec = parse_spec(content, "shop")
    feature = spec.feature("user_ctr")
    assert isinstance(feature, NumberFeature)
    assert feature.column == "user_ctr"
    assert spec.raw_inputs[-1] == RawInput("user_ctr", "float")
    inputs = spec.model_inputs({"item": 5, "user_city": 3, "item_tags": 7})
    assert inputs.numeric == ("item_price", "user_ctr")
    assert "user_ctr" not in inputs.user_features  # What the user did is not the profile.
    assert parse_spec(spec.model_dump(mode="json"), "again") == spec


def test_a_window_may_become_an_id_by_quantiles(shop_content):
    content = with_window(shop_content, aggregate="count", scaling="quantile_buckets", num_buckets=5)
    inputs = parse_spec(content, "shop").model_inputs({"item": 5, "user_city": 3, "item_tags": 7})
    assert (inputs.categorical[-1].name, inputs.categorical[-1].vocabulary_size) == ("user_ctr", 6)


def test_a_missing_window_is_the_training_mean():
    tensors = arrow_to_tensors(pa.table({"w": pa.array([None, 0.5], pa.float64())}), [RawInput("w", "float")])
    statistics = NumericStatistics(count=2, mean=0.25, std=0.5, minimum=0.0, maximum=1.0)
    assert numeric_values(window("rate"), statistics, tensors["w"]).numpy().tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"aggregate": "count", "key": "item"},
            "windows over an item's events, which lie with many users, are not supp",
        ),
        ({"aggregate": "rate"}, "a rate is the share of events where a comparison holds. Received: no where"),
        ({"aggregate": "mean"}, "value is what a mean is of. Received: aggregate: mean, value: None"),
        ({"aggregate": "count", "value": "seconds"}, "value is what a mean is of. Received: aggregate: count"),
        ({"aggregate": "mean", "value": "age"}, "value of 'user_ctr' must be an int64 or float column of the log"),
        (
            {"aggregate": "mean", "value": "item_id"},
            "Received: 'item_id'. Allowed: ['time', 'clicked', 'seconds', 'weigh",
        ),
        ({"aggregate": "count", "column": "clicked"}, "a window has no column"),
        ({"aggregate": "sum"}, "aggregate"),
        ({"aggregate": "count", "name": "price"}, "a window may not have the name of a column. Received: 'price'"),
    ],
)
def test_bad_window_is_refused(shop_content, fields, message):
    with pytest.raises(SpecError) as caught:
        parse_spec(with_window(shop_content, **fields), "shop")
    assert message in str(caught.value)
