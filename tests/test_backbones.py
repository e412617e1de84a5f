"""One contract for every backbone, and each formula by hand."""

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf.backbones import BACKBONES, build_backbone
from clsd_tf.backbones.deepfm import pairwise_interactions
from clsd_tf.embeddings import FieldEmbeddings
from clsd_tf.model_inputs import CategoricalInput, GroupInput, ModelInputs

INPUTS = ModelInputs(
    categorical=(
        CategoricalInput("item", "item", 7),
        CategoricalInput("city", "city", 4),
        CategoricalInput("recent_items", "item", 7, max_values=3),
    ),
    numeric=("price", "age"),
    groups=(GroupInput("age_group", ("unknown", "young")),),
)
FEATURES = {
    "item": tf.constant([1, 2, 6, 0, 3], tf.int64),
    "city": tf.constant([0, 1, 2, 3, 1], tf.int64),
    "recent_items": tf.constant([[0, 0, 0], [1, 0, 0], [1, 2, 3], [6, 5, 0], [4, 4, 4]], tf.int64),
    "price": tf.constant([0.0, 1.5, -2.0, 0.5, 3.0]),
    "age": tf.constant([1.0, -1.0, 0.0, 2.0, -0.5]),
}
EXTRAS = {
    "age_group": tf.constant([0, 1, 1, 0, 1], tf.int64),
    "row_id": tf.constant([5, 6, 7, 8, 9], tf.int64),
    "teacher_score": tf.constant([0.1, 0.2, 0.3, 0.4, 0.5]),
}
ARGUMENTS = {"embedding_dim": 4, "hidden_units": (8, 5), "dropout": 0.0}
every_backbone = pytest.mark.parametrize("name", sorted(BACKBONES))


def randomised(backbone):
    """Builds the backbone and gives it weights large enough for every part to matter."""
    backbone(FEATURES)
    random = np.random.default_rng(3)
    backbone.set_weights([random.normal(0, 0.5, weight.shape) for weight in backbone.get_weights()])
    return backbone


@pytest.fixture
def _bfloat16():
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield
    tf.keras.mixed_precision.set_global_policy("float32")


def check_backbone(backbone, features, extras, tmp_path):
    """The contract of a backbone: what ClsdModel, checkpoints and export rely on."""
    logits = backbone(features)
    assert logits.shape == [len(next(iter(features.values())))]
    assert logits.dtype == tf.float32
    assert np.isfinite(logits).all()
    assert len(set(logits.numpy())) > 1
    assert backbone({name: values[:1] for name, values in features.items()}).shape == [1]
    _check_row_by_row(backbone, features, logits)
    _check_gradients(backbone, features)
    np.testing.assert_array_equal(backbone({**features, **extras}), logits)
    _check_rebuilt(backbone, features, logits, tmp_path)


def _check_row_by_row(backbone, features, logits):
    """No row sees another row of its batch."""
    rows = [{name: values[i : i + 1] for name, values in features.items()} for i in range(len(logits))]
    alone = [float(backbone(row)[0]) for row in rows]
    np.testing.assert_allclose(alone, logits, rtol=1e-5, atol=1e-5)


def _check_gradients(backbone, features):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(backbone(features, training=True)))
    variables = backbone.trainable_variables
    assert any("embeddings" in variable.name for variable in variables)
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        assert gradient is not None, variable.name
        dense = tf.convert_to_tensor(gradient).numpy()
        assert np.isfinite(dense).all(), variable.name
        assert dense.any(), variable.name


def _check_rebuilt(backbone, features, logits, tmp_path):
    copy = type(backbone).from_config(backbone.get_config())
    assert not np.array_equal(copy(features), logits)
    copy.set_weights(backbone.get_weights())
    np.testing.assert_array_equal(copy(features), logits)
    for index, file in enumerate(("weights", "model.weights.h5")):
        path = str(tmp_path / file)
        backbone.save_weights(path)
        loaded = type(backbone).from_config(backbone.get_config())
        loaded(features)
        loaded.load_weights(path)
        np.testing.assert_array_equal(loaded(features), logits, err_msg=f"format {index}: {file}")


@every_backbone
def test_backbone_keeps_the_contract(name, tmp_path):
    check_backbone(randomised(build_backbone(name, INPUTS, **ARGUMENTS)), FEATURES, EXTRAS, tmp_path)


