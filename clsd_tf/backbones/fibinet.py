"""FiBiNET: importance of fields by squeeze and excitation, and bilinear interactions of all pairs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import (
    Backbone,
    Features,
    concat_fields,
    logit_layer,
    mlp,
    pair_products,
    require_positive_integers,
    split_first_order,
    stacked_glorot,
)
from clsd_tf.spec.model_inputs import ModelInputs


class Senet(tf.keras.layers.Layer):
    """a_i * e_i with a = relu(W_2 relu(W_1 z)) and z_i the mean of embedding e_i.

    Args:
      reduction_ratio: W_1 reduces num_fields values to max(1, num_fields // reduction_ratio).

    Returns:
      ``call`` keeps the shape, [batch, num_fields, embedding_dim].
    """

    def __init__(self, reduction_ratio: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._reduction_ratio = reduction_ratio

    def build(self, input_shape: Any) -> None:
        num_fields = input_shape[1]
        reduced = max(1, num_fields // self._reduction_ratio)
        self._squeeze = tf.keras.layers.Dense(reduced, activation="relu", use_bias=False, name="squeeze")
        self._excite = tf.keras.layers.Dense(num_fields, activation="relu", use_bias=False, name="excite")
        super().build(input_shape)

    def call(self, embeddings: tf.Tensor) -> tf.Tensor:
        importance = self._excite(self._squeeze(tf.reduce_mean(embeddings, axis=2)))
        return embeddings * importance[:, :, tf.newaxis]


class BilinearInteraction(tf.keras.layers.Layer):
    """(e_i W_i) * e_j for all pairs i < j, one matrix for each field: the paper's "field-each" type.

    Of the paper's three types this one grows linearly with the number of fields and still tells fields apart.

    Returns:
      ``call`` maps [batch, num_fields, embedding_dim] to [batch, num_pairs * embedding_dim].
    """

    def build(self, input_shape: Any) -> None:
        _, num_fields, dim = input_shape
        # The last field is never the left one of a pair.
        shape = [num_fields - 1, dim, dim]
        self._kernel = self.add_weight(name="kernel", shape=shape, initializer=stacked_glorot(dim, dim))
        super().build(input_shape)

    def call(self, embeddings: tf.Tensor) -> tf.Tensor:
        projected = tf.einsum("bfd,fde->bfe", embeddings[:, :-1], self._kernel)
        return concat_fields(pair_products(projected, embeddings))


class FiBiNet(Backbone):
    """logits = first_order + w . mlp(concat(bilinear_1(embeddings), bilinear_2(senet(embeddings)))) + b.

    Source: Huang et al. (2019), "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for
    Click-Through Rate Prediction", section 3.

    Args:
      reduction_ratio: of the squeeze and excitation network, >= 1.
    """

    min_num_fields = 2

    def __init__(self, inputs: ModelInputs, *, reduction_ratio: int = 3, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        require_positive_integers(reduction_ratio=reduction_ratio)
        self._config["reduction_ratio"] = reduction_ratio
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim + 1)
        self._senet = Senet(reduction_ratio, name="senet")
        self._of_embeddings = BilinearInteraction(name="bilinear_of_embeddings")
        self._of_senet = BilinearInteraction(name="bilinear_of_senet")
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings, first_order = split_first_order(self._embeddings(features))
        pairs = tf.concat([self._of_embeddings(embeddings), self._of_senet(self._senet(embeddings))], axis=1)
        return first_order + tf.squeeze(self._logits(self._mlp(pairs, training=training)), axis=1)
