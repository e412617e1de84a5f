"""Expectations and drift: values by hand and by SciPy, and silence where only chance is at work."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from clsd_tf.spec.expectations import DriftLimits, Expectation
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.validation import SpecError
from clsd_tf.statistics.data_checks import (
    CLICKS,
    Anomaly,
    binned_shares,
    compare,
    contrast,
    find_anomalies,
    find_drift,
    jensen_shannon,
    measure_drift,
)
from clsd_tf.statistics.data_statistics import DataStatistics
from clsd_tf.statistics.report import render_data_report
from clsd_tf.statistics.sketches import Histogram


def statistics_of(spec, num_rows=1000, **columns):
    """Rows of the shop; a column that is not given holds one value."""
    base = {
        "user_id": pa.array(["u"] * num_rows, pa.string()),
        "item_id": pa.array(["i"] * num_rows, pa.string()),
        "city": pa.array(["Rome"] * num_rows, pa.string()),
        "tags": pa.array(["a"] * num_rows, pa.string()),
        "price": pa.array([1.0] * num_rows, pa.float64()),
        "age": pa.array([40] * num_rows, pa.int64()),
        "recent_items": pa.array([["i"]] * num_rows, pa.list_(pa.string())),
        "label": pa.array(np.zeros(num_rows, np.float32)),
        "user_hash": pa.array(np.arange(num_rows) % 100),
    }
    given_columns = {name: pa.array(values, base[name].type) for name, values in columns.items()}
    return DataStatistics.of(pa.table(base | given_columns), spec)


def measured(baseline, new, column, kind, group=""):
    found = [drift for drift in measure_drift(baseline, new) if (drift.column, drift.kind) == (column, kind)]
    return next(drift for drift in found if drift.group == group)


# --- Expectations ----------------------------------------------------------------------------------------------------


def test_each_kind_of_broken_expectation_by_hand(shop_spec):
    statistics = statistics_of(
        shop_spec,
        10,
        city=["Rome"] * 6 + ["Bonn"] * 2 + [None] * 2,
        tags=["a|b"] * 9 + ["b|c"],
        price=[0.5] * 9 + [30.0],
    )
    expectations = {
        "city": Expectation(values=("Rome",), max_missing=0.1),
        "tags": Expectation(values=("a", "b")),
        "price": Expectation(min=1.0, max=20.0),
    }
    found = find_anomalies(statistics, expectations)
    assert [(anomaly.column, anomaly.kind, anomaly.received, anomaly.allowed) for anomaly in found] == [
        ("city", "missing", 0.2, 0.1),
        ("city", "unexpected_values", 0.25, 0.0),
        ("price", "above_max", 30.0, 20.0),
        ("price", "below_min", 0.5, 1.0),
        ("tags", "unexpected_values", 0.05, 0.0),  # One of 20 values.
    ]
    assert found[0].message == "city: share of missing values must be at most 0.1. Received: 0.2"
    assert "Bonn" not in "".join(anomaly.message for anomaly in found)


def test_unexpected_values_that_are_too_many_to_be_kept_are_found(shop_spec):
    junk = [f"junk {i}" for i in range(2000)]
    statistics = statistics_of(shop_spec, 12_000, city=["a"] * 5000 + ["b"] * 5000 + junk)
    found = find_anomalies(statistics, {"city": Expectation(values=("a", "b", "a"))})
    # Of 2,000 values of 12,000, each of the two expected ones may have had one: the error of the summary.
    assert statistics.columns["city"].values.top.error == 1
    assert [(anomaly.kind, anomaly.received) for anomaly in found] == [("unexpected_values", 1998 / 12_000)]


def test_expected_values_that_are_too_many_to_be_kept_are_no_anomalies(shop_spec):
    cities = [f"c{i}" for i in range(1200)]
    statistics = statistics_of(shop_spec, 12_000, city=cities * 10)
    assert find_anomalies(statistics, {"city": Expectation(values=tuple(cities))}) == []
    # What was kept is known, however many values are expected.
    with_junk = statistics_of(shop_spec, 12_100, city=cities * 10 + ["junk"] * 100)
    found = find_anomalies(with_junk, {"city": Expectation(values=tuple(cities))})
    assert [anomaly.received for anomaly in found] == [100 / 12_100]


def test_kept_expectations_and_no_rows_are_no_anomalies(shop_spec):
    expectations = {
        "city": Expectation(values=("Rome",), max_missing=0.0),
        "price": Expectation(min=1.0, max=1.0),
    }
    assert find_anomalies(statistics_of(shop_spec), expectations) == []
    assert find_anomalies(statistics_of(shop_spec, 0), expectations) == []


def with_expect(shop_content, table, name, expect):
    column = next(column for column in shop_content["tables"][table]["columns"] if column["name"] == name)
    column["expect"] = expect
    return parse_spec(shop_content, "shop")


def test_expectations_are_declared_at_the_column(shop_content):
    shop_content["drift"] = {"max_unseen": 0.5, "max_l_infinity": None}
    spec = with_expect(shop_content, "user", "age", {"min": 0, "max": 120, "drift": {"max_mean_change": 1}})
    assert spec.expectations == {"age": Expectation(min=0.0, max=120.0, drift=DriftLimits(max_mean_change=1.0))}
    assert spec.drift == DriftLimits(max_unseen=0.5, max_l_infinity=None)


@pytest.mark.parametrize(
    ("table", "name", "expect", "message"),
    [
        ("user", "age", {"min": 3, "max": 2}, "min must be at most max. Received: 3 and 2"),
        ("user", "city", {"min": 3}, "are for numbers. Received: the string column 'city'"),
        ("item", "price", {"values": ["3"]}, "is for string and int64. Received: the float column 'price'"),
        ("user", "age", {"min": 1, "values": ["3"]}, "Received: both"),
        ("user", "age", {"at_least": 3}, "at_least"),
        ("user", "age", {"max_missing": 1.5}, "max_missing"),
        ("log", "clicked", {"max_missing": 0}, "columns of features and user groups. Received: 'clicked'"),
        ("log", "user_id", {"values": ["u1"]}, "only max_missing can be expected"),
    ],
)
def test_expectations_that_cannot_be_checked_are_refused(shop_content, table, name, expect, message):
    with pytest.raises(SpecError) as error:
        with_expect(shop_content, table, name, expect)
    assert message in str(error.value)


def test_a_column_gets_the_statistics_that_its_expectation_needs(shop_content):
    spec = with_expect(shop_content, "user", "age", {"values": ["40", "41"]})
    found = find_anomalies(statistics_of(spec, 4, age=[40, 41, 42, None]), spec.expectations)
    assert [(anomaly.kind, anomaly.received) for anomaly in found] == [("unexpected_values", pytest.approx(1 / 3))]


@pytest.mark.parametrize(
    ("column", "expectation", "received"),
    [
        ("city", Expectation(min=0.0), "'city' must .* Received: statistics without its numbers"),
        ("price", Expectation(values=("1",)), "'price' must .* Received: statistics without its values"),
        ("colour", Expectation(max_missing=0.1), "'colour' must .* Received: statistics without the column"),
    ],
)
def test_expectations_that_the_statistics_cannot_answer_are_refused(shop_spec, column, expectation, received):
    for num_rows in (0, 10):
        with pytest.raises(ValueError, match=rf"{received}.*Build the dataset again with this spec"):
            find_anomalies(statistics_of(shop_spec, num_rows), {column: expectation})


# --- Measures of drift -----------------------------------------------------------------------------------------------

DISTRIBUTION = st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any).map(lambda n: np.array(n) / sum(n))


@given(DISTRIBUTION, DISTRIBUTION)
@settings(max_examples=200, deadline=None)
def test_divergence_is_the_square_of_scipys_distance(left, right):
    assert jensen_shannon(left, right) == pytest.approx(jensenshannon(left, right, base=2) ** 2, abs=1e-12)


def test_divergence_at_its_ends():
    assert jensen_shannon(np.array([0.3, 0.7]), np.array([0.3, 0.7])) == 0
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1


def test_measures_of_values_by_hand(shop_spec):
    before = statistics_of(shop_spec, city=["Rome"] * 500 + ["Oslo"] * 300 + [None] * 200)
    after = statistics_of(shop_spec, city=["Rome"] * 500 + ["Bonn"] * 400 + ["Oslo"] * 100)
    # Of the values: .625, .375, 0 before and .5, .1, .4 after. Of the rows, .2 and 0 are missing.
    assert measured(before, after, "city", "l_infinity").value == pytest.approx(0.4)
    assert measured(before, after, "city", "missing_change").value == pytest.approx(0.2)
    assert measured(before, after, "city", "unseen").value == pytest.approx(0.4)
    assert measured(after, before, "city", "unseen").value == 0
    expected = jensenshannon([0.625, 0.375, 0], [0.5, 0.1, 0.4], base=2) ** 2
    assert measured(before, after, "city", "jensen_shannon").value == pytest.approx(expected)


def test_values_that_a_side_has_dropped_are_as_frequent_as_its_error_allows(shop_spec):
    # 1,101 values of 11 rows are more than are kept: each may have up to 11 of 12,111 rows.
    long_tail = statistics_of(shop_spec, 12_111, city=[f"c{i % 1101}" for i in range(12_111)])
    assert long_tail.columns["city"].values.top.error == 11
    ten = statistics_of(shop_spec, city=[f"c{i % 10}" for i in range(1000)])
    for pair in ((long_tail, ten), (ten, long_tail)):
        assert measured(*pair, "city", "l_infinity").value == pytest.approx(0.1 - 11 / 12_111)
    alike = statistics_of(shop_spec, 11_000, city=[f"c{i % 1000}" for i in range(11_000)])
    assert measured(long_tail, alike, "city", "l_infinity").value == pytest.approx(1 / 1000 - 11 / 12_111)
    # Neither is it known which values are new: the ten are among those that the long tail had, and dropped.
    for pair in ((long_tail, ten), (ten, long_tail)):
        assert "unseen" not in {drift.kind for drift in measure_drift(*pair) if drift.column == "city"}


def test_measures_of_numbers_and_clicks_by_hand(shop_spec):
    before = statistics_of(shop_spec, price=[1.0, 3.0] * 500, label=[1.0] * 100 + [0.0] * 900)
    after = statistics_of(shop_spec, price=[2.0, 3.0] * 500, label=[1.0] * 130 + [0.0] * 870)
    # Mean 2 and standard deviation 1 before, mean 2.5 after. Bins by hand: {1}, {2}, {3}.
    assert measured(before, after, "price", "mean_change").value == pytest.approx(0.5)
    expected = jensenshannon([0.5, 0, 0.5], [0, 0.5, 0.5], base=2) ** 2
    assert measured(before, after, "price", "jensen_shannon").value == pytest.approx(expected)
    clicks = measured(before, after, CLICKS, "click_rate_change")
    assert clicks.value == pytest.approx(0.3)
    # 4 standard errors of the difference of two shares of .115 in 1,000 rows, over the rate before.
    assert clicks.sampling_error == pytest.approx(4 * np.sqrt(0.115 * 0.885 * 2 / 1000) / 0.1)


def test_lengths_of_histories_are_compared(shop_spec):
    before = statistics_of(shop_spec, recent_items=[["i"]] * 500 + [["i", "i"]] * 500)
    after = statistics_of(shop_spec, recent_items=[["i"]] * 900 + [[]] * 100)
    expected = jensenshannon([0, 0.5, 0.5], [0.1, 0.9, 0], base=2) ** 2
    assert measured(before, after, "recent_items", "jensen_shannon").value == pytest.approx(expected)


def test_bins_hold_equal_mass_of_both_sides():
    left = Histogram.of_floats(np.arange(1000.0))
    right = Histogram.of_floats(np.arange(500.0, 1500.0))
    ends, of_left, of_right = binned_shares(left, right)
    assert len(ends) == 19
    assert (of_left + of_right) / 2 == pytest.approx(np.full(20, 0.05))
    # The first quarter of the values is below 500, where only the left side has some.
    assert of_left[:5] == pytest.approx(np.full(5, 0.1))
    assert of_right[:5].tolist() == [0] * 5


# --- Limits ----------------------------------------------------------------------------------------------------------


def random_rows(spec, seed, num_rows=20_000, shift=0.0):
    random = np.random.default_rng(seed)
    return statistics_of(
        spec,
        num_rows,
        user_id=np.array([f"u{i}" for i in random.integers(0, 500, num_rows)]),
        item_id=np.array([f"i{i}" for i in random.zipf(1.5, num_rows) % 3000]),
        city=random.choice(["Rome", "Oslo", "Bonn"], num_rows, p=[0.5, 0.3, 0.2]),
        tags=random.choice(["a", "a|b", "b|c"], num_rows),
        price=random.lognormal(size=num_rows) * np.exp(shift),
        age=random.integers(10, 80, num_rows),
        recent_items=[["i"] * length for length in random.integers(0, 4, num_rows)],
        label=(random.random(num_rows) < 0.1 * np.exp(shift)).astype(np.float32),
        user_hash=random.integers(0, 500, num_rows),
    )


NO_CHANGE = {
    "max_l_infinity": 0.0,
    "max_jensen_shannon": 0.0,
    "max_mean_change": 0.0,
    "max_missing_change": 0.0,
    "max_click_rate_change": 0.0,
}


def test_chance_alone_is_no_drift_even_where_none_is_allowed(shop_content):
    shop_content["drift"] = NO_CHANGE
    spec = parse_spec(shop_content, "shop")
    for seed in range(4):
        new = random_rows(spec, 100 + seed, num_rows=2000 if seed % 2 else 20_000)
        assert compare(random_rows(spec, seed), new, spec) == []


def test_real_drift_is_found_in_all_rows_and_in_every_group(shop_spec):
    found = compare(random_rows(shop_spec, 1), random_rows(shop_spec, 2, shift=1.0), shop_spec)
    assert {(anomaly.column, anomaly.kind) for anomaly in found} == {
        (CLICKS, "click_rate_change"),
        ("price", "jensen_shannon"),
        ("price", "mean_change"),
    }
    groups = {anomaly.group for anomaly in found if anomaly.column == CLICKS}
    assert groups >= {"", "age_group 30.5-60", "city_group Rome", "city_group other"}
    assert found == sorted(found)


def test_drift_of_one_group_shows_there(shop_spec):
    city = ["Rome"] * 900 + ["Oslo"] * 100
    before = statistics_of(shop_spec, city=city, tags=["a"] * 950 + ["b"] * 50)
    after = statistics_of(shop_spec, city=city, tags=["b"] * 50 + ["a"] * 950)
    # Overall nothing changes; half of Oslo's rows have another tag.
    found = compare(before, after, shop_spec)
    assert {(anomaly.group, anomaly.column) for anomaly in found} == {("city_group Oslo", "tags")}
    largest = next(anomaly for anomaly in found if anomaly.kind == "l_infinity")
    assert largest.received == pytest.approx(0.5)
    # Shares of .5 and 0 in 100 rows each: 4 * sqrt(.25 * .75 * 2 / 100) beside the limit of .1.
    assert largest.allowed == pytest.approx(0.1 + 4 * np.sqrt(0.25 * 0.75 * 2 / 100))
    assert largest.message.startswith("tags of city_group Oslo: l_infinity must be at most 0.1, or 0.344949 with")


def test_limits_of_a_column_replace_those_of_the_spec(shop_content):
    shop_content["drift"] = {"max_jensen_shannon": None, "max_l_infinity": None}
    loose = parse_spec(shop_content, "shop")
    strict = with_expect(shop_content, "user", "city", {"drift": {"max_unseen": 0.3}})
    before = statistics_of(loose)
    after = statistics_of(loose, city=["Rome"] * 600 + ["Bonn"] * 400)
    assert compare(before, after, loose) == []
    found = find_drift(measure_drift(before, after), strict)
    assert ("", "unseen", 0.4) in [(anomaly.group, anomaly.kind, anomaly.received) for anomaly in found]
    assert {anomaly.column for anomaly in found} == {"city"}


def test_groups_of_few_users_are_never_named(shop_spec):
    users = np.arange(1000) % 100
    city = np.where(users < 19, "Oslo", "Rome")  # 19 users in Oslo, one short of 20.
    before, after = (statistics_of(shop_spec, city=city, user_hash=users, tags=[tag] * 1000) for tag in "ab")
    named = {drift.group for drift in measure_drift(before, after)}
    # Oslo is too small, and so is "other" until it takes in Rome.
    assert named == {"", "age_group 30.5-60", "city_group other"}
    assert {drift.group for drift in measure_drift(before, after, min_group_users=19)} == {
        "",
        "age_group 30.5-60",
        "city_group Oslo",
        "city_group Rome",
    }


def test_other_is_compared_only_where_it_holds_the_same_groups(shop_spec):
    users = np.arange(1000) % 100
    three = np.array(["Rome", "Oslo", "Bonn", "Bonn"])[users % 4]
    two = np.where(three == "Oslo", "Bonn", three)
    alike, differing = (
        {
            drift.group
            for drift in measure_drift(*(statistics_of(shop_spec, city=city, user_hash=users) for city in pair))
        }
        for pair in ((three, three), (three, two))
    )
    assert "city_group other" in alike
    assert "city_group other" not in differing
    assert "city_group Rome" in differing


def test_served_requests_are_compared_without_clicks(shop_spec):
    requests = statistics_of(shop_spec, 500)
    table = {"has_labels": False}
    requests = DataStatistics(**{**vars(requests), **table})
    kinds = {drift.kind for drift in measure_drift(statistics_of(shop_spec, label=[1.0] * 1000), requests)}
    assert kinds == {"missing_change", "l_infinity", "jensen_shannon", "unseen"}


def test_nothing_is_measured_without_rows(shop_spec):
    empty = statistics_of(shop_spec, 0)
    assert measure_drift(statistics_of(shop_spec), empty) == []
    assert compare(empty, statistics_of(shop_spec), shop_spec) == []


def test_anomalies_are_sorted_by_column_group_and_kind():
    first = Anomaly("a", "", "missing", 1.0, 0.0, "")
    assert sorted([Anomaly("b", "", "x", 0.0, 0.0, ""), Anomaly("a", "g", "x", 0.0, 0.0, ""), first])[0] == first


def test_dollar_signs_in_values_are_drawn_as_they_are(shop_spec):
    city = np.array(["$x$", r"$\frac$"])[np.arange(1000) % 2]
    before, after = (statistics_of(shop_spec, city=city, user_hash=np.arange(1000)) for _ in range(2))
    entry = contrast("$a^$", before, "after", after, shop_spec)
    facts = {"dataset": "d", "spec": "s", "min_group_users": 20, "left_out": []}
    page = render_data_report({"train": before}, [entry], {}, facts)
    # The drawing names each text in a comment: the value under its panel, and each side in a legend.
    assert "<!-- $x$ -->" in page
    assert r"<!-- $\frac$ -->" in page
    assert "<!-- $a^$ -->" in page
