"""DCN-V2: explicit feature crosses beside an MLP."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from clsd_tf.backbones.base import Backbone, Features, concat_fields, logit_layer, mlp
from clsd_tf.embeddings import FieldEmbeddings
from clsd_tf.model_inputs import ModelInputs


class DcnV2(Backbone):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l; logits = w . concat(x_L, mlp(x_0)) + b, the parallel structure.

    The crosses are ``tfrs.layers.dcn.Cross`` with full matrices.
    Source: Wang et al. (2021), "DCN V2", sections 3.2 and 3.4.

    Args:
      num_cross_layers: number L of cross layers, >= 1.
    """

    def __init__(self, inputs: ModelInputs, *, num_cross_layers: int = 2, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        if num_cross_layers < 1:
            raise ValueError(f"num_cross_layers must be at least 1. Received: {num_cross_layers}")
        self._config["num_cross_layers"] = num_cross_layers
        self._embeddings = FieldEmbeddings(inputs, self._config["embedding_dim"])
        self._crosses = [tfrs.layers.dcn.Cross(name=f"cross_{index}") for index in range(num_cross_layers)]
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        flat = concat_fields(self._embeddings(features))
        crossed = flat
        for cross in self._crosses:
            crossed = cross(flat, crossed)
        joined = tf.concat([crossed, self._mlp(flat, training=training)], axis=1)
        return tf.squeeze(self._logits(joined), axis=1)
