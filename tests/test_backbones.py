"""One contract for every backbone, each formula in plain NumPy, and the registry."""

import inspect
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from clsd_tf import backbones
from clsd_tf.backbones import BACKBONES, build_backbone, register_backbone
from clsd_tf.backbones.base import feature_inputs, pair_products, stacked_glorot
from clsd_tf.backbones.dcnv2 import LowRankMixtureCross
from clsd_tf.backbones.din import Dice
from clsd_tf.backbones.fm import pairwise_interactions
from clsd_tf.clsd import ClsdModel
from clsd_tf.embeddings import FieldEmbeddings
from clsd_tf.model_inputs import CategoricalInput, GroupInput, ModelInputs

INPUTS = ModelInputs(
    categorical=(
        CategoricalInput("item", "item", 7),
        CategoricalInput("city", "city", 4),
        CategoricalInput("recent_items", "item", 7, max_values=3),
        CategoricalInput("tags", "tags", 5, max_values=2),
    ),
    numeric=("price", "age"),
    groups=(GroupInput("age_group", ("unknown", "young")),),
    user_features=("city", "age"),
)
FEATURES = {
    "item": tf.constant([1, 2, 6, 0, 3, 5, 4], tf.int64),
    "city": tf.constant([0, 1, 2, 3, 1, 2, 0], tf.int64),
    "recent_items": tf.constant(
        [[0, 0, 0], [1, 0, 0], [1, 2, 3], [6, 5, 0], [4, 4, 4], [0, 2, 0], [5, 6, 1]], tf.int64
    ),
    "tags": tf.constant([[1, 2], [0, 0], [3, 0], [4, 1], [2, 2], [1, 0], [3, 4]], tf.int64),
    "price": tf.constant([0.0, 1.5, -2.0, 0.5, 3.0, 1.0, -1.0]),
    "age": tf.constant([1.0, -1.0, 0.0, 2.0, -0.5, 0.5, 1.5]),
}
EXTRAS = {
    "age_group": tf.constant([0, 1, 1, 0, 1, 0, 1], tf.int64),
    "row_id": tf.range(7, dtype=tf.int64),
    "teacher_score": tf.linspace(0.1, 0.7, 7),
}
ARGUMENTS = {"embedding_dim": 4, "hidden_units": (8, 6), "dropout": 0.0}
NAMES = sorted(BACKBONES)
every_backbone = pytest.mark.parametrize("name", NAMES)
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


def _documented_example():
    return inspect.cleandoc(re.search(r"::\n\n((?:    .*\n|\n)+)", backbones.__doc__).group(1))


@pytest.fixture(autouse=True)
def _registry():
    """Registers the model of the package docstring for one test, and forgets what the test registers."""
    own = dict(BACKBONES)
    exec(compile(_documented_example(), "docstring", "exec"), {})
    yield
    BACKBONES.clear()
    BACKBONES.update(own)


@pytest.fixture
def _bfloat16():
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield
    tf.keras.mixed_precision.set_global_policy("float32")


def randomise(backbone, scale):
    """Weights large enough for every part to matter; variances of batch statistics stay positive."""
    random = np.random.default_rng(3)
    weights = [random.normal(0, scale, weight.shape) for weight in backbone.get_weights()]
    names = [weight.name for weight in backbone.weights]
    backbone.set_weights([abs(w) if "variance" in name else w for w, name in zip(weights, names, strict=True)])
    return backbone


def built(name, scale=0.5, **arguments):
    """A backbone with all its variables, and random weights."""
    backbone = build_backbone(name, INPUTS, **{**ARGUMENTS, **arguments})
    backbone(FEATURES)
    return randomise(backbone, scale)


def rows(features, index):
    return {name: values[index] for name, values in features.items()}


def rebuilt(backbone):
    """A new model of the same config, with all its variables."""
    custom_objects = {"FieldEmbeddings": FieldEmbeddings}
    copy = type(backbone).from_config(backbone.get_config(), custom_objects=custom_objects)
    copy(FEATURES)
    return copy


# The contract of a backbone: what ClsdModel, checkpoints and export rely on.


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
    backbone = build_backbone(name, INPUTS, embedding_dim=3, hidden_units=[6], dropout=0.25)
    config = backbone.get_config()
    assert config["inputs"] == INPUTS.to_dict()
    assert (config["embedding_dim"], config["hidden_units"], config["dropout"]) == (3, [6], 0.25)
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


