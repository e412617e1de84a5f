"""Each backbone against its formula: the paper's in plain NumPy, and numbers worked out by hand."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from backbone_inputs import FEATURES, NAMES, built, rows

from clsd_tf.backbones import build_backbone
from clsd_tf.backbones.base import pair_products, stacked_glorot
from clsd_tf.backbones.dcnv2 import LowRankMixtureCross
from clsd_tf.backbones.din import Dice
from clsd_tf.backbones.fm import pairwise_interactions
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.layers.embeddings import FieldEmbeddings
from clsd_tf.spec.model_inputs import CategoricalInput, ModelInputs

# Each formula again: the paper's, in float64 NumPy with plain loops, from the backbone's own weights.


def parts(layer):
    """Weights of a layer, float64, in the order in which Keras keeps them."""
    return [weight.astype(np.float64) for weight in layer.get_weights()]


def fields_of(backbone):
    """Field embeddings, float64 [7, num_fields, dim]; those of a layer are tested in test_embeddings."""
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
    backbone = build_backbone(name, _TWO_FIELDS, embeddings=EmbeddingConfig(dim=2), hidden_units=(2,), **arguments)
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
    # In float32, a difference of sums that may be ten times as large.
    np.testing.assert_allclose(pairwise_interactions(tf.constant(embeddings)), expected.sum(axis=(1, 2)), atol=1e-4)
