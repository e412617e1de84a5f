"""AutoInt: multi-head self-attention over the fields, beside an MLP."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, concat_fields, logit_layer, mlp, require_positive_integers
from clsd_tf.spec.model_inputs import ModelInputs


class InteractingLayer(tf.keras.layers.Layer):
    """relu(concat over heads of softmax(Q_h K_h^T) V_h + residual); Q, K, V and residual are linear in the fields.

    The scores are plain inner products, without a scale, as in the paper.

    Args:
      num_heads: number of heads.
      head_dim: size of each head's queries, keys and values.

    Returns:
      ``call`` maps [batch, num_fields, dim] to [batch, num_fields, num_heads * head_dim].
    """

    def __init__(self, num_heads: int, head_dim: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._shape = (num_heads, head_dim)
        self._query, self._key, self._value, self._residual = (
            tf.keras.layers.Dense(num_heads * head_dim, use_bias=False, name=name)
            for name in ("query", "key", "value", "residual")
        )

    def call(self, fields: tf.Tensor) -> tf.Tensor:
        num_fields = fields.shape[1]
        # [batch, num_fields, num_heads, head_dim]
        query, key, value = (
            tf.reshape(project(fields), [-1, num_fields, *self._shape])
            for project in (self._query, self._key, self._value)
        )
        attention = tf.nn.softmax(tf.einsum("bmhd,bkhd->bhmk", query, key))
        attended = tf.einsum("bhmk,bkhd->bmhd", attention, value)
        residual = self._residual(fields)
        return tf.nn.relu(tf.reshape(attended, [-1, num_fields, residual.shape[2]]) + residual)


class AutoInt(Backbone):
    """logits = w_1 . concat(fields after L interacting layers) + w_2 . mlp(concat(embeddings)) + b.

    With the MLP this is the paper's AutoInt+; ``hidden_units=()`` leaves it out and gives AutoInt.

    Source: Song et al. (2019), "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
    section 4.

    Args:
      num_attention_layers: number L of interacting layers, >= 1.
      num_heads: heads of each layer, >= 1.
      head_dim: size of each head, >= 1.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        *,
        num_attention_layers: int = 2,
        num_heads: int = 2,
        head_dim: int = 16,
        **kwargs: Any,
    ):
        super().__init__(inputs, **kwargs)
        own = {"num_attention_layers": num_attention_layers, "num_heads": num_heads, "head_dim": head_dim}
        require_positive_integers(**own)
        self._config.update(own)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim)
        self._interacting = [
            InteractingLayer(num_heads, head_dim, name=f"interacting_{index}") for index in range(num_attention_layers)
        ]
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"]) if self._config["hidden_units"] else None
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings = self._embeddings(features)
        fields = embeddings
        for interacting in self._interacting:
            fields = interacting(fields)
        joined = concat_fields(fields)
        if self._mlp:
            joined = tf.concat([joined, self._mlp(concat_fields(embeddings), training=training)], axis=1)
        return tf.squeeze(self._logits(joined), axis=1)