# Each formula again: the paper's, in float64 NumPy with plain loops, from the backbone's own weights.


def parts(layer):
    """Weights of a layer, float64, in the order in which Keras keeps them."""
    return [weight.astype(np.float64) for weight in layer.get_weights()]


def fields_of(backbone):
    """Field embeddings, float64 [7, num_fields, dim]; those of a layer are tested further down."""
    (layer,) = [layer for layer in backbone.layers if isinstance(layer, FieldEmbeddings)]
    return layer(FEATURES).numpy().astype(np.float64)


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def relu_layers(x, weights):
    """Dense ReLU layers; weights are kernel, bias, kernel, bias and so on."""
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        x = relu(x @ kernel + bias)
    return x


def layer_norm(x, gamma, beta):
    return gamma * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) + beta


def flat(fields):
    return fields.reshape(len(fields), -1)


def top(backbone, x, layer="logits"):
    kernel, bias = parts(backbone.get_layer(layer))
    return (x @ kernel + bias)[:, 0]


def deep(backbone, x, layer="mlp"):
    return relu_layers(x, parts(backbone.get_layer(layer)))


def pairs_of(count):
    return list(itertools.combinations(range(count), 2))


def all_inner_products(fields):
    return sum((fields[:, i] * fields[:, j]).sum(axis=1) for i, j in pairs_of(fields.shape[1]))


def lr_formula(backbone):
    return fields_of(backbone).sum(axis=(1, 2)) + parts(backbone.get_layer("logit_bias"))[0]


def fm_formula(backbone):
    fields, first_order = fields_of(backbone)[..., :-1], fields_of(backbone)[..., -1].sum(axis=1)
    return first_order + all_inner_products(fields) + parts(backbone.get_layer("logit_bias"))[0]


def dnn_formula(backbone):
    return top(backbone, deep(backbone, flat(fields_of(backbone))))


def wide_deep_formula(backbone):
    looked_up = fields_of(backbone)
    return looked_up[..., -1].sum(axis=1) + top(backbone, deep(backbone, flat(looked_up[..., :-1])))


def deepfm_formula(backbone):
    return wide_deep_formula(backbone) + all_inner_products(fields_of(backbone)[..., :-1])


def cross_and_deep(backbone, cross):
    x0 = flat(fields_of(backbone))
    x = x0
    for index in range(2):
        x = np.stack([cross(*row, *parts(backbone.get_layer(f"cross_{index}"))) for row in zip(x0, x, strict=True)])
    return top(backbone, np.concatenate([x, deep(backbone, x0)], axis=1))


def dcn_formula(backbone):
    return cross_and_deep(backbone, lambda x0, x, w, b: np.outer(x0, x) @ w[:, 0] + b + x)


def dcnv2_formula(backbone):
    return cross_and_deep(backbone, lambda x0, x, w, b: x0 * (w.T @ x + b) + x)


def dcnv2_mix_formula(backbone):
    def cross(x0, x, v, c, u, b, g):
        gates, total = softmax(g.T @ x), x
        for k, (gate, within) in enumerate(zip(gates, c, strict=True)):
            ranks = slice(k * len(within), (k + 1) * len(within))
            total = total + gate * x0 * (u[ranks].T @ np.tanh(within.T @ np.tanh(v[:, ranks].T @ x)) + b)
        return total

    return cross_and_deep(backbone, cross)


def xdeepfm_formula(backbone):
    looked_up = fields_of(backbone)
    fields = looked_up[..., :-1]
    maps, pooled = fields, []
    for kernel in parts(backbone.get_layer("cin")):
        weights = kernel.reshape(maps.shape[1], fields.shape[1], -1)
        maps = np.stack(
            [
                sum(
                    weights[i, j, h] * maps[:, i] * fields[:, j]
                    for i in range(maps.shape[1])
                    for j in range(fields.shape[1])
                )
                for h in range(weights.shape[2])
            ],
            axis=1,
        )
        pooled.append(maps.sum(axis=2))
    joined = np.concatenate([*pooled, deep(backbone, flat(fields))], axis=1)
    return looked_up[..., -1].sum(axis=1) + top(backbone, joined)


