"""The transform of a column's distinct values, gathered by row, is the transform of the rows: bit for bit."""

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.examples import arrow_to_tensors
from clsd_tf.data.transform import FeatureTransform, transform_distinct
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.model_inputs import NumericStatistics, RawInput, Statistics

VOCABULARIES = {"item": ["i7", "i1", "7"], "tags": ["a", "b", "ü"], "number": ["3", "-4"]}
SCALINGS = ("none", "standardise", "min_max", "quantile_buckets")
MULTI = {"buckets": 7, "method": "multi", "num_hashes": 3}
DIVIDED = {"buckets": 6, "method": "quotient_remainder", "seed": 5}
TYPES = {"item_id": pa.string(), "tags": pa.string(), "number": pa.int64(), "price": pa.float32(), "age": pa.int64()}


def content():
    columns = [("item_id", "string"), ("tags", "string"), ("number", "int64"), ("price", "float"), ("age", "int64")]
    columns += [("user_id", "string"), ("time", "int64"), ("clicked", "int64")]
    features = [
        {"name": "item", "type": "categorical", "column": "item_id", "vocabulary": {"num_oov_indices": 3}},
        {"name": "hashed_item", "type": "categorical", "column": "item_id", "hash_buckets": 5},
        {"name": "tags", "type": "multi_valued", "column": "tags", "separator": "|", "max_values": 2},
        {"name": "number", "type": "categorical", "column": "number"},
        {"name": "hashed_number", "type": "categorical", "column": "number", "hash_buckets": 5},
        {"name": "multi_item", "type": "categorical", "column": "item_id", "hash": MULTI},
        {"name": "divided_tags", "type": "multi_valued", "column": "tags", "separator": "|", "hash": DIVIDED},
        {"name": "past_items", "type": "history", "of": "item", "max_length": 3},
        {"name": "past_hashed", "type": "history", "of": "hashed_item", "max_length": 2},
        {"name": "past_multi", "type": "history", "of": "multi_item", "max_length": 2},
    ]
    for column in ("price", "age"):
        features += [
            {"name": f"{column}_{scaling}_{log}", "type": "numeric", "column": column, "scaling": scaling, "log1p": log}
            for scaling in SCALINGS
            for log in (False, True)
        ]
    return {
        "name": "feed",
        "tables": {
            "log": {"path": "x", "format": "csv", "columns": [{"name": name, "type": kind} for name, kind in columns]}
        },
        "user_key": "user_id",
        "item_key": "item_id",
        "event_time": {"column": "time", "unit": "seconds"},
        "label": "clicked == 1",
        "features": features,
        "user_groups": [
            {"name": "age_group", "column": "age", "boundaries": [18, 40]},
            {"name": "price_group", "column": "price", "boundaries": [0.5]},
            {"name": "tag_group", "column": "tags", "values": ["a", "a|b"]},
        ],
    }


SPEC = parse_spec(content(), "feed")


