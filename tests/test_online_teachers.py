"""Where a training step takes its teacher scores from, what a model refuses, and going on after a restore."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit

from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.config import ClsdConfig
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.spec.model_inputs import GroupInput, ModelInputs

# ``fit`` takes its steps as epochs here.
pytestmark = pytest.mark.filterwarnings("ignore::clsd_tf.methods.clsd.config.OverconfidentTeacherWarning")

INPUTS = ModelInputs(categorical=(), numeric=("x",), groups=(GroupInput("tier", ("unknown", "low", "high")),))
NUM_ROWS = 32


class Linear(tf.keras.Model):
    """logits = w * x + b."""

    def __init__(self, weight=0.5, bias=0.0):
        super().__init__()
        initial = tf.keras.initializers.Constant(weight), tf.keras.initializers.Constant(bias)
        self._logits = tf.keras.layers.Dense(1, kernel_initializer=initial[0], bias_initializer=initial[1])

    def call(self, features, training=False):
        return self._logits(features["x"][:, tf.newaxis])


@pytest.fixture(scope="module")
def data():
    """One batch, whose clicks depend on x."""
    random = np.random.default_rng(0)
    x = random.normal(size=NUM_ROWS).astype(np.float32)
    labels = (random.random(NUM_ROWS) < expit(x)).astype(np.float32)
    return {"x": x, "tier": random.integers(0, 3, NUM_ROWS)}, labels


def config_of(teacher, **changes):
    weighting = {"lambda_": 1.0, "mu": 0.0, "global_weighting": "mean_one"}
    return ClsdConfig(**{"teacher": teacher, "loss_warmup_steps": 0, **weighting, **changes})


def new_model(config, *, backbone=None, teacher_backbone=None, optimizer=None):
    tf.keras.utils.set_random_seed(0)
    model = ClsdModel(backbone or Linear(), AdGate(INPUTS), config, teacher_backbone=teacher_backbone)
    model.compile(optimizer or tf.keras.optimizers.SGD(1.0), run_eagerly=True)
    return model


def fit(model, data, num_steps=1):
    """Steps on one and the same batch."""
    return model.fit(*data, batch_size=NUM_ROWS, epochs=num_steps, shuffle=False, verbose=0).history


def parameters(part):
    """(w, b) of a ``Linear``."""
    return np.array([weight.item() for weight in part.get_weights()], np.float64)


def largest_confidence(scores, labels):
    return scores[labels == 1].max() / scores[labels == 1].mean()


# The model itself.


def test_the_self_teacher_is_the_models_own_prediction_from_before_the_step(data):
    features, labels = data
    own, given = new_model(config_of("self")), new_model(config_of("cross_fit"))
    scores = own.predict(features, verbose=0)
    history = fit(own, data)
    assert history["max_click_confidence"] == [pytest.approx(largest_confidence(scores, labels), rel=1e-5)]
    fit(given, ({**features, "teacher_score": scores}, labels))
    assert parameters(own.backbone) == pytest.approx(parameters(given.backbone), rel=1e-6)


# Its moving average.


@pytest.mark.parametrize(("ema_momentum", "momenta"), [(0.999, [0.0, 1 / 11]), (0.05, [0.0, 0.05])])
def test_the_ema_teacher_follows_the_backbone_by_hand(data, ema_momentum, momenta):
    # The momentum of step n = 0, 1, ... is n / (n + 10), and at most that of the config: the first step copies.
    teacher, backbone = Linear(weight=2.0, bias=-1.0), Linear()
    model = new_model(config_of("ema", ema_momentum=ema_momentum), backbone=backbone, teacher_backbone=teacher)
    expected = np.array([2.0, -1.0])
    for momentum in momenta:
        fit(model, data)
        expected = momentum * expected + (1 - momentum) * parameters(backbone)
        assert parameters(teacher) == pytest.approx(expected, rel=1e-6)
    assert parameters(teacher) != pytest.approx(parameters(backbone), rel=1e-3)


def test_the_ema_teacher_scores_rows_before_it_moves_and_gets_no_gradient(data):
    features, labels = data
    teacher = Linear(weight=2.0, bias=-1.0)
    averaging, given = new_model(config_of("ema"), teacher_backbone=teacher), new_model(config_of("cross_fit"))
    scores = expit(2.0 * features["x"] - 1.0)
    history = fit(averaging, data)
    assert history["max_click_confidence"] == [pytest.approx(largest_confidence(scores, labels), rel=1e-5)]
    fit(given, ({**features, "teacher_score": scores}, labels))
    assert parameters(averaging.backbone) == pytest.approx(parameters(given.backbone), rel=1e-6)
    # The optimizer knows the backbone's two weights only: a gradient has nowhere to go.
    assert len(averaging.optimizer.variables) == len(given.optimizer.variables)


def test_a_fitted_ema_teacher_lies_between_start_and_backbone_and_predictions_are_the_backbones(data):
    model = new_model(config_of("ema", ema_momentum=0.5), teacher_backbone=(teacher := Linear()))
    fit(model, data, num_steps=10)
    assert 0.5 < parameters(teacher)[0] < parameters(model.backbone)[0]
    expected = expit(parameters(model.backbone) @ [data[0]["x"], np.ones(NUM_ROWS)])
    assert model.predict(data[0], verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("teacher", "has_backbone"), [("ema", False), ("self", True), ("cross_fit", True)])
def test_the_ema_teacher_and_its_backbone_go_together(teacher, has_backbone):
    with pytest.raises(ValueError, match=rf"go together\. Received: teacher='{teacher}', teacher_backbone=") as caught:
        ClsdModel(Linear(), AdGate(INPUTS), config_of(teacher), teacher_backbone=Linear() if has_backbone else None)
    assert ("None" in str(caught.value)) != has_backbone


def test_an_ema_teacher_that_weights_nothing_is_no_hindrance(data):
    # A study compares lambda = mu = 0 with the rest of its configs, all else equal.
    idle = new_model(config_of("ema", lambda_=0.0), teacher_backbone=Linear())
    plain = new_model(config_of("self", lambda_=0.0))
    for model in (idle, plain):
        fit(model, data, num_steps=2)
    assert parameters(idle.backbone).tolist() == parameters(plain.backbone).tolist()


# Scores that come with the rows.


@pytest.mark.parametrize("teacher", ["cross_fit", "prequential"])
def test_given_scores_are_the_teachers(data, teacher):
    features, labels = data
    scores = np.linspace(0.1, 0.9, NUM_ROWS, dtype=np.float32)
    history = fit(new_model(config_of(teacher)), ({**features, "teacher_score": scores}, labels))
    assert history["max_click_confidence"] == [pytest.approx(largest_confidence(scores, labels), rel=1e-5)]


def test_rows_that_no_prequential_model_precedes_count_1_and_enter_no_mean(data):
    features, labels = data
    logits = 0.5 * features["x"].astype(np.float64)
    scores = np.linspace(0.1, 0.9, NUM_ROWS, dtype=np.float32)
    is_known = np.arange(NUM_ROWS) >= NUM_ROWS // 2
    given = {**features, "teacher_score": np.where(is_known, scores, np.nan).astype(np.float32)}
    history = fit(new_model(config_of("prequential")), (given, labels))
    relative = scores / scores[is_known & (labels == 1)].mean()
    confidence = np.where(is_known & (labels == 1), relative, 1.0)
    bce = np.log1p(np.exp(logits)) - labels * logits
    assert history["loss"] == [pytest.approx((confidence * bce).mean(), rel=1e-5)]
    assert history["max_click_confidence"] == [pytest.approx(largest_confidence(scores[is_known], labels[is_known]))]


@pytest.mark.parametrize("teacher", ["cross_fit", "prequential"])
def test_scores_that_do_not_come_are_an_error_with_the_keys_that_came(data, teacher):
    message = rf"teacher='{teacher}' needs features\['teacher_score'\]\. Received: \['tier', 'x'\]\. Add the scores "
    with pytest.raises(ValueError, match=message + "with input_pipeline.with_teacher_scores, or use one of self, ema"):
        fit(new_model(config_of(teacher)), data)


def test_without_weighting_no_scores_are_needed(data):
    history = fit(new_model(config_of("cross_fit", lambda_=0.0)), data)
    assert history["loss"] == history["bce"]


# What is refused.


def test_a_loss_given_to_compile_is_refused():
    with pytest.raises(ValueError, match=r"Received: loss='binary_crossentropy'\. Leave it out"):
        ClsdModel(Linear()).compile("adam", loss="binary_crossentropy")


def test_mu_without_an_ad_gate_is_refused():
    with pytest.raises(ValueError, match=r"mu > 0 needs an AdGate\. Received: mu=0\.5, ad_gate=None"):
        ClsdModel(Linear(), None, config_of("self", lambda_=0.5, mu=0.5))


def test_without_a_config_a_model_asks_for_nothing_that_is_not_there(data):
    model = ClsdModel(Linear())
    model.compile(run_eagerly=True)
    history = fit(model, data)
    assert np.isfinite(history["loss"]).all()
    assert not [name for name in history if "/" in name]
    assert model.config.mu == 0.0
    assert model.config.weights_clicks
    assert ClsdModel(Linear(), AdGate(INPUTS)).config.mu > 0


def test_fit_takes_a_single_callback_as_keras_does(data):
    ended = []
    callback = tf.keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ended.append(epoch))
    new_model(config_of("self")).fit(*data, batch_size=NUM_ROWS, callbacks=callback, verbose=0)
    assert ended == [0]


@pytest.mark.parametrize("shape", [[-1], [-1, 1]])
def test_a_backbone_may_give_logits_with_or_without_a_last_dimension(data, shape):
    class Reshaped(Linear):
        def call(self, features, training=False):
            return tf.reshape(super().call(features), shape)

    model = new_model(config_of("self"), backbone=Reshaped())
    fit(model, data)
    assert model.predict(data[0], verbose=0).shape == (NUM_ROWS,)


def test_a_backbone_with_several_logits_is_refused():
    model = ClsdModel(tf.keras.Sequential([tf.keras.layers.Dense(2)]), None)
    with pytest.raises(ValueError, match=r"logits \[batch\] or \[batch, 1\]\. Received: shape \(3, 2\)"):
        model.logits(tf.ones([3, 2]))


# A killed run.


def test_a_restored_model_goes_on_as_if_nothing_had_happened(data, tmp_path):
    # Moving means over clicks, the moving average and AdGate are part of what is kept.
    features, labels = data

    def model_of_all_parts():
        config = config_of("ema", ema_momentum=0.5, normalizer_momentum=0.9, lambda_=0.5, mu=0.5)
        model = new_model(config, teacher_backbone=Linear(2.0), optimizer=tf.keras.optimizers.Adam(0.1))
        model.debug_outputs(features)  # Creates the weights.
        model.optimizer.build(model.backbone.trainable_variables)
        model.ad_gate_optimizer.build(model.ad_gate.trainable_variables)
        return model

    later = {name: values[:8] for name, values in features.items()}, labels[:8]
    whole, killed, restored = (model_of_all_parts() for _ in range(3))
    for model in (whole, killed):
        fit(model, data, num_steps=3)
    path = tf.train.Checkpoint(model=killed).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=restored).restore(path)
    history, expected = fit(restored, later), fit(whole, later)
    np.testing.assert_equal(history, expected)
    assert restored.get_weights()
    for one, other in zip(restored.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