def autoint_formula(backbone):
    fields = fields_of(backbone)
    embedded = fields
    for index in range(2):
        query, key, value, residual = parts(backbone.get_layer(f"interacting_{index}"))
        heads = []
        for head in (slice(0, 3), slice(3, 6)):
            scores = (fields @ query[:, head]) @ (fields @ key[:, head]).swapaxes(1, 2)
            heads.append(softmax(scores) @ (fields @ value[:, head]))
        fields = relu(np.concatenate(heads, axis=2) + fields @ residual)
    return top(backbone, np.concatenate([flat(fields), deep(backbone, flat(embedded))], axis=1))


def afm_formula(backbone):
    looked_up = fields_of(backbone)
    kernel, bias, score = parts(backbone.get_layer("attention_pooling"))
    products = [looked_up[:, i, :-1] * looked_up[:, j, :-1] for i, j in pairs_of(looked_up.shape[1])]
    attention = softmax(np.stack([(relu(p @ kernel + bias) @ score)[:, 0] for p in products], axis=1))
    pooled = sum(attention[:, [index]] * product for index, product in enumerate(products))
    return looked_up[..., -1].sum(axis=1) + top(backbone, pooled)


def fibinet_formula(backbone):
    looked_up = fields_of(backbone)
    fields = looked_up[..., :-1]
    squeeze, excite = parts(backbone.get_layer("senet"))
    assert squeeze.shape == (6, 2)  # 6 fields, reduction ratio 3.
    importance = relu(relu(fields.mean(axis=2) @ squeeze) @ excite)
    blocks = []
    for layer, values in (("embeddings", fields), ("senet", fields * importance[:, :, None])):
        (kernel,) = parts(backbone.get_layer(f"bilinear_of_{layer}"))
        blocks += [(values[:, i] @ kernel[i]) * values[:, j] for i, j in pairs_of(fields.shape[1])]
    return looked_up[..., -1].sum(axis=1) + top(backbone, deep(backbone, np.concatenate(blocks, axis=1)))


def mask_block(backbone, index, hidden, embedded):
    project, gamma, beta, *mask_weights = parts(backbone.get_layer(f"block_{index}"))
    aggregate, mask = mask_weights[:2], mask_weights[2:]
    assert aggregate[0].shape[1] == 2 * hidden.shape[1]
    mask = relu_layers(embedded, aggregate) @ mask[0] + mask[1]
    return relu(layer_norm((mask * hidden) @ project, gamma, beta))


def masknet_formula(backbone):
    fields = fields_of(backbone)
    normalised = flat(layer_norm(fields, *parts(backbone.get_layer("normalise"))))
    blocks = [mask_block(backbone, index, normalised, flat(fields)) for index in range(3)]
    return top(backbone, deep(backbone, np.concatenate(blocks, axis=1)))


def serial_masknet_formula(backbone):
    fields = fields_of(backbone)
    hidden = flat(layer_norm(fields, *parts(backbone.get_layer("normalise"))))
    for index in range(3):
        hidden = mask_block(backbone, index, hidden, flat(fields))
    return top(backbone, deep(backbone, hidden))


def finalmlp_formula(backbone):
    fields = fields_of(backbone)
    streams = []
    for index, context in enumerate(([1, 5], [0, 2, 3, 4])):  # city and age are the user's, all others are not.
        *hidden, kernel, bias = parts(backbone.get_layer(f"gate_{index}"))
        gate = 2 * sigmoid(relu_layers(flat(fields[:, context]), hidden) @ kernel + bias)
        streams.append(deep(backbone, flat(fields) * gate, f"mlp_{index}"))
    first, second = streams
    linear, bias, heads = _linear_and_heads(parts(backbone.get_layer("fusion")))
    logits = (np.concatenate(streams, axis=1) @ linear + bias)[:, 0]
    for index, head in enumerate((slice(0, 3), slice(3, 6))):
        logits = logits + np.array([a @ heads[index] @ b for a, b in zip(first[:, head], second[:, head], strict=True)])
    return logits


def _linear_and_heads(weights):
    (heads,) = [weight for weight in weights if weight.ndim == 3]
    linear, bias = [weight for weight in weights if weight.ndim < 3]
    return linear, bias, heads


def din_formula(backbone):
    fields = fields_of(backbone)  # All but the history.
    *hidden, kernel, bias = parts(backbone.get_layer("attention_recent_items"))
    (layer,) = [layer for layer in backbone.layers if isinstance(layer, FieldEmbeddings)]
    table = layer.lookup("item", tf.range(7)).numpy().astype(np.float64)
    pooled = np.zeros([7, 4])
    for row, (item, history) in enumerate(zip(FEATURES["item"].numpy(), FEATURES["recent_items"].numpy(), strict=True)):
        for past in history[history != 0]:
            related = np.concatenate([table[past], table[item], table[past] * table[item]])
            pooled[row] += (relu_layers(related, hidden) @ kernel + bias) * table[past]
    return top(backbone, deep(backbone, np.concatenate([flat(fields), pooled], axis=1)))


