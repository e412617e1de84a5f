"""Losses against float64 NumPy and Keras, and where floats end."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from clsd_tf.layers.losses import bce_from_logits, focal_loss, label_smoothed_bce, weighted_mean

_LOGITS = np.random.default_rng(0).normal(0, 4, 200)
_CLICKS = np.random.default_rng(1).integers(0, 2, 200).astype(np.float64)


def as_tensors(*columns):
    return [tf.constant(column, tf.float32) for column in columns]


def value_and_gradient(loss, logits):
    logits = tf.Variable(logits, dtype=tf.float32)
    with tf.GradientTape() as tape:
        value = loss(logits)
    return value.numpy(), tape.gradient(value, logits).numpy()


def test_bce_equals_the_definition_in_float64():
    labels = np.where(np.arange(200) < 100, _CLICKS, np.random.default_rng(2).random(200))  # Hard and soft.
    expected = -labels * np.log(expit(_LOGITS)) - (1 - labels) * np.log(expit(-_LOGITS))
    np.testing.assert_allclose(bce_from_logits(*as_tensors(labels, _LOGITS)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss", [bce_from_logits, lambda *rows: label_smoothed_bce(*rows, 0.1), lambda *rows: focal_loss(*rows, 2.0)]
)
def test_losses_have_no_reduction(loss):
    one = loss(tf.ones([1]), tf.constant([0.3])).numpy()
    assert loss(tf.ones([3]), tf.fill([3], 0.3)).numpy() == pytest.approx([*one] * 3)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_value_and_gradient_are_finite_at_extreme_logits(label, logit):
    # At logit 1e4 ctr is 1: value 1e4 and gradient 1 - label for a non-click, 0 and 0 for a click; -1e4 mirrors it.
    value, gradient = value_and_gradient(lambda logits: bce_from_logits(tf.constant([label]), logits), [logit])
    is_wrong = (logit > 0) != (label > 0)
    assert value == pytest.approx([1e4 if is_wrong else 0.0])
    assert gradient == pytest.approx([float(logit > 0) - label])


# Label smoothing.


def test_label_smoothed_bce_by_hand():
    # With smoothing .2 a click is .9 of a click: -.9 * log(.8) - .1 * log(.2) at ctr .8, and the mirror image of it.
    expected = -0.9 * np.log(0.8) - 0.1 * np.log(0.2)
    received = label_smoothed_bce(*as_tensors([1, 0], [np.log(4), -np.log(4)]), smoothing=0.2)
    assert received.numpy() == pytest.approx([expected] * 2)


def test_label_smoothed_bce_equals_that_of_keras():
    expected = tf.keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.3, reduction="none")
    received = label_smoothed_bce(*as_tensors(_CLICKS, _LOGITS), smoothing=0.3)
    rows = as_tensors(_CLICKS[:, None], _LOGITS[:, None])
    np.testing.assert_allclose(received, expected(*rows), rtol=1e-5, atol=1e-6)


def test_smoothing_of_0_is_bce_bit_for_bit():
    rows = as_tensors(_CLICKS, _LOGITS)
    np.testing.assert_array_equal(label_smoothed_bce(*rows, smoothing=0.0), bce_from_logits(*rows))


@pytest.mark.parametrize(("label", "best_ctr"), [(1.0, 0.9), (0.0, 0.1)])
def test_label_smoothing_is_least_where_ctr_is_not_quite_certain(label, best_ctr):
    def loss(logits):
        return label_smoothed_bce(tf.fill([3], label), logits, smoothing=0.2)

    best = np.log(best_ctr / (1 - best_ctr))
    value, gradient = value_and_gradient(loss, [best - 0.5, best, best + 0.5])
    assert value[1] < min(value[0], value[2])
    assert gradient[1] == pytest.approx(0.0, abs=1e-6)


# Focal loss.


def test_focal_loss_by_hand():
    # ctr .9: a click is missed by .1, a non-click by .9; with gamma 2 their losses count .01 and .81 times.
    received = focal_loss(*as_tensors([1, 0], [np.log(9), np.log(9)]), gamma=2.0)
    assert received.numpy() == pytest.approx([-0.01 * np.log(0.9), -0.81 * np.log(0.1)], rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_and_its_gradient_equal_the_definition_in_float64(gamma):
    # With p the ctr of the label: d/dz (-(1 - p)^gamma log p) = sign * (1 - p)^gamma * (gamma p log p + p - 1), where
    # sign is 1 for a click and -1 for the rest (Lin et al. 2017, appendix B).
    sign = 2 * _CLICKS - 1
    p, missed = expit(sign * _LOGITS), expit(-sign * _LOGITS)
    value, gradient = value_and_gradient(lambda logits: focal_loss(*as_tensors(_CLICKS), logits, gamma), _LOGITS)
    np.testing.assert_allclose(value, -(missed**gamma) * np.log(p), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient, sign * missed**gamma * (gamma * p * np.log(p) - missed), rtol=1e-4, atol=1e-6)


def test_gamma_of_0_is_bce_bit_for_bit():
    rows = as_tensors(_CLICKS, _LOGITS)
    np.testing.assert_array_equal(focal_loss(*rows, gamma=0.0), bce_from_logits(*rows))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-1e4, -100.0, 100.0, 1e4])
def test_focal_loss_and_its_gradient_are_finite_at_extreme_logits(gamma, label, logit):
    # A row that is certainly wrong counts in full, as in BCE; one that is certainly right not at all.
    value, gradient = value_and_gradient(lambda logits: focal_loss(tf.constant([label]), logits, gamma), [logit])
    is_wrong = (logit > 0) != (label > 0)
    assert value == pytest.approx([abs(logit) if is_wrong else 0.0])
    assert gradient == pytest.approx([float(logit > 0) - label])


@settings(deadline=None)
@given(st.sampled_from([0.0, 1.0]), st.floats(-50, 50), st.floats(0, 5), st.floats(0, 5))
def test_focal_loss_falls_with_gamma_and_lies_between_0_and_bce(label, logit, gamma, more):
    rows = as_tensors(label, logit)
    bce, less, least = bce_from_logits(*rows), focal_loss(*rows, gamma), focal_loss(*rows, gamma + more)
    assert 0 <= float(least) <= float(less) * (1 + 1e-5) <= float(bce) * (1 + 2e-5)


# The reduction.


def test_weighted_mean_by_hand():
    # (1 * 1 + 3 * 5) / (1 + 3) = 4; the middle row has no weight.
    assert float(weighted_mean(tf.constant([1.0, 100.0, 5.0]), tf.constant([1.0, 0.0, 3.0]))) == 4.0


def test_weighted_mean_does_not_depend_on_the_scale_of_the_weights():
    values, weights = tf.constant([1.0, 2.0, 4.0]), tf.constant([1.0, 2.0, 1.0])
    assert float(weighted_mean(values, weights)) == float(weighted_mean(values, 8 * weights))


def test_weighted_mean_of_all_zero_weights_is_0_with_a_gradient_of_0():
    mean, gradient = value_and_gradient(lambda values: weighted_mean(values, tf.zeros([2])), [1.0, 2.0])
    assert float(mean) == 0.0
    assert gradient.tolist() == [0.0, 0.0]
