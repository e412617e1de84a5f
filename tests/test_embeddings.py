"""Field embeddings: which rows they look up, and what padding and histories become."""

import contextlib
import dataclasses
from collections.abc import Mapping

import numpy as np
import pydantic
import pytest
import tensorflow as tf
from backbone_inputs import FEATURES, INPUTS

from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.layers.embeddings import FieldEmbeddings, SharedRows


@pytest.fixture
def embeddings():
    layer = FieldEmbeddings(INPUTS, EmbeddingConfig(dim=2))
    layer(FEATURES)
    random = np.random.default_rng(0)
    layer.set_weights([random.normal(size=weight.shape) for weight in layer.get_weights()])
    return layer


def _table(layer, vocabulary):
    """Rows of one vocabulary in the variable of all of them: 7 items, then 4 cities, then 5 tags."""
    rows_of = {"item": slice(0, 7), "city": slice(7, 11), "tags": slice(11, 16)}
    (tables,) = [weight.numpy() for weight in layer.weights if "tables" in weight.name]
    return tables[rows_of[vocabulary]]


def _history(layer, ids):
    row = {name: values[:1] for name, values in FEATURES.items()} | {"recent_items": tf.constant([ids], tf.int64)}
    return layer(row).numpy()[0, 2]


def test_fields_come_in_the_order_of_the_inputs(embeddings):
    received = embeddings(FEATURES).numpy()
    assert received.shape == (7, INPUTS.num_fields, 2)
    np.testing.assert_array_equal(received[:, 0], _table(embeddings, "item")[FEATURES["item"]])
    np.testing.assert_array_equal(received[:, 1], _table(embeddings, "city")[FEATURES["city"]])
    np.testing.assert_allclose(received[0, 3], _table(embeddings, "tags")[1:3].mean(axis=0), rtol=1e-6)
    vectors = next(w.numpy() for w in embeddings.weights if "numeric_vectors" in w.name)
    np.testing.assert_allclose(received[:, 4], FEATURES["price"].numpy()[:, None] * vectors[0], rtol=1e-6)
    np.testing.assert_allclose(received[:, 5], FEATURES["age"].numpy()[:, None] * vectors[1], rtol=1e-6)


def test_a_history_shares_the_rows_of_its_item(embeddings):
    np.testing.assert_allclose(_history(embeddings, [4, 0, 0]), _table(embeddings, "item")[4], rtol=1e-6)


def test_lookup_gives_the_rows_of_a_vocabulary_for_ids_of_any_shape(embeddings):
    for vocabulary, ids in (("item", [[6, 0], [1, 1]]), ("city", [3, 0]), ("tags", 4)):
        received = embeddings.lookup(vocabulary, tf.constant(ids, tf.int64))
        np.testing.assert_array_equal(received, _table(embeddings, vocabulary)[np.array(ids)])


def test_padding_does_not_enter_the_mean_of_a_history(embeddings):
    table = _table(embeddings, "item")
    np.testing.assert_allclose(_history(embeddings, [1, 5, 0]), (table[1] + table[5]) / 2, rtol=1e-6)
    np.testing.assert_allclose(_history(embeddings, [0, 5, 1]), (table[1] + table[5]) / 2, rtol=1e-6)


def test_repeated_values_count_each_time(embeddings):
    table = _table(embeddings, "item")
    np.testing.assert_allclose(_history(embeddings, [2, 2, 6]), (2 * table[2] + table[6]) / 3, rtol=1e-6)


def test_an_empty_history_is_the_zero_vector(embeddings):
    assert _history(embeddings, [0, 0, 0]).tolist() == [0.0, 0.0]


def test_padding_gets_no_gradient_from_a_history(embeddings):
    tables = next(weight for weight in embeddings.trainable_weights if "tables" in weight.name)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(embeddings(FEATURES)[:, 2])
    gradient = tf.convert_to_tensor(tape.gradient(total, tables)).numpy()
    assert not gradient[0].any()
    assert gradient[1:7].all()
    assert not gradient[7:].any()  # No other vocabulary's.


def test_field_embeddings_survive_get_config_and_from_config(embeddings):
    copy = FieldEmbeddings.from_config(embeddings.get_config())
    copy(FEATURES)
    copy.set_weights(embeddings.get_weights())
    np.testing.assert_array_equal(copy(FEATURES), embeddings(FEATURES))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("dim", 0), ("dim", 2.5), ("dim", True), ("l2", -1.0), ("init_scale", 0.0), ("unified_buckets", 0)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(pydantic.ValidationError, match=setting):
        EmbeddingConfig(**{setting: value})


def _gathers(function, *arguments):
    """Rows that each lookup in the tables of a traced function reads, from its static shapes."""
    graph = function.get_concrete_function(*arguments).graph
    found = [operation for operation in graph.get_operations() if operation.type == "ResourceGather"]
    return [operation.inputs[1].shape.as_list() for operation in found]


