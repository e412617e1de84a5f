"""The contract of a backbone and the parts that several share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.model_inputs import ModelInputs

Features = Mapping[str, tf.Tensor]


class Backbone(tf.keras.Model):
    """A feature dict -> logits, float32 [batch].

    A backbone reads the model inputs only: user-group ids, row ids and teacher scores may be in the dict, too.

    Args:
      inputs: what the transform gives.
      embedding_dim: size of each field's embedding.
      hidden_units: units of the hidden layers.
      dropout: rate after each hidden layer, in [0, 1).
    """

    def __init__(
        self,
        inputs: ModelInputs,
        *,
        embedding_dim: int = 10,
        hidden_units: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1). Received: {dropout}")
        self._config = {
            "inputs": inputs.to_dict(),
            "embedding_dim": embedding_dim,
            "hidden_units": list(hidden_units),
            "dropout": dropout,
        }

    def get_config(self) -> dict[str, Any]:
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Backbone:
        return cls(**{**config, "inputs": ModelInputs.from_dict(config["inputs"])})


def concat_fields(embeddings: tf.Tensor) -> tf.Tensor:
    """[batch, num_fields, embedding_dim] -> [batch, num_fields * embedding_dim]."""
    return tf.reshape(embeddings, [-1, embeddings.shape[1] * embeddings.shape[2]])


def mlp(hidden_units: Sequence[int], dropout: float, name: str = "mlp") -> tf.keras.Sequential:
    """ReLU layers, each followed by dropout."""
    layers: list[tf.keras.layers.Layer] = []
    for index, units in enumerate(hidden_units):
        layers.append(tf.keras.layers.Dense(units, activation="relu", name=f"hidden_{index}"))
        if dropout:
            layers.append(tf.keras.layers.Dropout(dropout))
    return tf.keras.Sequential(layers, name=name)


def logit_layer(name: str = "logits") -> tf.keras.layers.Dense:
    """One unit in float32, whatever the precision policy: the loss must not be computed in half precision."""
    return tf.keras.layers.Dense(1, dtype="float32", name=name)
