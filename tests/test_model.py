"""ClsdModel with a backbone of the user's own and plain compile / fit on data in memory."""

import functools

import numpy as np
import pytest
import sklearn.metrics
import tensorflow as tf
from scipy.special import expit

from clsd_tf.layers.calibration import Calibration, CalibrationLayer, PlattCurve
from clsd_tf.layers.losses import label_smoothed_bce
from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.config import ClsdConfig
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.spec.model_inputs import GroupInput, ModelInputs

INPUTS = ModelInputs(categorical=(), numeric=("x",), groups=(GroupInput("tier", ("unknown", "low", "high")),))
BATCH = 16
WARMUP = 6


class TinyBackbone(tf.keras.Model):
    """logits = w . tanh(W x) + b."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._hidden = tf.keras.layers.Dense(4, activation="tanh")
        self._logits = tf.keras.layers.Dense(1)

    def call(self, features, training=False):
        return tf.squeeze(self._logits(self._hidden(features["x"])), axis=1)


@pytest.fixture(scope="module")
def data():
    """Ten batches of rows whose click rate depends on x and on the group."""
    random = np.random.default_rng(0)
    rows = 10 * BATCH
    x = random.normal(size=[rows, 3]).astype(np.float32)
    tier = random.integers(0, 3, rows)
    labels = (random.random(rows) < expit(x[:, 0] + tier - 1.5)).astype(np.float32)
    teacher = random.uniform(0.05, 0.95, rows).astype(np.float32)
    return {"x": x, "tier": tier, "teacher_score": teacher}, labels


def head(data, num_batches):
    features, labels = data
    rows = num_batches * BATCH
    return {name: values[:rows] for name, values in features.items()}, labels[:rows]


def new_model(config, *, with_gate=True, optimizer=None, gate_optimizer=None, run_eagerly=True, **arguments):
    """A model whose initial weights do not depend on ``config``; eager, since tracing takes longer than a few steps."""
    tf.keras.utils.set_random_seed(7)
    model = ClsdModel(TinyBackbone(), AdGate(INPUTS) if with_gate else None, config, **arguments)
    model.compile(
        optimizer or tf.keras.optimizers.Adam(0.02),
        ad_gate_optimizer=gate_optimizer or tf.keras.optimizers.Adam(0.02),
        run_eagerly=run_eagerly,
    )
    features = {"x": tf.zeros([1, 3]), "tier": tf.zeros([1], tf.int64)}
    model(features)
    model.debug_outputs(features)
    return model


def fit(model, data, **arguments):
    features, labels = data
    return model.fit(features, labels, batch_size=BATCH, shuffle=False, verbose=0, **arguments).history


def weights_of(part):
    return [weight.copy() for weight in part.get_weights()]


def assert_same(received, expected):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(received, expected, **tolerances):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, **{"rtol": 1e-5, "atol": 1e-6, **tolerances})


def assert_differ(received, expected):
    assert any((one != other).any() for one, other in zip(received, expected, strict=True))


def clsd(**changes):
    mix = {"lambda_": 0.5, "mu": 0.5, "global_weighting": "ratio", "local_weighting": "additive"}
    return ClsdConfig(**{"teacher": "self", "loss_warmup_steps": 0, **mix, **changes})


BCE = clsd(lambda_=0.0, mu=0.0)


# The ordinary loss: without confidence, and before it.


def plain_keras(model, loss):
    """A Keras model of its own with the initial weights of ``model``."""
    plain = TinyBackbone()
    plain.compile(tf.keras.optimizers.Adam(0.02), loss, run_eagerly=True)
    plain({"x": tf.zeros([1, 3])})
    plain.set_weights(model.backbone.get_weights())
    return plain


def test_lambda_and_mu_of_0_train_as_keras_does_with_binary_cross_entropy(data):
    model = new_model(BCE)
    plain = plain_keras(model, tf.keras.losses.BinaryCrossentropy(from_logits=True))
    received, expected = fit(model, data), fit(plain, data)
    assert received["loss"] == received["bce"] == pytest.approx(expected["loss"], rel=1e-6)
    assert_close(weights_of(model.backbone), weights_of(plain), rtol=0, atol=1e-6)


def test_loss_function_replaces_the_loss_in_training_while_bce_stays_plain(data):
    model = new_model(BCE, loss_function=functools.partial(label_smoothed_bce, smoothing=0.4))
    plain = plain_keras(model, tf.keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.4))
    features, labels = head(data, 1)
    ctr = expit(model.logits(features).numpy().astype(np.float64))
    first = fit(model, (features, labels), validation_data=(features, labels))
    expected = fit(plain, (features, labels))["loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-6)
    assert first["bce"] == [pytest.approx(sklearn.metrics.log_loss(labels, ctr), rel=1e-5)]
    assert first["bce"] != pytest.approx(expected, rel=1e-3)
    # Validation compares runs of different losses: it is plain BCE, too.
    assert first["val_loss"] == [
        pytest.approx(sklearn.metrics.log_loss(labels, model.predict(features, verbose=0).astype(np.float64)), rel=1e-5)
    ]
    fit(model, data)
    fit(plain, data)
    assert_close(weights_of(model.backbone), weights_of(plain), rtol=0, atol=1e-6)


def test_loss_warmup_is_bce_bit_for_bit_and_ends_after_exactly_its_steps(data):
    # In calls of fit of 2 epochs, 2 steps at a time: the count goes on over all of them.
    model, bce = (
        new_model(config, with_gate=False, run_eagerly=False)
        for config in (clsd(loss_warmup_steps=WARMUP, mu=0.0), BCE)
    )
    for each in (model, bce):
        fit(each, head(data, 2), epochs=2)
        fit(each, head(data, 2))
        assert int(each.optimizer.iterations) == WARMUP
    # Steps 0 to WARMUP - 1 are BCE; step WARMUP, the next one, is the first with confidence.
    assert_same(weights_of(model.backbone), weights_of(bce.backbone))
    for each in (model, bce):
        fit(each, head(data, 1))
    assert_differ(weights_of(model.backbone), weights_of(bce.backbone))


def test_loss_warmup_ends_inside_a_loop_that_is_traced_once(data):
    features, labels = head(data, 1)

    def looping(config):
        model = new_model(config)
        model.optimizer.build(model.backbone.trainable_variables)
        model.ad_gate_optimizer.build(model.ad_gate.trainable_variables)

        @tf.function
        def run(steps):
            for _ in tf.range(steps):
                model.train_step((features, labels))

        def weights_after(steps):
            run(tf.constant(steps))
            assert run.experimental_get_tracing_count() == 1
            return weights_of(model.backbone)

        return weights_after

    with_warmup, bce = looping(clsd(loss_warmup_steps=WARMUP)), looping(BCE)
    assert_same(with_warmup(WARMUP), bce(WARMUP))
    assert_differ(with_warmup(1), bce(1))


@pytest.mark.parametrize("step", [0, WARMUP - 1, WARMUP])
def test_click_confidence_is_1_before_loss_warmup_ends(step):
    model = new_model(clsd(loss_warmup_steps=WARMUP, global_weighting="mean_one", lambda_=1.0, mu=0.0))
    scores = tf.constant([0.2, 0.6, 0.5])
    confidence = tf.function(model.click_confidence)(
        tf.constant([1.0, 1.0, 0.0]), scores, tf.zeros([3]), tf.ones([3]), tf.constant(step)
    )
    assert confidence.numpy() == pytest.approx([0.5, 1.5, 1.0] if step == WARMUP else [1.0] * 3)


# The weighted loss.


def test_a_step_follows_the_weighted_gradient_by_hand(data):
    # A backbone of one layer, logits = w . x + b: the gradient is mean(confidence * (ctr - label) * (x, 1)), in which
    # confidence is data. Self teacher, AdGate at 0: ctr / mean and ctr + 0, over their means over clicks.
    features, labels = head(data, 1)
    tf.keras.utils.set_random_seed(7)
    layer = tf.keras.layers.Dense(1)
    layer.build([None, 3])
    backbone = tf.keras.Sequential([tf.keras.layers.Lambda(lambda features: features["x"]), layer])
    model = ClsdModel(backbone, AdGate(INPUTS), clsd(lambda_=0.6, mu=0.3))
    model.compile(tf.keras.optimizers.SGD(0.5), run_eagerly=True)
    weights, bias = (weight.astype(np.float64) for weight in layer.get_weights())
    x = features["x"].astype(np.float64)
    ctr = expit(x @ weights[:, 0] + bias)
    clicks = labels == 1
    confidence = np.where(clicks, 0.1 + 0.9 * ctr / ctr[clicks].mean(), 1.0)
    error = confidence * (ctr - labels)
    fit(model, (features, labels))
    expected = [weights - 0.5 * (error[:, None] * x).mean(axis=0)[:, None], bias - 0.5 * error.mean()]
    assert_close(layer.get_weights(), expected)


def test_losses_that_the_backbone_adds_enter_the_loss(data):
    class Regularised(TinyBackbone):
        def call(self, features, training=False):
            self.add_loss(0.25)
            return super().call(features, training=training)

    model = ClsdModel(Regularised(), None, BCE)
    model.compile("sgd", run_eagerly=True)
    history = fit(model, head(data, 2))
    assert history["loss"][0] - history["bce"][0] == pytest.approx(0.25, abs=1e-5)


def test_rows_of_weight_0_have_no_influence(data):
    features, labels = head(data, 2)
    weights = np.where(np.arange(len(labels)) % 4 == 0, 0.0, 1.0).astype(np.float32)
    ignored = weights == 0
    other_features = {
        "x": np.where(ignored[:, None], 9.0, features["x"]).astype(np.float32),
        "tier": np.where(ignored, 0, features["tier"]),
    }
    other_labels = np.where(ignored, 1 - labels, labels).astype(np.float32)
    one, other = new_model(clsd()), new_model(clsd())
    history = fit(one, (features, labels), sample_weight=weights)
    of_other = fit(other, (other_features, other_labels), sample_weight=weights)
    np.testing.assert_equal(history, of_other)
    assert_same(weights_of(one.backbone), weights_of(other.backbone))
    assert_same(weights_of(one.ad_gate), weights_of(other.ad_gate))


def test_a_row_of_weight_2_counts_as_two_rows(data):
    features, labels = head(data, 1)
    twice = np.append(np.arange(BATCH), np.arange(4))
    one, other = new_model(clsd()), new_model(clsd())
    one.fit(features, labels, sample_weight=np.where(np.arange(BATCH) < 4, 2.0, 1.0), batch_size=64, verbose=0)
    other.fit({name: values[twice] for name, values in features.items()}, labels[twice], batch_size=64, verbose=0)
    for part in ("backbone", "ad_gate"):
        assert_close(weights_of(getattr(one, part)), weights_of(getattr(other, part)), rtol=1e-4)


def test_labels_and_weights_may_be_integers_or_columns(data):
    features, labels = head(data, 2)
    flat, column = new_model(clsd()), new_model(clsd())
    fit(flat, (features, labels), sample_weight=np.ones(len(labels)))
    fit(column, (features, labels.astype(np.int64)[:, None]), sample_weight=np.ones([len(labels), 1]))
    assert_same(weights_of(flat.backbone), weights_of(column.backbone))


def test_a_batch_without_clicks_trains_without_nan(data):
    features, labels = head(data, 1)
    model = new_model(clsd())
    gate_before = weights_of(model.ad_gate)
    history = fit(model, (features, np.zeros_like(labels)))
    assert history["loss"] == history["bce"]
    assert all(np.isfinite(weight).all() for weight in weights_of(model.backbone))
    assert_same(weights_of(model.ad_gate), gate_before)


# Backbone and AdGate learn apart.


@pytest.mark.parametrize("objective", ["residual", "literal"])
def test_ad_gate_learns_the_same_whatever_the_share_of_its_own_confidence(data, objective):
    # Were there a path from the weighted loss to AdGate, mu would change it; the teacher stays as it is.
    gates, backbones = [], []
    for mu in (0.0, 1.0):
        config = clsd(teacher="cross_fit", lambda_=1.0 - mu, mu=mu, ad_gate={"objective": objective})
        model = new_model(config, optimizer=tf.keras.optimizers.SGD(0.1))
        fit(model, head(data, 1))
        gates.append(weights_of(model.ad_gate))
        backbones.append(weights_of(model.backbone))
    assert_same(*gates)
    assert_differ(*backbones)


def test_the_weighted_loss_never_changes_ad_gate(data):
    model = new_model(clsd(), gate_optimizer=tf.keras.optimizers.SGD(0.0))
    gate, backbone = weights_of(model.ad_gate), weights_of(model.backbone)
    fit(model, head(data, 2))
    assert_same(weights_of(model.ad_gate), gate)
    assert_differ(weights_of(model.backbone), backbone)


def test_the_loss_of_ad_gate_never_changes_the_backbone_and_is_learnt_during_loss_warmup(data):
    model = new_model(clsd(loss_warmup_steps=1000), optimizer=tf.keras.optimizers.SGD(0.0))
    gate, backbone = weights_of(model.ad_gate), weights_of(model.backbone)
    fit(model, head(data, 2))
    assert_same(weights_of(model.backbone), backbone)
    assert_differ(weights_of(model.ad_gate), gate)


# Evaluation, prediction, calibration.


def test_predict_gives_one_probability_per_row(data):
    features, labels = data
    model = new_model(clsd(), run_eagerly=False)
    fit(model, data, epochs=5)
    ctr = model.predict(features, batch_size=7, verbose=0)  # 160 rows: the last batch is smaller.
    assert ctr.shape == labels.shape
    assert ctr.dtype == np.float32
    outputs = {name: values.numpy() for name, values in model.debug_outputs(features).items()}
    assert ctr == pytest.approx(expit(outputs["logit"]), rel=1e-5)
    assert outputs["teacher_score"] == pytest.approx(ctr, rel=1e-5)
    assert outputs["ad_gate_correction"] == pytest.approx(model.ad_gate(features).numpy())
    assert sklearn.metrics.roc_auc_score(labels, ctr) > 0.6


def test_evaluate_reports_plain_bce_and_changes_nothing(data):
    features, labels = data
    model = new_model(clsd())
    model.compile(model.optimizer, metrics=[tf.keras.metrics.AUC(name="auc")], run_eagerly=True)
    before = weights_of(model.backbone) + weights_of(model.ad_gate)
    weights = np.random.default_rng(1).uniform(0, 2, len(labels)).astype(np.float32)
    served = {name: features[name] for name in ("x", "tier")}  # Evaluation needs no teacher scores.
    result = model.evaluate(served, labels, sample_weight=weights, verbose=0, return_dict=True)
    ctr = model.predict(features, verbose=0)
    assert set(result) == {"loss", "mean_ctr", "auc"}
    expected = sklearn.metrics.log_loss(labels, ctr.astype(np.float64), sample_weight=weights)
    assert result["loss"] == pytest.approx(expected, rel=1e-4)
    assert result["mean_ctr"] == pytest.approx(np.average(ctr, weights=weights), rel=1e-4)
    # Keras' AUC is a sum over 200 thresholds.
    assert result["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, ctr), abs=0.02)
    assert_same(weights_of(model.backbone) + weights_of(model.ad_gate), before)


CALIBRATION = CalibrationLayer(Calibration("platt", PlattCurve(0.5, -1.0)))  # ctr = sigmoid(.5 * logits - 1).


def test_calibration_changes_what_is_predicted_and_nothing_of_training(data):
    features, labels = head(data, 2)
    plain, calibrated = new_model(clsd()), new_model(clsd())
    calibrated.calibration = CALIBRATION
    logits = plain.logits(features).numpy()
    assert calibrated(features).numpy() == pytest.approx(expit(0.5 * logits - 1.0), rel=1e-5)
    assert calibrated.logits(features).numpy().tolist() == logits.tolist()
    validated = {"validation_data": (features, labels)}
    np.testing.assert_equal(
        fit(calibrated, (features, labels), **validated), fit(plain, (features, labels), **validated)
    )
    assert_same(weights_of(calibrated.backbone), weights_of(plain.backbone))
    assert_same(weights_of(calibrated.ad_gate), weights_of(plain.ad_gate))


def test_calibration_set_after_a_first_predict_reaches_the_next_one(data):
    features, _ = head(data, 1)
    model = new_model(clsd(), run_eagerly=False)
    before = model.predict(features, verbose=0)
    model.calibration = CALIBRATION
    expected = expit(0.5 * np.log(before / (1 - before)) - 1.0)
    assert model.predict(features, verbose=0) == pytest.approx(expected, rel=1e-4)
