"""What is watched: the metrics by hand, and what reaches the history of ``fit``."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.config import ClsdConfig, OverconfidentTeacherWarning
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.methods.clsd.monitors import (
    MeansPerGroup,
    Range,
    effective_click_share,
    power_sums,
    signed_maxima,
)
from clsd_tf.methods.monitors import WeightedMeans
from clsd_tf.spec.model_inputs import GroupInput, ModelInputs

TIER = GroupInput("tier", ("unknown", "low", "high"))
AGE = GroupInput("age", ("unknown", "young"))
INPUTS = ModelInputs(categorical=(), numeric=("x",), groups=(TIER, AGE))


def floats(result):
    return {name: float(value) for name, value in result.items()}


# The metrics.


def test_weighted_means_by_hand():
    metric = WeightedMeans(["loss", "share"])
    assert floats(metric.result()) == {"loss": 0.0, "share": 0.0}
    metric.update_state([tf.constant(2.0), tf.constant(0.5)], [tf.constant(4.0), tf.constant(1.0)])
    metric.update_state([tf.constant(5.0), tf.constant(0.8)], [tf.constant(2.0), tf.constant(0.0)])
    assert floats(metric.result()) == {"loss": pytest.approx((4 * 2 + 2 * 5) / 6), "share": 0.5}
    metric.reset_state()
    assert floats(metric.result()) == {"loss": 0.0, "share": 0.0}
    metric.update_state([tf.constant(7.0), tf.constant(0.1)], [tf.constant(1.0), tf.constant(3.0)])
    assert floats(metric.result()) == pytest.approx({"loss": 7.0, "share": 0.1})


def test_means_per_group_weigh_rows_and_are_nan_where_nothing_fell():
    metric = MeansPerGroup(["confidence", "correction"], TIER)
    assert np.isnan([*floats(metric.result()).values()]).all()
    values = tf.constant([1.0, 4.0, 9.0]), tf.constant([0.1, 0.4, 0.9])
    metric.update_state(tf.constant([1, 1, 2]), values, tf.constant([2.0, 1.0, 0.0]))
    metric.update_state(tf.constant([1]), (tf.constant([6.0]), tf.constant([0.0])), tf.constant([1.0]))
    result = floats(metric.result())
    assert result.pop("confidence/tier/low") == pytest.approx((2 * 1 + 4 + 6) / 4)
    assert result.pop("correction/tier/low") == pytest.approx((2 * 0.1 + 0.4 + 0) / 4)
    assert set(result) == {
        f"{name}/tier/{label}" for name in ("confidence", "correction") for label in TIER.labels[::2]
    }
    assert np.isnan([*result.values()]).all()
    metric.reset_state()
    assert np.isnan([*floats(metric.result()).values()]).all()


def test_range_looks_at_rows_of_positive_weight_only():
    metric = Range("confidence")
    nothing = {"min_confidence": np.inf, "max_confidence": -np.inf}
    assert floats(metric.result()) == nothing
    metric.update_state([signed_maxima(tf.constant([1.0, 3.0, 99.0]), tf.constant([1.0, 0.5, 0.0]))])
    metric.update_state([signed_maxima(tf.constant([-2.0, -99.0]), tf.constant([1.0, 0.0]))])
    assert floats(metric.result()) == {"min_confidence": -2.0, "max_confidence": 3.0}
    metric.update_state([signed_maxima(tf.constant([50.0]), tf.constant([0.0]))])  # A batch without clicks.
    assert floats(metric.result()) == {"min_confidence": -2.0, "max_confidence": 3.0}
    metric.reset_state()
    assert floats(metric.result()) == nothing
    metric.update_state([signed_maxima(tf.constant([0.5]), tf.constant([1.0]))])
    assert floats(metric.result()) == {"min_confidence": 0.5, "max_confidence": 0.5}


@pytest.mark.parametrize(
    ("confidence", "click_weight", "expected"),
    [
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 1.0),  # All count the same.
        ([0.0, 5.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], 0.25),  # One of four counts alone.
        ([1.0, 3.0], [1.0, 1.0], 0.8),  # 4^2 / (10 * 2).
        ([1.0, 3.0, 9.0], [1.0, 1.0, 0.0], 0.8),  # The third is no click.
        ([1.0, 3.0], [3.0, 1.0], 0.75),  # As (1, 1, 1, 3): 6^2 / (12 * 4).
        ([1.0, 3.0], [0.0, 0.0], 1.0),  # Without clicks.
    ],
)
def test_effective_click_share_by_hand(confidence, click_weight, expected):
    received = effective_click_share(*power_sums(tf.constant(confidence), tf.constant(click_weight)))
    assert float(received) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.floats(0.05, 3.0), min_size=1, max_size=20), st.floats(0.1, 10.0))
def test_effective_click_share_lies_between_1_of_n_and_1_whatever_the_scale(confidence, scale):
    values, weights = tf.constant(confidence), tf.ones([len(confidence)])
    share = float(effective_click_share(*power_sums(values, weights)))
    assert 1 / len(confidence) - 1e-6 <= share <= 1 + 1e-6
    assert float(effective_click_share(*power_sums(scale * values, weights))) == pytest.approx(share, rel=1e-4)


# What reaches the history.


class Linear(tf.keras.Model):
    """logits = x, to begin with."""

    def __init__(self):
        super().__init__()
        self._logits = tf.keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, features, training=False):
        return self._logits(features["x"][:, tf.newaxis])


def fit_frozen(config, features, labels, **arguments):
    """One epoch in batches of 4, in which neither backbone nor AdGate moves."""
    model = ClsdModel(Linear(), AdGate(INPUTS), config)
    model.compile(tf.keras.optimizers.SGD(0.0), ad_gate_optimizer=tf.keras.optimizers.SGD(0.0), run_eagerly=True)
    features = {name: tf.constant(column) for name, column in features.items()}
    labels = tf.constant(labels)
    return model.fit(features, labels, batch_size=4, shuffle=False, verbose=0, **arguments).history


# A batch of two clicks of four rows, and one of one click of three rows.
FEATURES = {
    "x": [np.log(4.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "tier": [1, 2, 0, 0, 1, 0, 2],
    "age": [0, 1, 0, 0, 0, 0, 1],
    "teacher_score": [0.2, 0.6, 0.5, 0.9, 0.3, 0.5, 0.1],
}
LABELS = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
CLSD = ClsdConfig(loss_warmup_steps=0, global_weighting="mean_one", lambda_=1.0, mu=0.0)


def test_history_is_a_mean_over_rows_or_clicks_of_the_epoch_by_hand():
    history = {name: values[0] for name, values in fit_frozen(CLSD, FEATURES, LABELS).items()}
    # Confidence is (.2, .6) / .4 = (.5, 1.5) and, in the second batch, 1. ctr is .8 in the first row and .5 elsewhere.
    assert history.pop("loss") == pytest.approx((-0.5 * np.log(0.8) + (1.5 + 2 + 3) * np.log(2)) / 7)
    assert history.pop("bce") == pytest.approx((-np.log(0.8) + 6 * np.log(2)) / 7)
    assert history.pop("mean_ctr") == pytest.approx((0.8 + 6 * 0.5) / 7)
    # AdGate gives 0: the mean over clicks of (1 - teacher score)^2.
    assert history.pop("ad_gate_loss") == pytest.approx((0.8**2 + 0.4**2 + 0.7**2) / 3)
    # (.5 + 1.5)^2 / ((.25 + 2.25) * 2) = .8 for two clicks, and 1 for one.
    assert history.pop("effective_click_share") == pytest.approx((2 * 0.8 + 1) / 3)
    assert history.pop("min_click_confidence") == pytest.approx(0.5)
    assert history.pop("max_click_confidence") == pytest.approx(1.5)
    assert history.pop("click_confidence/tier/low") == pytest.approx((0.5 + 1) / 2)
    assert history.pop("click_confidence/tier/high") == pytest.approx(1.5)
    assert history.pop("click_confidence/age/unknown") == pytest.approx((0.5 + 1) / 2)
    assert history.pop("click_confidence/age/young") == pytest.approx(1.5)
    assert [history.pop(f"ad_gate/{name}") for name in ("tier/low", "tier/high", "age/unknown", "age/young")] == [0] * 4
    # No click of an unknown tier came.
    assert set(history) == {"click_confidence/tier/unknown", "ad_gate/tier/unknown"}
    assert np.isnan([*history.values()]).all()


def test_sample_weights_count_in_every_monitor():
    # The second click counts twice, so that the mean over clicks is (.2 + 2 * .6) / 3; the fourth row and the second
    # batch count not at all.
    weights = tf.constant([1.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    history = fit_frozen(CLSD, FEATURES, LABELS, sample_weight=weights)
    mean = 1.4 / 3
    first, second = 0.2 / mean, 0.6 / mean
    assert history["bce"] == [pytest.approx((-np.log(0.8) + 3 * np.log(2)) / 4)]
    assert history["loss"] == [pytest.approx((-first * np.log(0.8) + (2 * second + 1) * np.log(2)) / 4)]
    assert history["mean_ctr"] == [pytest.approx((0.8 + 3 * 0.5) / 4)]
    assert history["ad_gate_loss"] == [pytest.approx((0.8**2 + 2 * 0.4**2) / 3)]
    assert history["effective_click_share"] == [pytest.approx(3**2 / (3 * (first**2 + 2 * second**2)))]
    assert history["max_click_confidence"] == [pytest.approx(second)]
    assert history["click_confidence/tier/low"] == [pytest.approx(first)]


def test_validation_has_loss_and_mean_ctr_and_none_of_the_monitors():
    validation = {name: tf.constant(column) for name, column in FEATURES.items()}, tf.constant(LABELS)
    history = fit_frozen(CLSD, FEATURES, LABELS, validation_data=validation)
    assert {name for name in history if name.startswith("val_")} == {"val_loss", "val_mean_ctr"}
    assert history["val_loss"] == [pytest.approx((-np.log(0.8) + 6 * np.log(2)) / 7)]  # Plain BCE.
    assert history["val_mean_ctr"] == [pytest.approx((0.8 + 6 * 0.5) / 7)]
    # And what was watched in training is still there, though Keras resets metrics to evaluate.
    of_training = {name: values for name, values in history.items() if not name.startswith("val_")}
    alone = fit_frozen(CLSD, FEATURES, LABELS)
    assert of_training.keys() == alone.keys()
    for name, values in alone.items():
        np.testing.assert_allclose(of_training[name], values, rtol=1e-6, err_msg=name)


def test_without_weighting_there_is_nothing_of_it_to_watch():
    config = ClsdConfig(lambda_=0.0, mu=0.0, teacher="self")
    assert set(fit_frozen(config, FEATURES, LABELS)) == {"loss", "bce", "mean_ctr"}


def test_monitors_start_afresh_in_each_epoch():
    # The first epoch's clicks have unequal teacher scores, the second's equal ones: confidence 1 throughout.
    columns = {name: tf.constant([column[:4]] * 2) for name, column in FEATURES.items()}
    columns["teacher_score"] = tf.constant([FEATURES["teacher_score"][:4], [0.5] * 4])
    batches = tf.data.Dataset.from_tensor_slices((columns, tf.constant([LABELS[:4]] * 2)))
    model = ClsdModel(Linear(), AdGate(INPUTS), CLSD)
    model.compile(run_eagerly=True)
    history = model.fit(batches, epochs=2, steps_per_epoch=1, verbose=0).history
    assert history["min_click_confidence"] == pytest.approx([0.5, 1.0])
    assert history["max_click_confidence"] == pytest.approx([1.5, 1.0])
    assert history["effective_click_share"] == pytest.approx([0.8, 1.0])
    assert history["click_confidence/tier/low"] == pytest.approx([0.5, 1.0])
    assert history["click_confidence/tier/high"] == pytest.approx([1.5, 1.0])


def test_an_online_teacher_over_several_epochs_is_warned_of():
    model = ClsdModel(Linear(), AdGate(INPUTS), ClsdConfig(teacher="self", loss_warmup_steps=0))
    model.compile()
    columns = {name: tf.constant(column) for name, column in FEATURES.items()}
    with pytest.warns(OverconfidentTeacherWarning, match=r"teacher=self judges.*Received: 2 epochs\. Use a cross_fit"):
        model.fit(columns, tf.constant(LABELS), epochs=2, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OverconfidentTeacherWarning)
        model.fit(columns, tf.constant(LABELS), epochs=1, verbose=0)
