"""Factorization machine: first-order weights and inner products of all pairs of fields."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, LogitBias, split_first_order
from clsd_tf.spec.model_inputs import ModelInputs


def pairwise_interactions(embeddings: tf.Tensor) -> tf.Tensor:
    """sum over i < j of <e_i, e_j> = (|sum_i e_i|^2 - sum_i |e_i|^2) / 2.

    Args:
      embeddings: [batch, num_fields, embedding_dim].

    Returns:
      float32 [batch]. Source: Rendle (2010), "Factorization Machines", section III.A.
    """
    embeddings = tf.cast(embeddings, tf.float32)  # A difference of large sums: half precision would lose most of it.
    square_of_sum = tf.square(tf.reduce_sum(embeddings, axis=1))
    sum_of_squares = tf.reduce_sum(tf.square(embeddings), axis=1)
    return 0.5 * tf.reduce_sum(square_of_sum - sum_of_squares, axis=1)


class Fm(Backbone):
    """logits = first_order + pairwise_interactions(embeddings) + b.

    ``hidden_units`` and ``dropout`` are taken, so that every backbone can be built alike, and have nothing to act on.

    Source: Rendle (2010), "Factorization Machines", section III.A.
    """

    def __init__(self, inputs: ModelInputs, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim + 1)
        self._bias = LogitBias()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings, first_order = split_first_order(self._embeddings(features))
        return self._bias(first_order + tf.cast(pairwise_interactions(embeddings), tf.float32))
