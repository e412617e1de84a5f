"""Logistic regression: first-order weights only, the baseline of every comparison."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, LogitBias
from clsd_tf.spec.model_inputs import ModelInputs


class Lr(Backbone):
    """logits = sum over fields of weight[id] + b.

    ``embeddings``, ``hidden_units`` and ``dropout`` are taken, so that every backbone can be built alike, and have
    nothing to act on.

    Source: McMahan et al. (2013), "Ad Click Prediction: a View from the Trenches", section 3.
    """

    def __init__(self, inputs: ModelInputs, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        self._embeddings = self.field_embeddings(inputs, 1)
        self._bias = LogitBias()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        return self._bias(tf.reduce_sum(tf.cast(self._embeddings(features), tf.float32), axis=[1, 2]))
