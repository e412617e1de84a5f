"""Monitors of the time in which confidence weights the loss; all of it reaches history and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.distributed.replicas import SAME_EVERYWHERE, SUMMED_WHEN_READ
from clsd_tf.spec.model_inputs import GroupInput


class MeansPerGroup(tf.Module):
    """Weighted means in each user group, reported as ``<name>/<group>/<label>``; NaN where nothing fell.

    Not a Keras metric: Keras hands over every metric at every step, a hundred of which would cost more than AdGate
    itself, and resets them when it evaluates. ``GroupLogs`` reads and resets these.

    Args:
      names: what the values are called.
      group: the user group, with a label per id.
    """

    def __init__(self, names: Sequence[str], group: GroupInput):
        super().__init__(name=f"means_per_{group.name}")
        self._names = tuple(names)
        self.group = group
        zeros = tf.zeros([len(group.labels), len(names) + 1])
        self._sums = tf.Variable(zeros, trainable=False, name="sums", **SUMMED_WHEN_READ)

    def update_state(self, group_ids: tf.Tensor, values: Sequence[tf.Tensor], weights: tf.Tensor) -> None:
        """Args: group_ids int64 [batch], values one [batch] per name, weights [batch]."""
        columns = tf.stack([*(value * weights for value in values), weights], axis=1)
        self._sums.assign_add(tf.math.unsorted_segment_sum(columns, group_ids, len(self.group.labels)))

    def reset_state(self) -> None:
        self._sums.assign(tf.zeros(self._sums.shape))

    def result(self) -> dict[str, float]:
        sums = self._sums.numpy()
        with np.errstate(invalid="ignore"):
            means = sums[:, :-1] / sums[:, -1:]
        return {
            f"{name}/{self.group.name}/{label}": float(means[row, column])
            for column, name in enumerate(self._names)
            for row, label in enumerate(self.group.labels)
        }


class GroupLogs(tf.keras.callbacks.Callback):
    """Adds the epoch's means per user group to its logs, for the callbacks behind it."""

    def __init__(self, means_per_group: Sequence[MeansPerGroup]):
        super().__init__()
        self._means_per_group = means_per_group

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        for means in self._means_per_group:
            means.reset_state()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        for means in self._means_per_group:
            logs.update(means.result())


class Range(tf.keras.metrics.Metric):
    """Smallest and largest value over the rows with a positive weight, as ``min_<name>`` and ``max_<name>``."""

    def __init__(self, name: str, **kwargs: Any):
        super().__init__(name=name, dtype="float32", **kwargs)
        # Both as maxima: of the negative values and of the values.
        lowest = tf.keras.initializers.Constant(float("-inf"))
        self._best = self.add_weight(name="best", shape=[2], initializer=lowest, **SAME_EVERYWHERE)

    def update_state(self, maxima: tf.Tensor) -> None:
        """Args: maxima, ``signed_maxima`` of the parts of a batch, [num_parts, 2]."""
        self._best.assign(tf.maximum(self._best, tf.reduce_max(maxima, axis=0)))

    def reset_state(self) -> None:
        self._best.assign(tf.fill([2], float("-inf")))

    def result(self) -> dict[str, tf.Tensor]:
        return {f"min_{self.name}": -self._best[0], f"max_{self.name}": self._best[1]}


def signed_maxima(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Finds the extremes of the rows that count.

    Args:
      values: [batch].
      weights: [batch]; only rows of a positive one count.

    Returns:
      (max of -values, max of values), [2]; -infinity where no row counts.
    """
    return tf.reduce_max(tf.where(weights > 0, tf.stack([-values, values]), float("-inf")), axis=1)


def power_sums(confidence: tf.Tensor, click_weight: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Sums w, c w and c^2 w of c = confidence, w = click_weight; the sums add up over batches.

    Args:
      confidence: [batch].
      click_weight: labels * sample_weight, [batch].

    Returns:
      Three scalars.
    """
    total = tf.reduce_sum(click_weight)
    squares = tf.reduce_sum(tf.square(confidence) * click_weight)
    return total, tf.reduce_sum(confidence * click_weight), squares


def effective_click_share(total: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Effective sample size of the clicks over their number: first^2 / (second * total).

    Args:
      total: the first of ``power_sums``, sum of w.
      first: the second, sum of c w.
      second: the third, sum of c^2 w.

    Returns:
      Scalar in (0, 1]: 1 if all clicks count the same, 1 / n if one of n counts alone; 1 without clicks.

    Source: Kish (1965), "Survey Sampling", section 11.7.
    """
    return tf.where(total > 0, tf.math.divide_no_nan(tf.square(first), second * total), 1.0)
