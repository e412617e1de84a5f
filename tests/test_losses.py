"""Losses against float64 NumPy, and where floats end."""

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf.losses import bce_from_logits, weighted_mean


def test_bce_equals_the_definition_in_float64():
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, 200)
    labels = np.where(np.arange(200) < 100, random.integers(0, 2, 200), random.random(200))  # Hard and soft.
    pctr = 1 / (1 + np.exp(-logits))
    expected = -labels * np.log(pctr) - (1 - labels) * np.log(1 - pctr)
    received = bce_from_logits(tf.constant(labels, tf.float32), tf.constant(logits, tf.float32)).numpy()
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


def test_bce_has_no_reduction():
    assert bce_from_logits(tf.zeros([3]), tf.zeros([3])).numpy() == pytest.approx([np.log(2)] * 3)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_value_and_gradient_are_finite_at_extreme_logits(label, logit):
    # At logit 1e4 pctr is 1: value 1e4 and gradient 1 - label for a non-click, 0 and 0 for a click; -1e4 mirrors it.
    logits = tf.Variable([logit])
    with tf.GradientTape() as tape:
        value = bce_from_logits(tf.constant([label]), logits)
    is_wrong = (logit > 0) != (label > 0)
    assert value.numpy() == pytest.approx([1e4 if is_wrong else 0.0])
    assert tape.gradient(value, logits).numpy() == pytest.approx([float(logit > 0) - label])


def test_weighted_mean_by_hand():
    # (1 * 1 + 3 * 5) / (1 + 3) = 4; the middle row has no weight.
    assert float(weighted_mean(tf.constant([1.0, 100.0, 5.0]), tf.constant([1.0, 0.0, 3.0]))) == 4.0


def test_weighted_mean_does_not_depend_on_the_scale_of_the_weights():
    values, weights = tf.constant([1.0, 2.0, 4.0]), tf.constant([1.0, 2.0, 1.0])
    assert float(weighted_mean(values, weights)) == float(weighted_mean(values, 8 * weights))


def test_weighted_mean_of_all_zero_weights_is_0_with_a_gradient_of_0():
    values = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        mean = weighted_mean(values, tf.zeros([2]))
    assert float(mean) == 0.0
    assert tape.gradient(mean, values).numpy().tolist() == [0.0, 0.0]
