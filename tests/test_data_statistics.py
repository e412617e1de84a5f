"""Statistics of joined rows against a loop over the rows, and what reports may show of small user groups."""

import functools
import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.hashing import hash_keys
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.statistics.data_statistics import (
    ALL_ROWS,
    MAX_VALUES,
    DataStatistics,
    read_data_statistics,
    write_data_statistics,
)
from clsd_tf.statistics.sketches import DistinctSketch
from clsd_tf.statistics.small_groups import merge_small_groups, merged_labels

TYPES = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "city": pa.string(),
    "tags": pa.string(),
    "price": pa.float64(),
    "age": pa.int64(),
    "recent_items": pa.list_(pa.string()),
    "label": pa.float32(),
}
ROW = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["u1", "u2", "u3", "u4"]),
        "item_id": st.sampled_from(["i1", "i2"]),
        "city": st.sampled_from([None, "Rome", "Oslo", "Bonn"]),
        "tags": st.sampled_from([None, "a", "a|b", "b||c", "|", "a|a"]),
        "price": st.sampled_from([None, 0.0, -0.0, 1.5, -2.0, 1e9]),
        "age": st.sampled_from([None, 0, 17, 18, 59, 60]),
        "recent_items": st.sampled_from([None, [], ["i1"], ["i1", "i2"]]),
        "label": st.sampled_from([0.0, 1.0]),
    }
)


def table_of(rows):
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in TYPES.items()}
    table = pa.table(columns)
    return table.append_column("user_hash", pa.array(hash_keys(table.column("user_id"))))


def segments_of(row):
    """By hand: the user groups of the shop spec."""
    age, city = row["age"], row["city"]
    intervals = [(18, "<18"), (30.5, "18-30.5"), (60, "30.5-60"), (np.inf, ">=60")]
    age_label = "unknown" if age is None else next(label for end, label in intervals if age < end)
    city_label = "unknown" if city is None else city if city in ("Rome", "Oslo") else "other"
    return [ALL_ROWS, ("age_group", age_label), ("city_group", city_label)]


def check_against_rows(statistics, rows):
    for index, segment in enumerate(statistics.segments):
        inside = [row for row in rows if segment in segments_of(row)]
        assert statistics.rows[index] == len(inside)
        assert statistics.clicks[index] == sum(row["label"] for row in inside)
        assert statistics.users[index].estimate == len({row["user_id"] for row in inside})
        for name in ("city", "tags", "price", "age", "user_id"):
            assert statistics.columns[name].missing[index] == sum(row[name] is None for row in inside)
        assert statistics.columns["recent_items"].missing[index] == sum(not row["recent_items"] for row in inside)
        for name in ("price", "age"):
            check_numbers(statistics.columns[name].numbers, [row[name] for row in inside], index)
        check_values(statistics.columns["city"].values, [[row["city"]] for row in inside], index)
        check_values(statistics.columns["tags"].values, [(row["tags"] or "").split("|") for row in inside], index)


def check_numbers(numbers, values, index):
    values = [value for value in values if value is not None]
    assert numbers.count[index] == len(values)
    if values:
        assert numbers.mean[index] == pytest.approx(np.mean(values), rel=1e-12)
        assert numbers.std[index] == pytest.approx(np.std(values), rel=1e-9)
    if index == 0:
        assert numbers.zeros == sum(value == 0 for value in values)
        assert [numbers.minimum, numbers.maximum] == ([min(values), max(values)] if values else [None, None])
        assert numbers.histogram.count == len(values)
        if values:
            median = np.quantile(values, 0.5, method="inverted_cdf")
            assert numbers.histogram.quantiles([0.5]) == median


def check_values(summary, lists, index):
    expected = Counter(value for value in itertools.chain(*lists) if value)
    received = dict(zip(summary.values.to_pylist(), summary.rows[:, index].tolist(), strict=True))
    assert {value: count for value, count in received.items() if count} == expected
    assert summary.total[index] == expected.total()
    if index == 0:
        assert dict(summary.top.most_common(99)) == expected


def check_clicks(statistics, rows):
    for name in ("city", "price", "recent_items"):
        missing = [row["label"] for row in rows if not row[name] and row[name] != 0]
        assert statistics.columns[name].missing_clicks == sum(missing)
    for name, separator in (("city", "\n"), ("tags", "|")):
        expected = Counter()
        for row in rows:
            for value in (row[name] or "").split(separator):
                expected[value] += int(row["label"])
        summary = statistics.columns[name].values
        received = dict(zip(summary.values.to_pylist(), summary.clicks.tolist(), strict=True))
        assert received == {value: expected[value] for value in received}


