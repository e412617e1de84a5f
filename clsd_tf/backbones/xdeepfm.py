"""xDeepFM: first-order weights, compressed interaction network and MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import (
    Backbone,
    Features,
    concat_fields,
    logit_layer,
    mlp,
    require_unit_sizes,
    split_first_order,
)
from clsd_tf.spec.model_inputs import ModelInputs


class CompressedInteractions(tf.keras.layers.Layer):
    """CIN: X^k_h = sum_{i,j} W^{k,h}_{ij} * (X^{k-1}_i * X^0_j), and the sum of every X^k_h over its embedding.

    X^0 are the field embeddings; all products are element-wise, and no activation follows, as the paper found best.

    Args:
      units: number of feature maps X^k_h of each layer k.

    Returns:
      ``call`` maps [batch, num_fields, embedding_dim] to [batch, sum(units)].
    """

    def __init__(self, units: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        self._compress = [
            tf.keras.layers.Dense(count, use_bias=False, name=f"compress_{index}") for index, count in enumerate(units)
        ]

    def call(self, embeddings: tf.Tensor) -> tf.Tensor:
        # [batch, embedding_dim, num_fields]
        fields = tf.transpose(embeddings, [0, 2, 1])
        maps, pooled = fields, []
        for compress in self._compress:
            # [batch, embedding_dim, num_maps, num_fields]
            products = tf.einsum("bdi,bdj->bdij", maps, fields)
            maps = compress(tf.reshape(products, [-1, fields.shape[1], maps.shape[2] * fields.shape[2]]))
            pooled.append(tf.reduce_sum(maps, axis=1))
        return tf.concat(pooled, axis=1)


class XDeepFm(Backbone):
    """logits = first_order + w_1 . cin(embeddings) + w_2 . mlp(concat(embeddings)) + b.

    Source: Lian et al. (2018), "xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender
    Systems", section 3.

    Args:
      cin_units: feature maps of each layer of the compressed interaction network; at least one layer.
    """

    def __init__(self, inputs: ModelInputs, *, cin_units: Sequence[int] = (64, 64), **kwargs: Any):
        super().__init__(inputs, **kwargs)
        require_unit_sizes("cin_units", cin_units, min_layers=1)
        self._config["cin_units"] = list(cin_units)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim + 1)
        self._cin = CompressedInteractions(cin_units, name="cin")
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings, first_order = split_first_order(self._embeddings(features))
        deep = self._mlp(concat_fields(embeddings), training=training)
        joined = tf.concat([self._cin(embeddings), deep], axis=1)
        return first_order + tf.squeeze(self._logits(joined), axis=1)
