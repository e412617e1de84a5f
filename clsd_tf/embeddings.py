"""Model inputs -> field embeddings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from clsd_tf.model_inputs import MISSING_ID, ModelInputs


class FieldEmbeddings(tf.keras.layers.Layer):
    """Embeds every field: e_c = table[id], mean over values where there are several, and e_n = x * v for numbers.

    The tables of all vocabularies are one variable, each from its own offset on, and a batch is one lookup: with 30
    fields, 30 lookups and as many sparse updates took most of a training step. Inputs that share a vocabulary share its
    rows (a history and the feature it is made of). Where several ids stand for one value, its embedding is their sum or
    product (``CategoricalInput.combiner``). The embedding of a padding value does not enter a mean; a field without any
    value is the zero vector.

    Args:
      inputs: the model inputs.
      embedding_dim: size of each embedding, >= 1.
      l2: penalty l2 * sum(table^2) over the whole table, added to the layer's losses; >= 0.

    Returns:
      ``call`` maps the feature dict to [batch, num_fields, embedding_dim] in the layer's compute dtype (float32 by
      default), fields in the order of ``inputs``.
    """

    def __init__(self, inputs: ModelInputs, embedding_dim: int, l2: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1. Received: {embedding_dim}")
        if l2 < 0:
            raise ValueError(f"l2 must be at least 0. Received: {l2}")
        self._inputs = inputs
        self._l2 = l2
        self._embedding_dim = embedding_dim
        sizes = {entry.vocabulary: entry.vocabulary_size for entry in inputs.categorical}
        offsets = itertools.accumulate(sizes.values(), initial=0)
        self._offsets = dict(zip(sizes, offsets, strict=False))
        self._num_rows = sum(sizes.values())
        self._input_of = {entry.vocabulary: entry for entry in inputs.categorical}  # Any: they combine ids alike.

    def build(self, input_shape: Any) -> None:
        if self._inputs.categorical:
            self._tables = self._add_vectors("tables", self._num_rows)
        if self._inputs.numeric:
            self._numeric_vectors = self._add_vectors("numeric_vectors", len(self._inputs.numeric))
        super().build(input_shape)

    def _add_vectors(self, name: str, count: int) -> tf.Variable:
        initializer = tf.keras.initializers.RandomNormal(stddev=0.01)  # One each: shared, it would repeat itself.
        penalty = tf.keras.regularizers.L2(self._l2) if self._l2 else None
        shape = [count, self._embedding_dim]
        return self.add_weight(name=name, shape=shape, initializer=initializer, regularizer=penalty)

    def call(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        fields = self._embed_ids(features) if self._inputs.categorical else []
        if self._inputs.numeric:
            numbers = tf.stack([features[name] for name in self._inputs.numeric], axis=1)
            # [batch, num_numeric, 1] * [num_numeric, embedding_dim]
            fields.append(numbers[:, :, tf.newaxis] * self._numeric_vectors)
        return tf.concat(fields, axis=1)

    def lookup(self, vocabulary: str, ids: tf.Tensor) -> tf.Tensor:
        """Embeddings of single values: ids [..., num_values * ids_per_value] -> [..., num_values, embedding_dim].

        With one id per value, ids of any shape -> [*ids.shape, embedding_dim].
        """
        embedded = tf.nn.embedding_lookup(self._tables, ids + self._offsets[vocabulary])
        return self._combined(embedded, vocabulary)

    def present(self, vocabulary: str, ids: tf.Tensor) -> tf.Tensor:
        """Which values are there: ids [..., num_values * ids_per_value] -> bool [..., num_values]."""
        return ids[..., :: self._input_of[vocabulary].ids_per_value] != MISSING_ID

    def _combined(self, embedded: tf.Tensor, vocabulary: str) -> tf.Tensor:
        """[..., num_values * ids_per_value, embedding_dim] -> [..., num_values, embedding_dim]."""
        count = self._input_of[vocabulary].ids_per_value
        if count == 1:
            return embedded
        first, *others = [embedded[..., index::count, :] for index in range(count)]
        if self._input_of[vocabulary].combiner == "sum":
            return tf.add_n([first, *others])
        # Rows start near 0: a product of several would hardly learn, so all but the first are measured from 1.
        return functools.reduce(lambda product, other: product * (1.0 + other), others, first)

    def _embed_ids(self, features: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """Embeddings of the categorical inputs, in their order: [batch, any number of fields, embedding_dim] each."""
        columns, starts = [], {}
        for entry in self._inputs.categorical:
            starts[entry.name] = sum(column.shape[1] for column in columns)
            ids = features[entry.name] + self._offsets[entry.vocabulary]
            columns.append(ids[:, tf.newaxis] if entry.num_ids is None else ids)
        embedded = tf.nn.embedding_lookup(self._tables, tf.concat(columns, axis=1))
        fields = []
        # Neighbours with single ids stay one slice: fewer pieces to put together again.
        for is_single, entries in itertools.groupby(self._inputs.categorical, lambda entry: entry.num_ids is None):
            entries = list(entries)
            start = starts[entries[0].name]
            if is_single:
                fields.append(embedded[:, start : start + len(entries)])
                continue
            for entry in entries:
                start = starts[entry.name]
                values = self._combined(embedded[:, start : start + entry.num_ids], entry.vocabulary)
                if entry.max_values is not None:
                    values = self._mean_of_present(values, self.present(entry.vocabulary, features[entry.name]))
                fields.append(values)
        return fields

    def _mean_of_present(self, values: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
        """Values [batch, max_values, embedding_dim] -> [batch, 1, embedding_dim]."""
        present = tf.cast(present, values.dtype)[:, :, tf.newaxis]
        total = tf.reduce_sum(values * present, axis=1, keepdims=True)
        return total / tf.maximum(tf.reduce_sum(present, axis=1, keepdims=True), 1.0)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "inputs": self._inputs.to_dict(),
            "embedding_dim": self._embedding_dim,
            "l2": self._l2,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FieldEmbeddings:
        return cls(**{**config, "inputs": ModelInputs.from_dict(config["inputs"])})
