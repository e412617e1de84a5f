"""DeepFM: first-order weights, factorisation machine and MLP over shared embeddings."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, concat_fields, logit_layer, mlp
from clsd_tf.embeddings import FieldEmbeddings
from clsd_tf.model_inputs import ModelInputs


def pairwise_interactions(embeddings: tf.Tensor) -> tf.Tensor:
    """sum over i < j of <e_i, e_j> = (|sum_i e_i|^2 - sum_i |e_i|^2) / 2.

    Args:
      embeddings: [batch, num_fields, embedding_dim].

    Returns:
      [batch]. Source: Rendle (2010), "Factorization Machines", section III.A.
    """
    square_of_sum = tf.square(tf.reduce_sum(embeddings, axis=1))
    sum_of_squares = tf.reduce_sum(tf.square(embeddings), axis=1)
    return 0.5 * tf.reduce_sum(square_of_sum - sum_of_squares, axis=1)


class DeepFm(Backbone):
    """logits = first_order + pairwise_interactions(embeddings) + w . mlp(concat(embeddings)) + b.

    Source: Guo et al. (2017), "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", section 2.
    """

    def __init__(self, inputs: ModelInputs, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        # One lookup for both: the last column of each table is the first-order weight.
        self._embeddings = FieldEmbeddings(inputs, self._config["embedding_dim"] + 1)
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        looked_up = self._embeddings(features)
        embeddings, weights = looked_up[:, :, :-1], looked_up[:, :, -1]
        flat = concat_fields(embeddings)
        deep = tf.squeeze(self._logits(self._mlp(flat, training=training)), axis=1)
        shallow = tf.reduce_sum(weights, axis=1) + pairwise_interactions(embeddings)
        return deep + tf.cast(shallow, tf.float32)
