"""The one transform with ids worked out by hand, and the wire formats around it."""

import math

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.examples import (
    arrow_to_tensors,
    encode_examples,
    parse_raw_examples,
    parse_records,
    raw_tensor_specs,
    record_tensors,
)
from clsd_tf.data.transform import FeatureTransform, HashLookup, VocabularyLookup, as_text, group_ids, numeric_values
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.id_features import Hashing
from clsd_tf.spec.model_inputs import MISSING_INT64, NumericStatistics, Statistics
from clsd_tf.spec.number_features import NumericFeature
from clsd_tf.spec.user_groups import UserGroup

NAN = float("nan")
STATISTICS = Statistics(
    vocabulary_lengths={"item": 3, "user_city": 2, "item_tags": 4},
    numeric={
        # log1p prices: mean 1, standard deviation 0.5.
        "item_price": NumericStatistics(count=9, mean=1.0, std=0.5, minimum=0.0, maximum=2.0),
        "user_age": NumericStatistics(9, 35.0, 10.0, 18.0, 70.0, boundaries=(25.0, 35.0, 50.0)),
    },
)
# The shop's rules: item has 2 out-of-vocabulary ids, city and tags one.
ITEMS, CITIES, TAGS = ("i7", "i1", "i3"), ("Rome", "Oslo"), ("a", "b", "c", "ü")


