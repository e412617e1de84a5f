"""What is watched while confidence weights the loss: Keras metrics, so they reach history and TensorBoard."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.model_inputs import GroupInput


class MeanPerGroup(tf.keras.metrics.Metric):
    """Weighted mean of a value in each user group, reported as ``<name>/<group>/<label>``; NaN where nothing fell.

    Args:
      name: what the value is called.
      group: the user group, with a label per id.
    """

    def __init__(self, name: str, group: GroupInput, **kwargs: Any):
        super().__init__(name=name, dtype="float32", **kwargs)
        self._group = group
        size = [len(group.labels)]
        self._total = self.add_weight(name="total", shape=size, initializer="zeros")
        self._weight = self.add_weight(name="weight", shape=size, initializer="zeros")

    def update_state(self, group_ids: tf.Tensor, values: tf.Tensor, weights: tf.Tensor) -> None:
        """Args: group_ids int64 [batch], values [batch], weights [batch]."""
        size = len(self._group.labels)
        self._total.assign_add(tf.math.unsorted_segment_sum(values * weights, group_ids, size))
        self._weight.assign_add(tf.math.unsorted_segment_sum(weights, group_ids, size))

    def reset_state(self) -> None:
        for variable in (self._total, self._weight):
            variable.assign(tf.zeros_like(variable))

    def result(self) -> dict[str, tf.Tensor]:
        means = self._total / self._weight
        return {f"{self.name}/{self._group.name}/{label}": means[i] for i, label in enumerate(self._group.labels)}


class Extremum(tf.keras.metrics.Metric):
    """Smallest or largest value over the rows with a positive weight.

    Args:
      name: the metric's name.
      largest: the maximum if true, else the minimum.
    """

    def __init__(self, name: str, *, largest: bool, **kwargs: Any):
        super().__init__(name=name, dtype="float32", **kwargs)
        self._sign = 1.0 if largest else -1.0
        self._best = self.add_weight(name="best", initializer=tf.keras.initializers.Constant(float("-inf")))

    def update_state(self, values: tf.Tensor, weights: tf.Tensor) -> None:
        signed = tf.where(weights > 0, self._sign * values, float("-inf"))
        self._best.assign(tf.maximum(self._best, tf.reduce_max(signed)))

    def reset_state(self) -> None:
        self._best.assign(float("-inf"))

    def result(self) -> tf.Tensor:
        return self._sign * self._best
