"""Monitors of every training step; all of it reaches history and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.distributed.replicas import SAME_EVERYWHERE


class WeightedMeans(tf.keras.metrics.Metric):
    """Weighted means of several values in one metric: a metric each would cost a small model a tenth of its step.

    Replicas hand over the same values: those of the global batch.

    Args:
      names: what the values are called, as in the results.
    """

    def __init__(self, names: Sequence[str], name: str = "weighted_means", **kwargs: Any):
        super().__init__(name=name, dtype="float32", **kwargs)
        self.names = tuple(names)
        shape = [2, len(self.names)]
        self._sums = self.add_weight(name="sums", shape=shape, initializer="zeros", **SAME_EVERYWHERE)

    def update_state(self, values: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> None:
        """Args: values, a scalar per name: means; weights, a scalar per name: what each mean counts."""
        weights = tf.stack(weights)
        self._sums.assign_add(tf.stack([tf.stack(values) * weights, weights]))

    def reset_state(self) -> None:
        self._sums.assign(tf.zeros(self._sums.shape))

    def result(self) -> dict[str, tf.Tensor]:
        means = tf.math.divide_no_nan(self._sums[0], self._sums[1])
        return {name: means[index] for index, name in enumerate(self.names)}
