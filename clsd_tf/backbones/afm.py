"""AFM: a factorization machine that learns how much each pair of fields matters."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import (
    Backbone,
    Features,
    logit_layer,
    pair_products,
    require_positive_integers,
    split_first_order,
)
from clsd_tf.spec.model_inputs import ModelInputs


class AttentionPooling(tf.keras.layers.Layer):
    """sum_p attention_p * pairs_p with attention = softmax over pairs of h . relu(W pairs_p + b).

    Args:
      units: size of the attention network's hidden layer.

    Returns:
      ``call`` maps [batch, num_pairs, embedding_dim] to [batch, embedding_dim].
    """

    def __init__(self, units: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._hidden = tf.keras.layers.Dense(units, activation="relu", name="hidden")
        self._score = tf.keras.layers.Dense(1, use_bias=False, name="score")

    def call(self, pairs: tf.Tensor) -> tf.Tensor:
        attention = tf.nn.softmax(self._score(self._hidden(pairs)), axis=1)
        return tf.reduce_sum(attention * pairs, axis=1)


class Afm(Backbone):
    """logits = first_order + p . attention_pooling(e_i * e_j for all i < j) + b.

    ``dropout`` acts on the products of pairs, as in the paper. ``hidden_units`` is taken, so that every backbone can
    be built alike, and has nothing to act on.

    Source: Xiao et al. (2017), "Attentional Factorization Machines: Learning the Weight of Feature Interactions via
    Attention Networks", section 3.

    Args:
      attention_units: size of the attention network's hidden layer, >= 1.
    """

    min_num_fields = 2

    def __init__(self, inputs: ModelInputs, *, attention_units: int = 16, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        require_positive_integers(attention_units=attention_units)
        self._config["attention_units"] = attention_units
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim + 1)
        self._dropout = tf.keras.layers.Dropout(self._config["dropout"])
        self._pooling = AttentionPooling(attention_units, name="attention_pooling")
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings, first_order = split_first_order(self._embeddings(features))
        pairs = pair_products(embeddings, embeddings)
        pooled = self._pooling(self._dropout(pairs, training=training))
        return first_order + tf.squeeze(self._logits(pooled), axis=1)
