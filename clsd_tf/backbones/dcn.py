"""DCN: explicit feature crosses beside an MLP, and the structure that its successors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, concat_fields, logit_layer, mlp, require_positive_integers
from clsd_tf.spec.model_inputs import ModelInputs


class CrossAndDeep(Backbone):
    """logits = w . concat(x_L, mlp(x_0)) + b with x_{l+1} = cross_l(x_0, x_l): the parallel structure, abstract.

    Args:
      crosses: the layers cross_0 to cross_{L-1}; each maps x_0 and x_l to x_{l+1}, all [batch, dim].
    """

    def __init__(self, inputs: ModelInputs, crosses: Sequence[tf.keras.layers.Layer], **kwargs: Any):
        super().__init__(inputs, **kwargs)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim)
        self._crosses = list(crosses)
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        flat = concat_fields(self._embeddings(features))
        crossed = flat
        for cross in self._crosses:
            crossed = cross(flat, crossed)
        joined = tf.concat([crossed, self._mlp(flat, training=training)], axis=1)
        return tf.squeeze(self._logits(joined), axis=1)


class VectorCross(tf.keras.layers.Layer):
    """x_0 * (x_l . w) + b + x_l.

    Args:
      flat: x_0, [batch, dim].
      crossed: x_l, [batch, dim].

    Returns:
      x_{l+1}, [batch, dim].
    """

    def build(self, input_shape: Any) -> None:
        dim = input_shape[-1]
        self._kernel = self.add_weight(name="kernel", shape=[dim, 1], initializer="glorot_uniform")
        self._bias = self.add_weight(name="bias", shape=[dim], initializer="zeros")
        super().build(input_shape)

    def call(self, flat: tf.Tensor, crossed: tf.Tensor) -> tf.Tensor:
        return flat * tf.matmul(crossed, self._kernel) + self._bias + crossed


class Dcn(CrossAndDeep):
    """x_{l+1} = x_0 * (x_l . w_l) + b_l + x_l; logits = w . concat(x_L, mlp(x_0)) + b.

    Source: Wang et al. (2017), "Deep & Cross Network for Ad Click Predictions", section 2.

    Args:
      num_cross_layers: number L of cross layers, >= 1.
    """

    def __init__(self, inputs: ModelInputs, *, num_cross_layers: int = 2, **kwargs: Any):
        require_positive_integers(num_cross_layers=num_cross_layers)
        super().__init__(inputs, [VectorCross(name=f"cross_{index}") for index in range(num_cross_layers)], **kwargs)
        self._config["num_cross_layers"] = num_cross_layers