FORMULAS = [
    ("lr", {}, lr_formula),
    ("fm", {}, fm_formula),
    ("dnn", {}, dnn_formula),
    ("wide_deep", {}, wide_deep_formula),
    ("deepfm", {}, deepfm_formula),
    ("dcn", {}, dcn_formula),
    ("dcnv2", {}, dcnv2_formula),
    ("dcnv2_mix", {"num_experts": 3, "low_rank": 2}, dcnv2_mix_formula),
    ("xdeepfm", {"cin_units": (3, 2)}, xdeepfm_formula),
    ("autoint", {"head_dim": 3}, autoint_formula),
    ("afm", {}, afm_formula),
    ("fibinet", {}, fibinet_formula),
    ("masknet", {"block_units": 5}, masknet_formula),
    ("masknet", {"block_units": 5, "structure": "serial"}, serial_masknet_formula),
    ("finalmlp", {}, finalmlp_formula),
    ("din", {}, din_formula),
]


@pytest.mark.parametrize(("name", "own", "formula"), FORMULAS, ids=[formula.__name__ for *_, formula in FORMULAS])
def test_logits_are_the_formula_of_the_paper(name, own, formula):
    backbone = built(name, **own)
    np.testing.assert_allclose(backbone(FEATURES), formula(backbone), rtol=1e-4, atol=1e-4)


def test_every_backbone_has_a_formula():
    assert {name for name, *_ in FORMULAS} == set(NAMES)


def test_one_expert_near_0_is_a_plain_low_rank_cross():
    # The only gate is 1 and tanh(z) = z for small z: x0 * (U V^T x + b) + x.
    # V^T x = .03 - .02 = .01; U times it [.03, .04]; + b [.53, -.46]; * x0 [.0053, -.0092]; + x [.0353, -.0192].
    layer = LowRankMixtureCross(num_experts=1, low_rank=1)
    x0, x = tf.constant([[0.01, 0.02]]), tf.constant([[0.03, -0.01]])
    layer(x0, x)
    v, c, u = np.array([[1.0], [2.0]]), np.array([[[1.0]]]), np.array([[3.0, 4.0]])
    bias, gate = np.array([0.5, -0.5]), np.array([[7.0], [8.0]])
    layer.set_weights([v, c, u, bias, gate])
    np.testing.assert_allclose(layer(x0, x), [[0.0353, -0.0192]], atol=1e-6)


def test_dice_by_hand():
    # Of the batch [1, 3]: mean 2, std 1, so p = sigmoid(-1) and sigmoid(1); alpha is 1/2.
    low, high = 1 / (1 + np.e), np.e / (1 + np.e)
    expected = [[1 * (low + 0.5 * high)], [3 * (high + 0.5 * low)]]
    x = tf.constant([[1.0], [3.0]])
    dice = Dice()
    dice(x)
    alpha, moving_mean, moving_variance = dice.weights
    alpha.assign([0.5])
    np.testing.assert_allclose(dice(x, training=True), expected, rtol=1e-5)
    np.testing.assert_allclose(moving_mean, [0.2], rtol=1e-5)  # One batch moves it by a tenth of the way to 2.

    # Afterwards a row gets what the moving averages say, whatever its batch.
    moving_mean.assign([2.0])
    moving_variance.assign([1.0])
    np.testing.assert_allclose(dice(x[:1]), expected[:1], rtol=1e-5)


@pytest.mark.parametrize("units", [2, 9])
def test_stacked_glorot_keeps_the_variance_of_each_matrix(units):
    # Var(uniform(-a, a)) = a^2 / 3 = 2 / (rows + columns), whatever the depth of the stack.
    weights = stacked_glorot(units, 8)([1000, units, 8]).numpy()
    assert weights.var() == pytest.approx(2 / (units + 8), rel=0.05)


@pytest.fixture(scope="module")
def din():
    return built("din")


