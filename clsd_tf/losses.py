"""Losses as pure functions: per example, from logits, no reduction."""

from __future__ import annotations

import tensorflow as tf


def bce_from_logits(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Binary cross-entropy: -labels * log(pctr) - (1 - labels) * log(1 - pctr), pctr = sigmoid(logits).

    Args:
      labels: float [batch], in [0, 1].
      logits: float [batch].

    Returns:
      [batch], finite for every finite logit.
    """
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)


def weighted_mean(values: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """sum(sample_weight * values) / sum(sample_weight), or 0 when all weights are 0.

    This is the one reduction of this package. Click confidence multiplies ``values`` and does not enter the
    denominator: it is normalised to a mean of about 1 over clicks already, so that it hardly changes the step size.
    """
    return tf.math.divide_no_nan(tf.reduce_sum(sample_weight * values), tf.reduce_sum(sample_weight))