@pytest.fixture(scope="module")
def vocabulary_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabularies")
    for name, values in (("item", ITEMS), ("user_city", CITIES), ("item_tags", TAGS)):
        (path / f"{name}.txt").write_text("".join(f"{value}\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def transform(shop_spec, vocabulary_dir):
    return FeatureTransform(shop_spec, STATISTICS, vocabulary_dir)


def raw_tensors(**columns):
    """Raw tensors of the shop; what is not given is missing."""
    size = len(next(iter(columns.values())))
    missing = {
        "user_id": [""] * size,
        "item_id": [""] * size,
        "city": [""] * size,
        "tags": [""] * size,
        "price": [NAN] * size,
        "age": [MISSING_INT64] * size,
        "recent_items": [[""]] * size,
    }
    dtypes = {"price": tf.float32, "age": tf.int64}
    values = {**missing, **columns}
    return {name: tf.constant(values[name], dtypes.get(name, tf.string)) for name in missing}


def numeric(scaling, values, log1p=False, dtype=tf.float32, **statistics):
    feature = NumericFeature(type="numeric", name="x", column="x", scaling=scaling, log1p=log1p)
    fitted = NumericStatistics(**{"count": 4, "mean": 10.0, "std": 2.0, "minimum": 5.0, "maximum": 25.0, **statistics})
    return numeric_values(feature, fitted, tf.constant(values, dtype)).numpy().tolist()


# --- Ids -------------------------------------------------------------------------------------------------------------


def test_known_values_get_their_line_number_behind_missing_and_oov(transform):
    # item: 0 missing, 1-2 out of vocabulary, then 3, 4, 5 by line. city: 0 missing, 1 oov, then 2, 3.
    outputs = transform(raw_tensors(item_id=["i7", "i1", "i3"], city=["Oslo", "Rome", ""]))
    assert outputs["item"].numpy().tolist() == [3, 4, 5]
    assert outputs["user_city"].numpy().tolist() == [3, 2, 0]


def test_missing_values_get_id_zero_everywhere(transform):
    outputs = transform(raw_tensors(user_id=[""]))
    for name in ("user", "item", "user_city", "user_age", "age_group", "city_group"):
        assert outputs[name].numpy().tolist() == [0], name
    assert outputs["item_tags"].numpy().tolist() == [[0, 0, 0]]
    assert outputs["recent_items"].numpy().tolist() == [[0, 0, 0]]


def test_out_of_vocabulary_values_are_hashed_into_the_oov_ids(transform):
    unknown = [f"new{index}" for index in range(100)]
    ids = transform(raw_tensors(item_id=unknown))["item"].numpy()
    assert set(ids) == {1, 2}
    assert np.array_equal(ids, transform(raw_tensors(item_id=unknown))["item"].numpy())
    assert transform(raw_tensors(city=["Paris", "ROME", " Rome"]))["user_city"].numpy().tolist() == [1, 1, 1]


def test_hash_buckets_give_ids_from_one_to_the_number_of_buckets(transform):
    ids = transform(raw_tensors(user_id=[f"u{index}" for index in range(1000)]))["user"].numpy()
    assert (ids.min(), ids.max()) == (1, 10)
    # 1,000 values in 10 buckets: 100 +- 9.5 each.
    assert np.bincount(ids)[1:] == pytest.approx(np.full(10, 100), abs=50)


def test_hash_is_farmhash_so_that_it_is_the_same_everywhere():
    # TensorFlow documents to_hash_bucket_fast(["Hello", "TensorFlow", "2.x"], 3) as [0, 2, 2]; missing shifts it by 1.
    lookup = HashLookup(Hashing(buckets=3))
    assert lookup(tf.constant(["Hello", "TensorFlow", "2.x", ""])).numpy().tolist() == [1, 3, 3, 0]


def test_vocabulary_lookup_of_integers_goes_by_their_decimal_text(tmp_path):
    (tmp_path / "x.txt").write_text("17\n-4\n", encoding="utf-8")
    lookup = VocabularyLookup(tmp_path / "x.txt", 1)
    values = tf.constant([17, -4, 5, MISSING_INT64], tf.int64)
    assert lookup(as_text(values)).numpy().tolist() == [2, 3, 1, 0]


def test_vocabulary_value_with_spaces_around_it_is_found(tmp_path):
    (tmp_path / "x.txt").write_text(" a\na b\n", encoding="utf-8")
    lookup = VocabularyLookup(tmp_path / "x.txt", 1)
    assert lookup(tf.constant([" a", "a b", "a"])).numpy().tolist() == [2, 3, 1]


def test_multi_valued_text_gives_the_first_ids_padded_with_zero(transform):
    # tags: 0 missing, 1 oov, a b c ü = 2 3 4 5; at most 3 values, empty pieces do not count.
    texts = ["a|b", "c", "", "x|ü", "a|b|c|ü", "|a||b|", "||"]
    expected = [[2, 3, 0], [4, 0, 0], [0, 0, 0], [1, 5, 0], [2, 3, 4], [2, 3, 0], [0, 0, 0]]
    assert transform(raw_tensors(tags=texts))["item_tags"].numpy().tolist() == expected


def test_multi_valued_ids_have_full_width_when_no_row_has_values(transform):
    assert transform(raw_tensors(tags=["", ""]))["item_tags"].shape == (2, 3)


def test_a_feature_that_shares_ids_reads_its_own_column_by_the_other_vocabulary(shop_content, vocabulary_dir):
    # The user's tags, of which only "b" and "ü" are tags of items: 0 missing, 1 oov, a b c ü = 2 3 4 5.
    shop_content["tables"]["user"]["columns"].append({"name": "likes", "type": "string"})
    shop_content["features"].append({"name": "liked", "type": "categorical", "column": "likes", "shares": "item_tags"})
    transform = FeatureTransform(parse_spec(shop_content, "shop"), STATISTICS, vocabulary_dir)
    raw = {"likes": tf.constant(["b", "ü", "d", ""])}
    assert transform(raw, inputs=["likes"])["liked"].numpy().tolist() == [3, 5, 1, 0]


# --- Histories -------------------------------------------------------------------------------------------------------


def test_history_shares_the_ids_of_its_feature_and_is_left_aligned(transform):
    histories = [["i1", "", "", "", ""], ["i3", "i7", "", "", ""], ["", "", "", "", ""]]
    ids = transform(raw_tensors(recent_items=histories))["recent_items"].numpy().tolist()
    assert ids == [[4, 0, 0], [5, 3, 0], [0, 0, 0]]


def test_too_long_history_keeps_the_last_values(transform):
    # Length 3 of "i7 i7 i1 i3 i1": the last three.
    ids = transform(raw_tensors(recent_items=[["i7", "i7", "i1", "i3", "i1"]]))["recent_items"].numpy().tolist()
    assert ids == [[4, 5, 4]]


def test_history_of_an_empty_batch_of_values_has_full_width(transform):
    raw = raw_tensors(user_id=["u1", "u2"])
    raw["recent_items"] = tf.zeros([2, 0], tf.string)
    assert transform(raw)["recent_items"].numpy().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_missing_entries_inside_a_history_take_no_place(transform):
    ids = transform(raw_tensors(recent_items=[["i7", "", "i1", "", "i3"]]))["recent_items"].numpy().tolist()
    assert ids == [[3, 4, 5]]


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_standardised_numbers_and_missing_as_the_mean():
    # (8 - 10) / 2, (10 - 10) / 2, (15 - 10) / 2; missing is the mean, so 0.
    assert numeric("standardise", [8.0, 10.0, 15.0, NAN]) == [-1.0, 0.0, 2.5, 0.0]


def test_standardising_a_constant_column_divides_by_one():
    assert numeric("standardise", [10.0, 12.0], std=0.0) == [0.0, 2.0]


def test_min_max_scaled_numbers():
    # (x - 5) / 20; missing is the mean 10 -> 0.25; outside the training range the line goes on.
    assert numeric("min_max", [5.0, 25.0, 15.0, NAN, 45.0]) == [0.0, 1.0, 0.5, 0.25, 2.0]


def test_min_max_of_a_constant_column_divides_by_one():
    assert numeric("min_max", [5.0, 6.0], maximum=5.0) == [0.0, 1.0]


def test_unscaled_numbers_and_missing_as_the_mean():
    assert numeric("none", [3.0, NAN]) == [3.0, 10.0]


def test_log1p_comes_before_scaling():
    # log(1 + (e^3 - 1)) = 3, then (3 - 1) / 0.5; missing stays the mean of the logarithms: 0.
    values = numeric("standardise", [math.e**3 - 1, 0.0, NAN], log1p=True, mean=1.0, std=0.5)
    assert values == pytest.approx([4.0, -2.0, 0.0], abs=1e-5)


def test_log1p_of_a_negative_request_is_that_of_zero():
    assert numeric("none", [-3.0], log1p=True) == [0.0]


def test_integer_numbers_know_their_missing_value():
    assert numeric("standardise", [12, MISSING_INT64], dtype=tf.int64) == [1.0, 0.0]


def test_quantile_buckets_count_the_boundaries_at_or_below_the_value(transform):
    # Boundaries 25, 35, 50: below 25 is bucket 1, 25 itself bucket 2.
    ages = [1, 24, 25, 34, 35, 50, 99, MISSING_INT64]
    assert transform(raw_tensors(age=ages))["user_age"].numpy().tolist() == [1, 1, 2, 2, 3, 4, 4, 0]


def test_quantile_buckets_without_boundaries_are_one_bucket():
    assert numeric("quantile_buckets", [1.0, 100.0, NAN], boundaries=()) == [1, 1, 0]


def test_numbers_are_float32_and_ids_int64(transform, shop_spec):
    outputs = transform(raw_tensors(user_id=["u1"]))
    inputs = shop_spec.model_inputs(STATISTICS.vocabulary_lengths)
    for entry in (*inputs.categorical, *inputs.groups):
        assert outputs[entry.name].dtype == tf.int64
    assert outputs["item_price"].dtype == tf.float32
    assert set(outputs) == {entry.name for entry in (*inputs.categorical, *inputs.groups)} | set(inputs.numeric)


# --- User groups -----------------------------------------------------------------------------------------------------


def test_group_ids_of_boundaries(transform):
    # 18, 30.5, 60: <18, [18, 30.5), [30.5, 60), >= 60; 0 is unknown.
    ages = [0, 17, 18, 30, 31, 59, 60, 99, MISSING_INT64]
    assert transform(raw_tensors(age=ages))["age_group"].numpy().tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 0]


def test_group_ids_of_values(transform):
    cities = ["Rome", "Oslo", "Paris", "", "rome"]
    assert transform(raw_tensors(city=cities))["city_group"].numpy().tolist() == [1, 2, 3, 0, 3]


def test_group_ids_of_a_float_column():
    group = UserGroup(name="g", column="x", boundaries=(0.5,))
    assert group_ids(group, tf.constant([0.25, 0.5, NAN])).numpy().tolist() == [1, 2, 0]


def test_every_group_id_has_a_label(transform, shop_spec):
    outputs = transform(raw_tensors(age=list(range(120)), city=["Paris"] * 120))
    for group in shop_spec.user_groups:
        assert outputs[group.name].numpy().max() == len(group.labels) - 1


# --- Examples --------------------------------------------------------------------------------------------------------


def example_values(serialized):
    """A serialized tf.Example as {name: list}, read by the reference implementation."""
    feature_map = tf.train.Example.FromString(serialized).features.feature
    return {name: list(getattr(entry, entry.WhichOneof("kind")).value) for name, entry in feature_map.items()}


FLOATS = st.floats(width=32, allow_nan=False)
INTS = st.integers(-(2**63), 2**63 - 1)
BYTES = st.binary(max_size=12)


@st.composite
def example_batches(draw):
    size = draw(st.integers(1, 4))

    def column(values):
        return draw(st.lists(values, min_size=size, max_size=size))

    return {
        "number": column(FLOATS),
        "id": column(INTS),
        "text": column(BYTES),
        "ids": column(st.lists(INTS, min_size=3, max_size=3)),
        "texts": column(st.lists(BYTES, max_size=4)),
    }


def encoded(batch):
    return encode_examples(
        {
            "number": tf.constant(batch["number"], tf.float32),
            "id": tf.constant(batch["id"], tf.int64),
            "text": tf.constant(batch["text"], tf.string),
            "ids": tf.constant(batch["ids"], tf.int64),
            "texts": tf.ragged.constant(batch["texts"], tf.string, ragged_rank=1),
        }
    ).numpy()


@given(example_batches())
@settings(max_examples=30, deadline=None)
def test_encoded_examples_are_read_back_by_tf_train_example(batch):
    for row, serialized in enumerate(encoded(batch)):
        assert example_values(serialized) == {
            "number": [batch["number"][row]],
            "id": [batch["id"][row]],
            "text": [batch["text"][row]],
            "ids": batch["ids"][row],
            "texts": batch["texts"][row],
        }


@given(example_batches())
@settings(max_examples=30, deadline=None)
def test_encoded_examples_are_read_back_by_parse_example(batch):
    spec = {
        "number": tf.io.FixedLenFeature([], tf.float32),
        "id": tf.io.FixedLenFeature([], tf.int64),
        "text": tf.io.FixedLenFeature([], tf.string),
        "ids": tf.io.FixedLenFeature([3], tf.int64),
        "texts": tf.io.RaggedFeature(tf.string),
    }
    parsed = tf.io.parse_example(encoded(batch), spec)
    assert parsed["number"].numpy().tolist() == batch["number"]
    assert parsed["id"].numpy().tolist() == batch["id"]
    assert parsed["text"].numpy().tolist() == batch["text"]
    assert parsed["ids"].numpy().tolist() == batch["ids"]
    assert parsed["texts"].to_list() == batch["texts"]


def test_nan_survives_the_encoding():
    [serialized] = encode_examples({"x": tf.constant([NAN])}).numpy()
    assert math.isnan(example_values(serialized)["x"][0])


def test_the_same_batch_is_encoded_to_the_same_bytes_in_any_order_of_names():
    values = {"b": tf.constant([1]), "a": tf.constant([2.0])}
    values["b"] = tf.cast(values["b"], tf.int64)
    assert encode_examples(values).numpy().tolist() == encode_examples(dict(reversed(values.items()))).numpy().tolist()


@pytest.mark.parametrize(("layout", "num_entries"), [("named", 16), ("packed", 2)])
def test_transformed_record_is_read_back_in_either_layout(transform, shop_spec, layout, num_entries):
    raw = raw_tensors(item_id=["i1", "new"], tags=["a|b", ""], price=[NAN, 0.0], age=[20, 70])
    outputs = transform(raw)
    record = {
        "label": tf.constant([1.0, 0.0]),
        "intensity_label": tf.constant([0.0, 0.0]),
        "intensity_value": tf.constant([12.5, 0.0]),
        "sample_weight": tf.constant([0.5, 1.0]),
        "user_hash": tf.constant([2**62, 3], tf.int64),
        "row_id": tf.constant([(1 << 40) + 2, 3], tf.int64),
        "event_time": tf.constant([1_700_000_000_000_000, 0], tf.int64),
    }
    inputs = shop_spec.model_inputs(STATISTICS.vocabulary_lengths)
    serialized = encode_examples(record_tensors({**outputs, **record}, inputs, layout))
    assert len(tf.train.Example.FromString(serialized.numpy()[0]).features.feature) == num_entries
    parsed = parse_records(serialized, inputs, layout)
    for name, expected in {**outputs, **record}.items():
        assert parsed[name].numpy().tolist() == expected.numpy().tolist(), name


# --- The route of a serving request ----------------------------------------------------------------------------------


def test_raw_example_without_features_gives_missing_ids(transform, shop_spec):
    empty = tf.constant([tf.train.Example().SerializeToString()])
    outputs = transform(parse_raw_examples(empty, shop_spec.raw_inputs))
    for name in ("user", "item", "user_city", "user_age", "age_group", "city_group"):
        assert outputs[name].numpy().tolist() == [0], name
    assert outputs["item_tags"].numpy().tolist() == [[0, 0, 0]]
    assert outputs["recent_items"].numpy().tolist() == [[0, 0, 0]]
    assert outputs["item_price"].numpy().tolist() == [0.0]  # The training mean, standardised.


def test_raw_examples_give_the_same_ids_as_raw_columns(transform, shop_spec):
    table = pa.table(
        {
            "user_id": ["u1", None, "u3"],
            "item_id": ["i1", "new", None],
            "city": pa.array(["Rome", None, "Zürich"]),
            "tags": pa.array(["a|b|c|ü", None, "x"]),
            "price": pa.array([3.5, None, 0.0]),
            "age": pa.array([17, 60, None], pa.int64()),
            "recent_items": pa.array([["i1", "i7"], [], None], pa.list_(pa.string())),
        }
    )
    by_column = transform(arrow_to_tensors(table, shop_spec.raw_inputs))
    requests = tf.constant([request(row) for row in table.to_pylist()])
    by_example = transform(parse_raw_examples(requests, shop_spec.raw_inputs))
    for name, expected in by_column.items():
        assert by_example[name].numpy().tolist() == expected.numpy().tolist(), name
    assert by_column["recent_items"].numpy().tolist() == [[4, 3, 0], [0, 0, 0], [0, 0, 0]]
    assert by_column["user_age"].numpy().tolist() == [1, 4, 0]


def request(row):
    """A serving request: a tf.Example of the values that are there."""
    features = {}
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        if value is None:
            continue
        if isinstance(value, int):
            features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        elif isinstance(value, float):
            features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
        else:
            texts = [text.encode() for text in values]
            features[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=texts))
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def test_arrow_columns_in_chunks_and_slices_keep_their_rows(shop_spec):
    inputs = [entry for entry in shop_spec.raw_inputs if entry.name in ("item_id", "recent_items", "age")]
    part = pa.table(
        {
            "item_id": ["i1", None],
            "recent_items": pa.array([["i1", "i2"], ["i3"]], pa.list_(pa.string())),
            "age": pa.array([1, None], pa.int64()),
        }
    )
    tensors = arrow_to_tensors(pa.concat_tables([part, part]).slice(1, 2), inputs)
    assert tensors["item_id"].numpy().tolist() == [b"", b"i1"]
    assert tensors["recent_items"].numpy().tolist() == [[b"i3", b""], [b"i1", b"i2"]]
    assert tensors["age"].numpy().tolist() == [MISSING_INT64, 1]


