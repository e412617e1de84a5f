"""Wide & Deep: first-order weights beside an MLP."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import Backbone, Features, concat_fields, logit_layer, mlp, split_first_order
from clsd_tf.spec.model_inputs import ModelInputs


class WideDeep(Backbone):
    """logits = first_order + w . mlp(concat(embeddings)) + b.

    The wide part reads every field; a crossed feature is an input like any other. Both parts are trained jointly, by
    one optimizer.

    Source: Cheng et al. (2016), "Wide & Deep Learning for Recommender Systems", section 3.
    """

    def __init__(self, inputs: ModelInputs, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim + 1)
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings, wide = split_first_order(self._embeddings(features))
        deep = self._logits(self._mlp(concat_fields(embeddings), training=training))
        return wide + tf.squeeze(deep, axis=1)
