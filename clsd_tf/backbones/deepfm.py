"""DeepFM: first-order weights, factorization machine and MLP over shared embeddings."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, concat_fields, logit_layer, mlp, split_first_order
from clsd_tf.backbones.fm import pairwise_interactions
from clsd_tf.spec.model_inputs import ModelInputs


class DeepFm(Backbone):
    """logits = first_order + pairwise_interactions(embeddings) + w . mlp(concat(embeddings)) + b.

    Source: Guo et al. (2017), "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", section 2.
    """

    def __init__(self, inputs: ModelInputs, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim + 1)
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings, first_order = split_first_order(self._embeddings(features))
        deep = tf.squeeze(self._logits(self._mlp(concat_fields(embeddings), training=training)), axis=1)
        return first_order + tf.cast(pairwise_interactions(embeddings), tf.float32) + deep