def test_arrow_histories_that_are_all_empty_give_a_tensor_of_width_zero(shop_spec):
    inputs = [entry for entry in shop_spec.raw_inputs if entry.name == "recent_items"]
    table = pa.table({"recent_items": pa.array([[], []], pa.list_(pa.string()))})
    assert arrow_to_tensors(table, inputs)["recent_items"].shape == (2, 0)


def test_transform_accepts_the_declared_tensor_specs_as_a_graph(transform, shop_spec):
    specs = raw_tensor_specs(shop_spec.raw_inputs)
    graph = tf.function(transform.__call__, input_signature=[specs], autograph=False)
    raw = raw_tensors(item_id=["i1", "new"], recent_items=[["i1", "i3"], ["", ""]], age=[20, 61])
    eager = transform(raw)
    for name, values in graph(raw).items():
        assert values.numpy().tolist() == eager[name].numpy().tolist(), name


def test_hash_bucketed_integer_key_equals_its_text(shop_content, vocabulary_dir):
    shop_content["tables"]["log"]["columns"][0]["type"] = "int64"
    shop_content["tables"]["user"]["columns"][0]["type"] = "int64"
    by_number = FeatureTransform(parse_spec(shop_content, "shop"), STATISTICS, vocabulary_dir)
    raw = raw_tensors(item_id=["i1", "i1"])
    raw["user_id"] = tf.constant([17, MISSING_INT64], tf.int64)
    expected = [1 + int(tf.strings.to_hash_bucket_fast("17", 10)), 0]
    assert by_number(raw)["user"].numpy().tolist() == expected