@hypothesis.given(history=st.permutations([0, 2, 5]), item=st.integers(0, 6))
@hypothesis.settings(max_examples=15, deadline=None)
def test_din_does_not_look_at_the_order_or_place_of_padding(din, history, item):
    row = rows(FEATURES, slice(0, 1)) | {"item": tf.constant([item], tf.int64)}
    histories = ([0, 2, 5], history)
    logits = [float(din(row | {"recent_items": tf.constant([ids], tf.int64)})[0]) for ids in histories]
    assert logits[0] == pytest.approx(logits[1], rel=1e-5)


def test_din_weighs_a_history_by_its_target(din):
    """The same history moves the logit by different amounts for different items: its weights depend on the target."""
    effects = []
    for item in (1, 3):
        row = rows(FEATURES, slice(0, 1)) | {"item": tf.constant([item], tf.int64)}
        with_history = din(row | {"recent_items": tf.constant([[2, 5, 0]], tf.int64)})
        effects.append(float(with_history[0] - din(row)[0]))
    assert effects[0] != pytest.approx(effects[1], rel=0.01)


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


@hypothesis.given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 100))
@hypothesis.settings(max_examples=20, deadline=None)
def test_pairs_equal_a_double_loop(num_fields, dim, seed):
    embeddings = np.random.default_rng(seed).normal(size=[3, num_fields, dim])
    products = [embeddings[:, i] * embeddings[:, j] for i, j in pairs_of(num_fields)]
    expected = np.array(products).reshape(len(products), 3, dim).swapaxes(0, 1)
    np.testing.assert_allclose(pair_products(embeddings, embeddings), expected)
    np.testing.assert_allclose(pairwise_interactions(tf.constant(embeddings)), expected.sum(axis=(1, 2)), atol=1e-12)


# The registry, and arguments that are refused.


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Received: 'deep_fm'. Allowed: afm, autoint, dcn, dcnv2, dcnv2_mix, deepfm, "
    ):
        build_backbone("deep_fm", INPUTS)


def test_an_unknown_argument_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'dcn'.*Received: cross_layers. Allowed: dropout, embedding_dim, hidden_units, num_c"
    ):
        build_backbone("dcn", INPUTS, cross_layers=3)
    with pytest.raises(ValueError, match=r"Received: gelu. Allowed: activation, dropout, embedding_dim, hidden_units$"):
        build_backbone("two_layers", INPUTS, **ARGUMENTS, gelu=True)


def test_a_factory_of_any_keyword_arguments_gets_them_all():
    received = {}

    @register_backbone("mine")
    def mine(inputs, **arguments):
        received.update(arguments)
        return build_backbone("dnn", inputs)

    build_backbone("mine", INPUTS, anything=1)
    assert received == {"anything": 1}


def test_a_subclass_of_backbone_takes_the_arguments_of_its_parents():
    @register_backbone("mine")
    class Mine(BACKBONES["dcn"]):
        def __init__(self, inputs, *, temperature=1.0, **kwargs):
            super().__init__(inputs, **kwargs)

    assert Mine.argument_names() == {"temperature", "num_cross_layers", "embedding_dim", "hidden_units", "dropout"}
    assert isinstance(build_backbone("mine", INPUTS, temperature=2.0, num_cross_layers=1), Mine)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"already. Received: 'dnn'.*del BACKBONES\['dnn'\]"):
        register_backbone("dnn")(lambda inputs: None)
    del BACKBONES["dnn"]
    register_backbone("dnn")(BACKBONES["fm"])
    assert BACKBONES["dnn"] is BACKBONES["fm"]


@pytest.mark.filterwarnings("ignore:Input dict contained keys")
def test_the_documented_example_trains_as_any_backbone():
    model = ClsdModel(build_backbone("two_layers", INPUTS, **ARGUMENTS))
    model.compile("sgd")
    before = model.backbone.get_weights()
    history = model.fit(tf.data.Dataset.from_tensors(({**FEATURES, **EXTRAS}, tf.range(7) % 2)), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all((old != new).any() for old, new in zip(before, model.backbone.get_weights(), strict=True))
    assert model(FEATURES | EXTRAS).shape == [7]


def test_feature_inputs_are_named_and_shaped_as_the_batches():
    received = feature_inputs(INPUTS)
    assert {name: (value.shape.as_list(), value.dtype) for name, value in received.items()} == {
        name: ([None, *value.shape[1:]], value.dtype) for name, value in FEATURES.items()
    }


@every_backbone
@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range_is_refused(name, dropout):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\). Received: {dropout}"):
        build_backbone(name, INPUTS, dropout=dropout)