@every_backbone
def test_backbone_config_is_plain_data_that_rebuilds_every_argument(name):
    backbone = build_backbone(name, INPUTS, embedding_dim=3, hidden_units=[6], dropout=0.25)
    config = backbone.get_config()
    assert config["inputs"] == INPUTS.to_dict()
    assert {key: config[key] for key in ("embedding_dim", "hidden_units", "dropout")} == {
        "embedding_dim": 3,
        "hidden_units": [6],
        "dropout": 0.25,
    }
    assert type(backbone).from_config(config).get_config() == config


@every_backbone
@pytest.mark.usefixtures("_bfloat16")
def test_logits_are_float32_under_a_bfloat16_policy(name):
    backbone = build_backbone(name, INPUTS, **ARGUMENTS)
    logits = backbone(FEATURES)
    assert logits.dtype == tf.float32
    assert np.isfinite(logits).all()
    assert {variable.dtype for variable in backbone.trainable_variables} == {tf.float32}


@every_backbone
def test_every_feature_moves_the_logits(name):
    backbone = randomised(build_backbone(name, INPUTS, **ARGUMENTS))
    logits = backbone(FEATURES).numpy()
    for feature, values in FEATURES.items():
        changed = tf.reverse(values, axis=[0])
        assert not np.allclose(backbone({**FEATURES, feature: changed}), logits), feature


@every_backbone
def test_dropout_acts_in_training_only(name):
    backbone = randomised(build_backbone(name, INPUTS, embedding_dim=4, hidden_units=(32,), dropout=0.5))
    logits = backbone(FEATURES).numpy()
    np.testing.assert_array_equal(backbone(FEATURES, training=False), logits)
    assert not np.allclose(backbone(FEATURES, training=True), logits)


@every_backbone
def test_inputs_may_be_only_categorical_or_only_numeric(name):
    only_categorical = ModelInputs(categorical=INPUTS.categorical, numeric=(), groups=())
    only_numeric = ModelInputs(categorical=(), numeric=INPUTS.numeric, groups=())
    for inputs in (only_categorical, only_numeric):
        assert build_backbone(name, inputs, **ARGUMENTS)(FEATURES).shape == [5]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Received: 'deep_fm'. Allowed: dcnv2, deepfm, dnn"):
        build_backbone("deep_fm", INPUTS)


@every_backbone
@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range_is_refused(name, dropout):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\). Received: {dropout}"):
        build_backbone(name, INPUTS, dropout=dropout)


def test_dcnv2_refuses_no_cross_layer():
    with pytest.raises(ValueError, match=r"num_cross_layers must be at least 1. Received: 0"):
        build_backbone("dcnv2", INPUTS, num_cross_layers=0)


def test_embedding_dim_of_0_is_refused():
    with pytest.raises(ValueError, match=r"embedding_dim must be at least 1. Received: 0"):
        FieldEmbeddings(INPUTS, 0)


# Formulas by hand: one item, one price, embeddings of 2, two hidden units, every matrix 1.
# item -> [1, 1] and price 2 -> [2, 2], price -3 -> [-3, -3].
_TWO_FIELDS = ModelInputs(categorical=(CategoricalInput("item", "item", 3),), numeric=("price",), groups=())
_TWO_ROWS = {"item": tf.constant([1, 2], tf.int64), "price": tf.constant([2.0, -3.0])}


def _logits_with_matrices_of_1(name, *, biases, **arguments):
    backbone = build_backbone(name, _TWO_FIELDS, embedding_dim=2, hidden_units=(2,), **arguments)
    backbone(_TWO_ROWS)
    backbone.set_weights(
        [np.full(weight.shape, biases if weight.ndim == 1 else 1.0) for weight in backbone.get_weights()]
    )
    return backbone(_TWO_ROWS).numpy()


def test_dnn_by_hand():
    # Hidden relu(1 + 1 + 2 + 2 + 1) = 7, twice -> 7 + 7 + 1 = 15. With -3: relu(1 + 1 - 3 - 3 + 1) = 0 -> 1.
    assert _logits_with_matrices_of_1("dnn", biases=1.0) == pytest.approx([15.0, 1.0])