def test_a_constant_column_is_not_blown_up_by_rounding_error():
    # 1,000 times 0.1 has a computed std of about 1e-17; a served 0.2 must stay near 0.
    feature = NumericFeature(type="numeric", name="x", column="x")
    statistics = NumericStatistics(1000, 0.1, 1.4e-17, 0.1, 0.1)
    assert numeric_values(feature, statistics, tf.constant([0.1, 0.2])).numpy() == pytest.approx([0.0, 0.1], abs=1e-6)


def test_a_long_history_does_not_make_the_others_of_its_batch_long(transform, shop_spec):
    """40,000 values in one of 500 rows: padded to the longest, they would be 20 million."""
    long = tf.train.Example()
    long.features.feature["recent_items"].bytes_list.value.extend([b"i1"] * 39_999 + [b"i3"])
    requests = tf.constant([long.SerializeToString(), *[b""] * 499])
    raw = parse_raw_examples(requests, shop_spec.raw_inputs)
    assert raw["recent_items"].values.shape == [40_000]
    graph = tf.function(transform).get_concrete_function(raw).graph
    padded = [operation.outputs[0] for operation in graph.get_operations() if operation.type == "RaggedTensorToTensor"]
    assert padded
    assert all(output.shape[1] is not None for output in padded)  # To a declared length, not to the longest.
    ids = transform(raw)["recent_items"].numpy()
    assert ids[0].tolist() == [4, 4, 5]
    assert not ids[1:].any()