def test_shared_features_are_looked_up_once_per_value(embeddings):
    row_of = tf.constant([0, 0, 1, 1, 1, 0, 0], tf.int64)
    shared = {name: SharedRows(FEATURES[name][:2], row_of) for name in ("city", "recent_items")}
    mixed = FEATURES | shared
    np.testing.assert_array_equal(
        embeddings(mixed), embeddings(FEATURES | {name: values.repeated() for name, values in shared.items()})
    )
    # Two users with a city and three recent items; seven rows with an item and two tags.
    assert sorted(_gathers(tf.function(embeddings), mixed)) == [[2, 4], [7, 3]]


def test_float16_tables_are_the_rounded_ones(embeddings):
    before = embeddings(FEATURES).numpy()
    table = _table(embeddings, "item").astype(np.float16).astype(np.float32)
    embeddings.quantize("float16")
    received = embeddings(FEATURES).numpy()
    np.testing.assert_array_equal(received[:, 0], table[FEATURES["item"]])
    assert 0 < np.abs(received - before).max() < 2e-3
    assert embeddings.table_bytes == 16 * 2 * 2


def test_int8_tables_are_within_half_a_step_of_the_row(embeddings):
    table = _table(embeddings, "item")
    before = embeddings(FEATURES).numpy()
    embeddings.quantize("int8")
    received = embeddings.lookup("item", tf.range(7, dtype=tf.int64)).numpy()
    steps = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(received - table) <= steps / 2 + 1e-7).all()
    np.testing.assert_allclose(received / steps, np.round(table / steps), atol=1e-4)
    # A byte a number and a float32 a row.
    assert embeddings.table_bytes == 16 * (2 + 4)
    np.testing.assert_allclose(embeddings(FEATURES).numpy(), before, atol=steps.max())


def test_a_row_of_zeros_stays_one(embeddings):
    weights = [np.zeros_like(weight) for weight in embeddings.get_weights()]
    embeddings.set_weights(weights)
    embeddings.quantize("int8")
    assert np.all(embeddings(FEATURES).numpy() == 0.0)


def test_a_layer_of_numbers_cannot_be_quantized():
    layer = FieldEmbeddings(dataclasses.replace(INPUTS, categorical=()), EmbeddingConfig(dim=2))
    layer(FEATURES)
    with pytest.raises(ValueError, match="Received: a layer with numbers only"):
        layer.quantize("int8")


# Penalties, initial values, and one table for all.


def test_a_penalty_is_over_all_rows_or_over_those_of_the_batch_each_once():
    table = np.arange(32.0).reshape(16, 2)
    features = {name: values[:2] for name, values in FEATURES.items()}
    # Items 1 and 2, cities 0 and 1 (rows 7 and 8), tags 1 and 2 and padding (rows 12, 13 and 11).
    touched = [1, 2, 0, 7, 8, 12, 13, 11]
    assert set(features["recent_items"].numpy().flat) <= {0, 1}
    for l2_rows, rows in (("all", range(16)), ("touched", touched)):
        layer = FieldEmbeddings(INPUTS, EmbeddingConfig(dim=2, l2=0.5, l2_rows=l2_rows))
        layer(features)
        layer.set_weights([table, np.zeros([2, 2])])
        with tf.GradientTape() as tape:
            layer(features)
            penalty = tf.add_n(layer.losses)
        assert float(penalty) == pytest.approx(0.5 * (table[list(rows)] ** 2).sum())
        gradient = tf.convert_to_tensor(tape.gradient(penalty, layer.tables)).numpy()
        expected = np.zeros_like(table)
        expected[list(rows)] = table[list(rows)]  # 2 * .5 * row.
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_penalty_on_touched_rows_keeps_the_gradient_sparse():
    for l2_rows, kind in (("all", tf.Tensor), ("touched", tf.IndexedSlices)):
        layer = FieldEmbeddings(INPUTS, EmbeddingConfig(dim=2, l2=0.5, l2_rows=l2_rows))
        layer(FEATURES)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(FEATURES)) + tf.add_n(layer.losses)
        assert isinstance(tape.gradient(loss, layer.tables), kind)


def test_initial_values_have_the_scale_that_was_asked_for():
    inputs = dataclasses.replace(
        INPUTS, categorical=(dataclasses.replace(INPUTS.categorical[0], vocabulary_size=4000),), numeric=()
    )
    for initializer, low, high in (("normal", 0.27, 0.33), ("uniform", 0.16, 0.19)):  # Std of uniform: .3 / sqrt(3).
        tf.keras.utils.set_random_seed(1)
        layer = FieldEmbeddings(inputs, EmbeddingConfig(dim=3, initializer=initializer, init_scale=0.3))
        layer({"item": tf.constant([0], tf.int64)})
        assert low < layer.tables.numpy().std() < high
        assert (np.abs(layer.tables.numpy()).max() <= 0.3) == (initializer == "uniform")