@pytest.fixture(scope="module")
def transform(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabularies")
    for name, values in VOCABULARIES.items():
        (path / f"{name}.txt").write_text("".join(f"{value}\n" for value in values), encoding="utf-8")
    statistics = NumericStatistics(9, 2.5, 1.7, -1.0, 30.0, boundaries=(0.5, 2.0, 7.0))
    numeric = {feature.name: statistics for feature in SPEC.features if feature.type == "numeric"}
    lengths = {name: len(values) for name, values in VOCABULARIES.items()}
    return FeatureTransform(SPEC, Statistics(lengths, numeric), path)


ITEMS = st.sampled_from(["i7", "i1", "7", "new", "ü", " i1", "\n"])
VALUES = {
    "item_id": st.one_of(st.none(), st.just(""), ITEMS),
    "tags": st.one_of(st.none(), st.sampled_from(["", "a", "a|b", "|", "b||ü|a", "x|a", "a|a"])),
    "number": st.one_of(st.none(), st.integers(-4, 4), st.integers(-(2**63) + 1, 2**63 - 1)),
    "price": st.one_of(st.none(), st.floats(width=32, allow_nan=False), st.sampled_from([0.5, 2.0, 7.0])),
    "age": st.one_of(st.none(), st.integers(-50, 120)),
}
HISTORIES = st.one_of(st.none(), st.lists(ITEMS, max_size=6))


@st.composite
def tables(draw):
    size = draw(st.integers(1, 12))
    columns = {
        name: pa.array(draw(st.lists(values, min_size=size, max_size=size)), TYPES[name])
        for name, values in VALUES.items()
    }
    for name in ("past_items", "past_hashed", "past_multi"):
        columns[name] = pa.array(draw(st.lists(HISTORIES, min_size=size, max_size=size)), pa.list_(pa.string()))
    return pa.table(columns)


def gathered(transform, table, entry):
    """One feature or user group of a table, by way of the distinct values of its column."""
    if entry.is_list:
        rows = [(values or [])[-entry.max_length :] for values in table.column(entry.name).to_pylist()]
        distinct = ["", *sorted({value for row in rows for value in row})]
        ids = transform.column(entry.name, tf.constant(distinct)).numpy()
        codes = [[distinct.index(value) for value in row] + [0] * (entry.max_length - len(row)) for row in rows]
        return ids[np.array(codes)].reshape([len(rows), -1])
    encoded = table.column(entry.column).combine_chunks().dictionary_encode(null_encoding="encode")
    raw = RawInput(entry.column, SPEC.column_types[entry.column])
    values = arrow_to_tensors(pa.table({entry.column: encoded.dictionary}), [raw])[entry.column]
    return transform.column(entry.name, values).numpy()[encoded.indices.to_numpy()]


@given(tables())
@settings(max_examples=30, deadline=None)
def test_gathering_the_transform_of_distinct_values_gives_the_transform_of_the_rows(transform, table):
    by_row = transform(arrow_to_tensors(table, SPEC.raw_inputs))
    assert by_row.keys() == {entry.name for entry in SPEC.entries}
    for entry in SPEC.entries:
        expected, received = by_row[entry.name].numpy(), gathered(transform, table, entry)
        assert (received.dtype, received.shape) == (expected.dtype, expected.shape), entry.name
        assert received.tobytes() == expected.tobytes(), entry.name


@given(tables())
@settings(max_examples=30, deadline=None)
def test_the_transform_of_distinct_values_in_a_build_is_that_of_a_request(transform, table):
    for history in (feature for feature in SPEC.features if feature.is_list):
        # As joins give them: never null, and not too long.
        rows = [(values or [])[-history.max_length :] for values in table.column(history.name).to_pylist()]
        column = pa.array(rows, pa.list_(pa.string()))
        table = table.set_column(table.column_names.index(history.name), history.name, column)
    by_row = transform(arrow_to_tensors(table, SPEC.raw_inputs))
    by_value = transform_distinct(transform, SPEC, table)
    assert by_value.keys() == by_row.keys()
    for name, expected in by_row.items():
        assert (by_value[name].dtype, by_value[name].shape) == (expected.numpy().dtype, expected.shape), name
        assert by_value[name].tobytes() == expected.numpy().tobytes(), name


def test_a_history_takes_single_values_of_any_shape(transform):
    # item: 0 missing, 1-3 out of vocabulary, then i7, i1, 7.
    assert transform.column("past_items", tf.constant([["i1", ""], ["i7", "7"]])).numpy().tolist() == [[5, 0], [4, 6]]


@pytest.mark.parametrize(("history", "of"), [("past_hashed", "hashed_item"), ("past_multi", "multi_item")])
def test_a_history_has_the_ids_of_the_feature_it_is_made_of(transform, history, of):
    items = tf.constant(["i1", "", "new", "7"])
    np.testing.assert_array_equal(transform.column(history, items), transform.column(of, items))


def test_a_name_outside_the_spec_is_refused(transform):
    with pytest.raises(KeyError, match="nothing"):
        transform.column("nothing", tf.constant(["a"]))


def test_a_number_is_transformed_alike_wherever_it_stands_in_a_batch(transform):
    # TensorFlow's float32 log1p is not: a fifth of these would differ in their last bits.
    prices = np.random.default_rng(0).lognormal(3, 3, 301).astype(np.float32)
    together = transform.column("price_standardise_True", tf.constant(prices)).numpy()
    alone = [
        transform.column("price_standardise_True", tf.constant(prices[row : row + 1])).numpy() for row in range(301)
    ]
    assert np.concatenate(alone).tobytes() == together.tobytes()