_NOT_A_SIZE = r"must be a whole number of at least 1. Received: "


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("dnn", "embedding_dim", 0, rf"embedding_dim {_NOT_A_SIZE}0"),
        ("dnn", "embedding_dim", 2.5, rf"embedding_dim {_NOT_A_SIZE}2.5"),
        ("dnn", "embedding_dim", True, rf"embedding_dim {_NOT_A_SIZE}True"),
        ("dnn", "hidden_units", (8, 0), rf"hidden_units\[1\] {_NOT_A_SIZE}0"),
        ("dnn", "hidden_units", 8, r"hidden_units must be a list of 0 or more layer sizes. Received: 8"),
        ("dcn", "num_cross_layers", 0, rf"num_cross_layers {_NOT_A_SIZE}0"),
        ("dcnv2", "num_cross_layers", 0, rf"num_cross_layers {_NOT_A_SIZE}0"),
        ("dcnv2_mix", "num_cross_layers", 0, rf"num_cross_layers {_NOT_A_SIZE}0"),
        ("dcnv2_mix", "num_experts", 0, rf"num_experts {_NOT_A_SIZE}0"),
        ("dcnv2_mix", "low_rank", "8", rf"low_rank {_NOT_A_SIZE}'8'"),
        ("xdeepfm", "cin_units", (), r"cin_units must be a list of 1 or more layer sizes. Received: \(\)"),
        ("autoint", "num_attention_layers", 0, rf"num_attention_layers {_NOT_A_SIZE}0"),
        ("autoint", "num_heads", 0, rf"num_heads {_NOT_A_SIZE}0"),
        ("autoint", "head_dim", 0, rf"head_dim {_NOT_A_SIZE}0"),
        ("afm", "attention_units", 0, rf"attention_units {_NOT_A_SIZE}0"),
        ("fibinet", "reduction_ratio", 0, rf"reduction_ratio {_NOT_A_SIZE}0"),
        ("masknet", "structure", "both", r"structure must be one of parallel, serial. Received: 'both'"),
        ("masknet", "num_blocks", 0, rf"num_blocks {_NOT_A_SIZE}0"),
        ("masknet", "block_units", 0, rf"block_units {_NOT_A_SIZE}0"),
        ("masknet", "reduction_ratio", 0.5, rf"reduction_ratio {_NOT_A_SIZE}0.5"),
        ("masknet", "embedding_dim", 1, r"embedding_dim must be at least 2. Received: 1"),
        ("finalmlp", "num_heads", 4, r"num_heads=4, hidden_units=\[8, 6\]. num_heads=1 always does"),
        ("finalmlp", "gate_units", 0, rf"gate_units {_NOT_A_SIZE}0"),
        ("finalmlp", "hidden_units", (), r"hidden_units must be a list of 1 or more layer sizes. Received: \[\]"),
        ("din", "attention_units", "32", r"attention_units must be a list of 0 or more layer sizes. Received: '32'"),
        ("din", "activation", "prelu", r"activation must be one of relu, dice. Received: 'prelu'"),
    ],
)
def test_arguments_out_of_range_are_refused(name, argument, value, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, INPUTS, **{**ARGUMENTS, argument: value})


@pytest.mark.parametrize("name", ["afm", "fibinet"])
def test_models_of_pairs_refuse_a_single_input(name):
    with pytest.raises(ValueError, match=r"needs 2 or more inputs. Received: price. Declare more"):
        build_backbone(name, ModelInputs(categorical=(), numeric=("price",), groups=()))


def test_no_input_at_all_is_refused():
    with pytest.raises(ValueError, match=r"Dnn needs 1 or more inputs. Received: none"):
        build_backbone("dnn", ModelInputs(categorical=(), numeric=(), groups=()))


def test_din_does_not_take_an_input_of_several_values_for_a_history():
    tags = ModelInputs(categorical=(INPUTS.categorical[0], INPUTS.categorical[3]), numeric=(), groups=())
    with pytest.raises(ValueError, match=r"Din needs a history.*Received categorical inputs: item, tags"):
        build_backbone("din", tags)


def test_embedding_dim_of_0_is_refused():
    with pytest.raises(ValueError, match=r"embedding_dim must be at least 1. Received: 0"):
        FieldEmbeddings(INPUTS, 0)


# Field embeddings.


@pytest.fixture
def embeddings():
    layer = FieldEmbeddings(INPUTS, 2)
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