def test_deepfm_by_hand():
    # First order 1 + 2 = 3, <[1, 1], [2, 2]> = 4, deep 15 -> 22. With -3: first order -2, product -6, deep 1 -> -7.
    assert _logits_with_matrices_of_1("deepfm", biases=1.0) == pytest.approx([22.0, -7.0])


def test_dcnv2_by_hand():
    # x0 = [1, 1, 2, 2], sum 6. x1 = x0 * (6 + 2) + x0 = 9 x0; x2 = x0 * (54 + 2) + 9 x0 = 65 x0, sum 390.
    # Hidden 6 + 2 = 8, twice: 390 + 16 + 2 = 408.
    # x0 = [1, 1, -3, -3], sum -4. x1 = x0 * (-4 + 2) + x0 = -x0; x2 = x0 * (4 + 2) - x0 = 5 x0, sum -20.
    # Hidden relu(-2) = 0: -20 + 0 + 2 = -18.
    assert _logits_with_matrices_of_1("dcnv2", biases=2.0) == pytest.approx([408.0, -18.0])


def test_dcnv2_with_one_cross_layer_by_hand():
    # x1 = 9 x0, sum 54; + 16 + 2 = 72. And -x0, sum 4; + 0 + 2 = 6.
    assert _logits_with_matrices_of_1("dcnv2", biases=2.0, num_cross_layers=1) == pytest.approx([72.0, 6.0])


def test_pairwise_interactions_equal_a_double_loop():
    embeddings = np.random.default_rng(0).normal(size=[6, 5, 3])
    expected = [sum(row[i] @ row[j] for i in range(len(row)) for j in range(i + 1, len(row))) for row in embeddings]
    assert pairwise_interactions(tf.constant(embeddings)).numpy() == pytest.approx(np.array(expected))


def test_pairwise_interactions_of_one_field_are_0():
    assert pairwise_interactions(tf.constant([[[2.0, 3.0]]])).numpy().tolist() == [0.0]


# Field embeddings.


@pytest.fixture
def embeddings():
    layer = FieldEmbeddings(INPUTS, 2)
    layer(FEATURES)
    random = np.random.default_rng(0)
    layer.set_weights([random.normal(size=weight.shape) for weight in layer.get_weights()])
    return layer


def _table(layer, vocabulary):
    return next(w.numpy() for w in layer.weights if f"table_{vocabulary}/" in w.name)


def _history(layer, ids):
    row = {name: values[:1] for name, values in FEATURES.items()} | {"recent_items": tf.constant([ids], tf.int64)}
    return layer(row).numpy()[0, 2]


def test_fields_come_in_the_order_of_the_inputs(embeddings):
    received = embeddings(FEATURES).numpy()
    assert received.shape == (5, INPUTS.num_fields, 2)
    np.testing.assert_array_equal(received[:, 0], _table(embeddings, "item")[FEATURES["item"]])
    np.testing.assert_array_equal(received[:, 1], _table(embeddings, "city")[FEATURES["city"]])
    vectors = next(w.numpy() for w in embeddings.weights if "numeric_vectors" in w.name)
    np.testing.assert_allclose(received[:, 3], FEATURES["price"].numpy()[:, None] * vectors[0], rtol=1e-6)
    np.testing.assert_allclose(received[:, 4], FEATURES["age"].numpy()[:, None] * vectors[1], rtol=1e-6)


def test_a_history_shares_the_table_of_its_item(embeddings):
    assert len(embeddings.weights) == 3  # item, city, numeric vectors.
    np.testing.assert_allclose(_history(embeddings, [4, 0, 0]), _table(embeddings, "item")[4], rtol=1e-6)


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
    table = next(w for w in embeddings.trainable_weights if "table_item/" in w.name)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(embeddings(FEATURES)[:, 2])
    gradient = tf.convert_to_tensor(tape.gradient(total, table)).numpy()
    assert not gradient[0].any()
    assert gradient[1:].all()


def test_field_embeddings_survive_get_config_and_from_config(embeddings):
    copy = FieldEmbeddings.from_config(embeddings.get_config())
    copy(FEATURES)
    copy.set_weights(embeddings.get_weights())
    np.testing.assert_array_equal(copy(FEATURES), embeddings(FEATURES))
