"""Model inputs -> field embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from clsd_tf.model_inputs import MISSING_ID, CategoricalInput, ModelInputs


class FieldEmbeddings(tf.keras.layers.Layer):
    """Embeds every field: e_c = table[id], mean over values where there are several, and e_n = x * v for numbers.

    Inputs that share a vocabulary share its table (a history and the feature it is made of). The embedding of the
    padding id does not enter a mean; a field without any value is the zero vector.

    Args:
      inputs: the model inputs.
      embedding_dim: size of each embedding, >= 1.

    Returns:
      ``call`` maps the feature dict to float32 [batch, num_fields, embedding_dim], fields in the order of ``inputs``.
    """

    def __init__(self, inputs: ModelInputs, embedding_dim: int, **kwargs: Any):
        super().__init__(**kwargs)
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1. Received: {embedding_dim}")
        self._inputs = inputs
        self._embedding_dim = embedding_dim
        self._tables = {
            entry.vocabulary: tf.keras.layers.Embedding(
                entry.vocabulary_size,
                embedding_dim,
                embeddings_initializer=tf.keras.initializers.RandomNormal(stddev=0.01),
                name=f"table_{entry.vocabulary}",
            )
            for entry in inputs.categorical
        }

    def build(self, input_shape: Any) -> None:
        if self._inputs.numeric:
            self._numeric_vectors = self.add_weight(
                name="numeric_vectors",
                shape=[len(self._inputs.numeric), self._embedding_dim],
                initializer=tf.keras.initializers.RandomNormal(stddev=0.01),
            )
        super().build(input_shape)

    def call(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        fields = [self._embed(entry, features[entry.name]) for entry in self._inputs.categorical]
        if self._inputs.numeric:
            numbers = tf.stack([features[name] for name in self._inputs.numeric], axis=1)
            # [batch, num_numeric, 1] * [num_numeric, embedding_dim]
            fields.append(numbers[:, :, tf.newaxis] * self._numeric_vectors)
        return tf.concat(fields, axis=1)

    def _embed(self, entry: CategoricalInput, ids: tf.Tensor) -> tf.Tensor:
        """Ids [batch] or [batch, max_values] -> [batch, 1, embedding_dim]."""
        table = self._tables[entry.vocabulary]
        if entry.max_values is None:
            return table(ids)[:, tf.newaxis, :]
        present = tf.cast(ids != MISSING_ID, self.compute_dtype)[:, :, tf.newaxis]
        total = tf.reduce_sum(table(ids) * present, axis=1, keepdims=True)
        return total / tf.maximum(tf.reduce_sum(present, axis=1, keepdims=True), 1.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inputs": self._inputs.to_dict(), "embedding_dim": self._embedding_dim}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FieldEmbeddings:
        return cls(**{**config, "inputs": ModelInputs.from_dict(config["inputs"])})