def test_every_row_of_a_large_table_gets_an_initial_value_of_its_own():
    inputs = dataclasses.replace(
        INPUTS, categorical=(dataclasses.replace(INPUTS.categorical[0], vocabulary_size=150_000),), numeric=()
    )
    tables = []
    for scope in (contextlib.nullcontext, tf.distribute.OneDeviceStrategy("/cpu:0").scope):
        tf.keras.utils.set_random_seed(1)
        with scope():
            layer = FieldEmbeddings(inputs, EmbeddingConfig(dim=4, init_scale=0.3))
            layer({"item": tf.constant([0], tf.int64)})
        tables.append(layer.tables.numpy())
    np.testing.assert_array_equal(*tables)  # The seed decides all of it, with a strategy and without.
    assert len(np.unique(tables[0], axis=0)) == 150_000
    parts = np.array_split(tables[0], 100)
    np.testing.assert_allclose([part.std() for part in parts], 0.3, rtol=0.1)
    np.testing.assert_allclose([part.mean() for part in parts], 0.0, atol=0.03)


def test_row_ranges_say_where_each_vocabulary_lies(embeddings):
    assert embeddings.row_ranges == {"item": range(0, 7), "city": range(7, 11), "tags": range(11, 16)}
    assert FieldEmbeddings(INPUTS, EmbeddingConfig(dim=2, unified_buckets=5)).row_ranges == {"unified": range(5)}


def test_a_unified_table_spreads_all_values_and_histories_share_the_rows_of_their_items():
    entry = dataclasses.replace(INPUTS.categorical[0], vocabulary_size=20_000)
    other = dataclasses.replace(INPUTS.categorical[1], vocabulary_size=20_000)
    inputs = dataclasses.replace(INPUTS, categorical=(entry, other), numeric=())
    layer = FieldEmbeddings(inputs, EmbeddingConfig(dim=1, unified_buckets=100))
    ids = {name: tf.range(20_000, dtype=tf.int64) for name in ("item", "city")}
    layer(ids)
    layer.set_weights([np.arange(100.0)[:, None]])
    rows = layer(ids).numpy()[:, :, 0].astype(int)
    for column in rows.T:
        counts = np.bincount(column, minlength=100)
        assert counts.sum() == 20_000
        # 200 on average: chi-squared with 99 degrees of freedom, below its 99.99 % quantile.
        assert ((counts - 200) ** 2 / 200).sum() < 161
    # The two vocabularies meet as often as chance has them meet.
    assert 100 < (rows[:, 0] == rows[:, 1]).sum() < 300
    shared = FieldEmbeddings(INPUTS, EmbeddingConfig(dim=2, unified_buckets=1000))
    shared(FEATURES)
    np.testing.assert_array_equal(_history(shared, [4, 0, 0]), shared.lookup("item", tf.constant(4, tf.int64)))


def test_rows_of_a_unified_table_do_not_depend_on_the_sizes_of_vocabularies():
    grown = dataclasses.replace(
        INPUTS,
        categorical=tuple(dataclasses.replace(x, vocabulary_size=x.vocabulary_size + 9) for x in INPUTS.categorical),
    )
    layers = [FieldEmbeddings(inputs, EmbeddingConfig(dim=2, unified_buckets=50)) for inputs in (INPUTS, grown)]
    weights = None
    for layer in layers:
        layer(FEATURES)
        weights = weights or layer.get_weights()
        layer.set_weights(weights)
    np.testing.assert_array_equal(*(layer(FEATURES) for layer in layers))


def test_in_half_precision_the_tables_stay_float32_and_are_not_copied_to_be_looked_up():
    layer = FieldEmbeddings(INPUTS, EmbeddingConfig(dim=2), dtype="mixed_bfloat16")
    signature = {name: tf.TensorSpec([None, *ids.shape[1:]], ids.dtype) for name, ids in FEATURES.items()}
    graph = tf.function(layer).get_concrete_function(signature)
    assert layer(FEATURES).dtype == tf.bfloat16
    assert layer.tables.dtype == tf.float32
    operations = graph.graph.get_operations()
    readers = sorted(op.type for op in operations if any(x.dtype == tf.resource for x in op.inputs))
    assert readers == ["ReadVariableOp", "ResourceGather"]  # Of the vectors of numbers, and of the tables.


def test_keras_does_not_walk_through_the_rows_of_a_table(embeddings):
    # It flattens what a layer holds each time that variables are asked for: a range of rows would be all its numbers.
    held = [value for value in vars(embeddings).values() if isinstance(value, Mapping)]
    assert held
    assert not [value for mapping in held for value in mapping.values() if isinstance(value, range)]