@given(st.lists(st.lists(ROW, max_size=12), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_merged_parts_are_what_a_loop_over_the_rows_counts(shop_spec, parts):
    statistics = functools.reduce(
        lambda left, right: left.merge(right), (DataStatistics.of(table_of(part), shop_spec) for part in parts)
    )
    rows = list(itertools.chain(*parts))
    check_against_rows(statistics, rows)
    check_clicks(statistics, rows)


def test_lengths_and_distinct_values(shop_spec):
    base = {"user_id": "u1", "item_id": "i1", "price": 1.0, "age": 20, "label": 0.0}
    rows = [
        {**base, "city": "Oslo", "tags": "a|b", "recent_items": ["i1", "i2"]},
        {**base, "city": "Århus", "tags": "b", "recent_items": None},
        {**base, "city": None, "tags": "c|a", "recent_items": ["i1"]},
    ]
    columns = DataStatistics.of(table_of(rows), shop_spec).columns
    # Characters, not bytes; a missing text has no length, a missing history has length 0.
    assert columns["city"].lengths.quantiles([0.5, 1]).tolist() == [4, 5]
    assert columns["recent_items"].lengths.quantiles([0, 0.5, 1]).tolist() == [0, 1, 2]
    assert columns["recent_items"].distinct is None
    distinct = {name: columns[name].distinct.estimate for name in ("city", "tags", "age", "price", "user_id")}
    assert distinct == {"city": 2, "tags": 3, "age": 1, "price": 1, "user_id": 1}


def test_columns_are_numbers_ids_or_both_as_the_spec_uses_them(shop_content):
    shop_content["features"] += [{"name": "age_id", "type": "categorical", "column": "age"}]
    spec = parse_spec(shop_content, "shop")
    columns = DataStatistics.of(table_of([]), spec).columns
    assert [name for name, column in columns.items() if column.numbers] == ["price", "age"]
    assert [name for name, column in columns.items() if column.values] == ["item_id", "city", "tags", "age"]


def test_user_ids_are_never_stored(shop_spec):
    rows = [
        {"user_id": f"secret{i}", "item_id": "i", "city": "Oslo", "tags": None, "price": 1.0, "age": 3}
        | {"recent_items": [], "label": 1.0}
        for i in range(7)
    ]
    statistics = DataStatistics.of(table_of(rows), shop_spec)
    assert "secret" not in json.dumps(statistics.to_dict())
    assert statistics.columns["user_id"].distinct.estimate == 7


def many_cities(seed, num_rows=6000):
    """Cities of a long tail, more than are counted exactly."""
    random = np.random.default_rng(seed)
    cities = np.minimum(random.zipf(1.3, num_rows), 5000)
    base = {"user_id": "u", "item_id": "i", "tags": None, "price": 1.0, "recent_items": []}
    return [
        {**base, "city": f"c{city}", "age": int(random.integers(10, 80)), "label": float(city % 2)} for city in cities
    ]


def test_frequent_values_of_a_long_tail_are_within_the_error(shop_spec):
    parts = [many_cities(seed) for seed in range(3)]
    merged = functools.reduce(
        lambda left, right: left.merge(right), (DataStatistics.of(table_of(part), shop_spec) for part in parts)
    )
    summary = merged.columns["city"].values
    exact = Counter(row["city"] for row in itertools.chain(*parts))
    assert len(exact) > MAX_VALUES >= len(summary.values)
    assert summary.total[0] == 18_000
    assert 0 < summary.top.error <= 18_000 / 1001
    for value, count, rows, clicks in zip(
        summary.values.to_pylist(),
        summary.top.table.column("count").to_pylist(),
        summary.rows,
        summary.clicks.tolist(),
        strict=True,
    ):
        assert count <= rows[0] <= exact[value] <= count + summary.top.error
        assert rows[1:6].sum() == rows[0]  # The age groups.
        assert clicks == (rows[0] if int(value[1:]) % 2 else 0)


def test_served_requests_have_no_clicks_and_may_have_no_users(shop_spec):
    table = table_of(many_cities(0, 50)).drop_columns(["label"])
    table = table.set_column(table.column_names.index("user_hash"), "user_hash", pa.nulls(50, pa.int64()))
    requests = DataStatistics.of(table, shop_spec)
    assert not requests.has_labels
    assert requests.rows[0] == 50
    assert requests.clicks.tolist() == [0] * 10
    assert requests.users[0].estimate == 0
    assert not requests.merge(DataStatistics.of(table_of(many_cities(1, 5)), shop_spec)).has_labels


def test_statistics_survive_their_file(shop_spec, tmp_path):
    splits = {"train": DataStatistics.of(table_of(many_cities(0, 300)), shop_spec)}
    splits["test"] = DataStatistics.of(table_of([]), shop_spec)
    write_data_statistics(tmp_path / "data_statistics.json", splits)
    again = read_data_statistics(tmp_path / "data_statistics.json")
    assert {split: part.to_dict() for split, part in again.items()} == {
        split: part.to_dict() for split, part in splits.items()
    }


def test_statistics_of_two_specs_do_not_merge(shop_spec, shop_content):
    del shop_content["user_groups"][1]
    other = parse_spec(shop_content, "shop")
    with pytest.raises(ValueError, match="must be of one feature spec"):
        DataStatistics.of(table_of([]), shop_spec).merge(DataStatistics.of(table_of([]), other))


# --- Small groups ----------------------------------------------------------------------------------------------------


def users(*ids):
    return DistinctSketch.of_hashes(np.array(ids, np.int64))


def test_groups_of_few_users_become_other():
    groups = [users(1, 2), users(*range(5)), users(*range(9)), users()]
    # "other" with the 2 unknown users would still be too small, so F joins them; X has no users to protect.
    assert merged_labels(["unknown", "F", "M", "X"], groups, 5) == ["other", "other", "M", "X"]


def test_other_takes_in_groups_until_it_is_large_enough():
    # a and b share a user: together 3, too few. With c 6.
    groups = [users(1, 2), users(2, 3), users(4, 5, 6), users(*range(10, 20))]
    assert merged_labels(list("abcd"), groups, 3) == ["other", "other", "c", "d"]
    assert merged_labels(list("abcd"), groups, 4) == ["other", "other", "other", "d"]
    assert merged_labels(list("abcd"), groups, 1) == list("abcd")


def test_a_large_group_other_stays_as_it_is():
    assert merged_labels(["a", "other"], [users(1, 2, 3), users(4, 5, 6)], 3) == ["a", "other"]
    assert merged_labels(["a", "other"], [users(1, 2, 3), users(4)], 3) == ["other", "other"]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=60), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_no_group_is_shown_with_fewer_users_and_no_row_is_lost(rows, min_users):
    labels = ("unknown", "a", "b", "c", "d")
    ids, hashes = (np.array(column, np.int64) for column in zip(*rows, strict=True)) if rows else ([], [])
    ids, hashes = np.array(ids, np.int64), np.array(hashes, np.int64)
    new_ids, shown = merge_small_groups(ids, labels, hashes, min_users)
    sizes = {label: len(set(hashes[new_ids == index])) for index, label in enumerate(shown)}
    few = [label for label, size in sizes.items() if 0 < size < min_users]
    assert few in ([], ["other"])
    if few:  # Only where all users together are too few.
        assert sizes["other"] == len(set(hashes)) == max(sizes.values())
    for old, new in zip(ids, new_ids, strict=True):
        assert shown[new] in (labels[old], "other")


def test_statistics_of_merged_groups_are_those_of_the_union(shop_spec):
    rows = [row | {"user_id": f"u{i % 40}"} for i, row in enumerate(many_cities(3, 400))]
    for i, row in enumerate(rows):
        row["city"] = ["Rome", "Oslo", "Bonn", "Oslo"][i % 40 % 4]
        row["age"] = 70 if i % 40 < 3 else 10 if i % 40 < 5 else 40
        row["price"] = float(i)
    shown = DataStatistics.of(table_of(rows), shop_spec).merge_small_groups(5)
    # Ages: 3 users of 70, 2 of 10, 35 of 40. Cities: 10 users in Rome, 20 in Oslo, 10 elsewhere.
    assert shown.segments == (
        ALL_ROWS,
        ("age_group", "other"),
        ("age_group", "30.5-60"),
        ("city_group", "Rome"),
        ("city_group", "Oslo"),
        ("city_group", "other"),
    )
    young_or_old = [row for row in rows if row["age"] != 40]
    assert shown.rows.tolist() == [400, 50, 350, 100, 200, 100]
    assert shown.users[1].estimate == 5
    assert shown.clicks[1] == sum(row["label"] for row in young_or_old)
    check_numbers(shown.columns["price"].numbers, [row["price"] for row in young_or_old], 1)
    check_values(shown.columns["city"].values, [[row["city"]] for row in young_or_old], 1)
