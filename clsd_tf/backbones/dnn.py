"""DNN: an MLP over the concatenated field embeddings."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, concat_fields, logit_layer, mlp
from clsd_tf.spec.model_inputs import ModelInputs


class Dnn(Backbone):
    """logits = w . mlp(concat(field embeddings)) + b.

    Source: the deep part of Covington et al. (2016), "Deep Neural Networks for YouTube Recommendations", section 4.
    """

    def __init__(self, inputs: ModelInputs, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim)
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        flat = concat_fields(self._embeddings(features))
        return tf.squeeze(self._logits(self._mlp(flat, training=training)), axis=1)
