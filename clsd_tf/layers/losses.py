"""Losses as pure functions: per example, from logits, no reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable

import tensorflow as tf


def bce_from_logits(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Binary cross-entropy: -labels * log(ctr) - (1 - labels) * log(1 - ctr), ctr = sigmoid(logits).

    Args:
      labels: float [batch], in [0, 1].
      logits: float [batch].

    Returns:
      [batch], finite for every finite logit.
    """
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)


def label_smoothed_bce(labels: tf.Tensor, logits: tf.Tensor, smoothing: float) -> tf.Tensor:
    """bce_from_logits((1 - smoothing) * labels + smoothing / 2, logits): no click is taken for certain.

    Args:
      labels: float [batch], in [0, 1].
      logits: float [batch].
      smoothing: in [0, 1).

    Returns:
      [batch]. Source: Szegedy et al. (2016), "Rethinking the Inception Architecture", section 7.
    """
    return bce_from_logits((1.0 - smoothing) * labels + 0.5 * smoothing, logits)


def focal_loss(labels: tf.Tensor, logits: tf.Tensor, gamma: float) -> tf.Tensor:
    """(1 - ctr of the label)^gamma * bce_from_logits(labels, logits): easy rows count less.

    The opposite of click confidence: it turns to the clicks that the model did not expect.

    Args:
      labels: 0 or 1, float [batch].
      logits: float [batch].
      gamma: >= 0; 0 is BCE.

    Returns:
      [batch]. Source: Lin et al. (2017), "Focal Loss for Dense Object Detection", section 3.2.
    """
    bce = bce_from_logits(labels, logits)
    missed = -tf.math.expm1(-bce)  # 1 - exp(-bce) = 1 - ctr of the label, without cancellation.
    # The smallest float keeps the gradient of x^gamma, gamma < 1, finite at x = 0.
    return tf.pow(tf.maximum(missed, 1e-30), gamma) * bce


def weighted_mean(values: tf.Tensor, sample_weight: tf.Tensor, total_weight: tf.Tensor | None = None) -> tf.Tensor:
    """sum(sample_weight * values) / total_weight, or 0 when total_weight is 0.

    This is the one reduction of this package. Click confidence multiplies ``values`` and does not enter the
    denominator: it is normalized to a mean of about 1 over clicks already, so that it hardly changes the step size.

    Args:
      values: [batch].
      sample_weight: [batch], >= 0.
      total_weight: sum(sample_weight) by default. Replicas that share a batch give the sum over all of them: their
        results, and the gradients of these, then add up to those of the whole batch.

    Returns:
      A scalar.
    """
    if total_weight is None:
        total_weight = tf.reduce_sum(sample_weight)
    return tf.math.divide_no_nan(tf.reduce_sum(sample_weight * values), total_weight)


def loss_function(name: str, *, smoothing: float, gamma: float) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Finds a loss by name.

    Args:
      name: ``bce``, ``label_smoothing`` or ``focal``.
      smoothing: of ``label_smoothed_bce``.
      gamma: of ``focal_loss``.

    Returns:
      (labels, logits), each [batch] -> loss of each row, [batch].
    """
    losses: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
        "bce": bce_from_logits,
        "label_smoothing": functools.partial(label_smoothed_bce, smoothing=smoothing),
        "focal": functools.partial(focal_loss, gamma=gamma),
    }
    return losses[name]
