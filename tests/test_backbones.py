"""The contract of a backbone: what ClsdModel, checkpoints and export rely on."""

import numpy as np
import pytest
import tensorflow as tf
from backbone_inputs import (
    ARGUMENTS,
    EXTRAS,
    FEATURES,
    INPUTS,
    NAMES,
    built,
    every_backbone,
    registry,  # noqa: F401  An autouse fixture acts on the modules that import it.
    rows,
)

from clsd_tf.backbones import build_backbone
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.layers.embeddings import FieldEmbeddings, SharedRows
from clsd_tf.spec.model_inputs import ModelInputs

# Backbones, their structures that an argument selects, and the model of the package docstring.
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("autoint", {"hidden_units": ()}),
    ("masknet", {"structure": "serial"}),
    ("din", {"activation": "dice"}),
    ("two_layers", {}),
]
every_variant = pytest.mark.parametrize(
    ("name", "own"), VARIANTS, ids=["-".join([name, *map(str, own.values())]) for name, own in VARIANTS]
)


@pytest.fixture
def _bfloat16():
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield
    tf.keras.mixed_precision.set_global_policy("float32")


def rebuilt(backbone):
    """A new model of the same config, with all its variables."""
    custom_objects = {"FieldEmbeddings": FieldEmbeddings}
    copy = type(backbone).from_config(backbone.get_config(), custom_objects=custom_objects)
    copy(FEATURES)
    return copy


@every_variant
@pytest.mark.filterwarnings("ignore:Input dict contained keys")  # Keras says so of functional models.
def test_logits_are_one_float32_a_row_and_see_that_row_only(name, own):
    backbone = built(name, **own)
    logits = backbone(FEATURES)
    assert logits.shape in ([7], [7, 1])
    assert logits.dtype == tf.float32
    assert np.isfinite(logits).all()
    assert len(np.unique(logits)) == 7
    alone = np.concatenate([backbone(rows(FEATURES, slice(i, i + 1))) for i in range(7)])
    np.testing.assert_allclose(alone, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(backbone({**FEATURES, **EXTRAS}), logits)


@every_variant
def test_a_graph_for_any_batch_size_gives_the_same_logits(name, own):
    backbone = built(name, **own)
    signature = {key: tf.TensorSpec([None, *values.shape[1:]], values.dtype) for key, values in FEATURES.items()}
    graph = tf.function(lambda features: backbone(features)).get_concrete_function(signature)
    for batch in (FEATURES, rows(FEATURES, slice(0, 1))):
        np.testing.assert_allclose(graph(batch), backbone(batch), rtol=1e-4, atol=1e-5)


@every_variant
def test_every_variable_gets_a_finite_gradient(name, own):
    backbone = built(name, **own)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(backbone(FEATURES, training=True)))
    variables = backbone.trainable_variables
    assert any("embeddings" in variable.name for variable in variables)
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        assert gradient is not None, variable.name
        dense = tf.convert_to_tensor(gradient).numpy()
        assert np.isfinite(dense).all(), variable.name
        assert dense.any(), variable.name


@every_variant
def test_one_seed_gives_the_same_weights(name, own):
    logits = []
    for seed in (1, 1, 2):
        tf.keras.utils.set_random_seed(seed)
        logits.append(build_backbone(name, INPUTS, **{**ARGUMENTS, **own})(FEATURES))
    first, same, other = logits
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@every_variant
def test_a_rebuilt_backbone_with_the_same_weights_gives_the_same_logits(name, own, tmp_path):
    backbone = built(name, **own)
    logits = backbone(FEATURES)
    copy = rebuilt(backbone)
    assert not np.array_equal(copy(FEATURES), logits)
    copy.set_weights(backbone.get_weights())
    np.testing.assert_array_equal(copy(FEATURES), logits)

    path = str(tmp_path / "checkpoint")
    tf.train.Checkpoint(backbone=backbone).write(path)
    restored = rebuilt(backbone)
    tf.train.Checkpoint(backbone=restored).read(path).assert_consumed()
    np.testing.assert_array_equal(restored(FEATURES), logits)

    path = str(tmp_path / "model.weights.h5")
    backbone.save_weights(path)
    loaded = rebuilt(backbone)
    loaded.load_weights(path)
    np.testing.assert_array_equal(loaded(FEATURES), logits)


@every_backbone
def test_config_is_plain_data_that_holds_every_argument(name):
    backbone = build_backbone(name, INPUTS, embeddings=EmbeddingConfig(dim=3), hidden_units=[6], dropout=0.25)
    config = backbone.get_config()
    assert config["inputs"] == INPUTS.to_dict()
    assert (config["embeddings"]["dim"], config["hidden_units"], config["dropout"]) == (3, [6], 0.25)
    assert config.keys() - {"inputs"} == backbone.argument_names()
    assert type(backbone).from_config(config).get_config() == config


@every_variant
@pytest.mark.usefixtures("_bfloat16")
def test_bfloat16_layers_keep_float32_variables_and_logits(name, own):
    backbone = built(name, scale=0.3, **own)
    logits = backbone(FEATURES)
    assert logits.dtype == tf.float32
    assert {variable.dtype for variable in backbone.trainable_variables} == {tf.float32}
    tf.keras.mixed_precision.set_global_policy("float32")
    exact = built(name, scale=0.3, **own)(FEATURES)
    # bfloat16 has 8 bits: errors of about 1 % of the largest logit.
    np.testing.assert_allclose(logits, exact, atol=0.03 * np.abs(exact).max())
    assert not np.array_equal(logits, exact)


@every_backbone
def test_every_feature_moves_the_logits(name):
    backbone = built(name)
    logits = backbone(FEATURES).numpy()
    for feature, values in FEATURES.items():
        changed = tf.reverse(values, axis=[0])
        assert not np.allclose(backbone({**FEATURES, feature: changed}), logits), feature


@every_backbone
def test_dropout_acts_in_training_only(name):
    backbone = built(name, hidden_units=(32,), dropout=0.5)
    logits = backbone(FEATURES).numpy()
    np.testing.assert_array_equal(backbone(FEATURES, training=False), logits)
    has_nothing_to_drop = name in ("lr", "fm")
    assert np.allclose(backbone(FEATURES, training=True), logits) == has_nothing_to_drop


@every_backbone
def test_inputs_may_be_only_categorical_or_only_numeric(name):
    only_categorical = ModelInputs(categorical=INPUTS.categorical, numeric=(), groups=())
    assert build_backbone(name, only_categorical, **ARGUMENTS)(FEATURES).shape == [7]
    only_numeric = ModelInputs(categorical=(), numeric=INPUTS.numeric, groups=())
    if name == "din":
        with pytest.raises(ValueError, match="Din needs a history"):
            build_backbone(name, only_numeric, **ARGUMENTS)
    else:
        assert build_backbone(name, only_numeric, **ARGUMENTS)(FEATURES).shape == [7]


@every_backbone
def test_features_that_rows_share_score_as_if_each_row_had_its_own(name):
    backbone = built(name)
    row_of = tf.constant([0, 0, 2, 1, 1, 2, 0], tf.int64)
    shared = {feature: SharedRows(FEATURES[feature][:3], row_of) for feature in ("city", "recent_items", "age")}
    repeated = {feature: values.repeated() for feature, values in shared.items()}
    np.testing.assert_allclose(backbone(FEATURES | shared), backbone(FEATURES | repeated), rtol=1e-5, atol=1e-6)
