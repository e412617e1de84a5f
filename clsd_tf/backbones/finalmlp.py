"""FinalMLP: two MLPs over differently gated embeddings, fused by a multi-head bilinear form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import (
    Backbone,
    Features,
    concat_fields,
    field_names,
    logit_layer,
    mlp,
    require_positive_integers,
    require_unit_sizes,
    stacked_glorot,
)
from clsd_tf.spec.model_inputs import ModelInputs


class FeatureGate(tf.keras.layers.Layer):
    """flat * 2 sigmoid(W_2 relu(W_1 context + b_1) + b_2): weights around 1 for every number in the embeddings.

    Args:
      context_fields: positions of the fields whose embeddings are the context.
      units: size of the hidden layer.

    Returns:
      ``call`` maps [batch, num_fields, embedding_dim] to [batch, num_fields * embedding_dim].
    """

    def __init__(self, context_fields: Sequence[int], units: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._context_fields = list(context_fields)
        self._hidden = tf.keras.layers.Dense(units, activation="relu", name="hidden")

    def build(self, input_shape: Any) -> None:
        _, num_fields, dim = input_shape
        self._gate = tf.keras.layers.Dense(num_fields * dim, activation="sigmoid", name="gate")
        super().build(input_shape)

    def call(self, embeddings: tf.Tensor) -> tf.Tensor:
        context = concat_fields(tf.gather(embeddings, self._context_fields, axis=1))
        return concat_fields(embeddings) * 2.0 * self._gate(self._hidden(context))


class BilinearFusion(tf.keras.layers.Layer):
    """w_1 . first + w_2 . second + b + sum over heads h of first_h^T W_h second_h.

    Args:
      num_heads: parts into which the streams are cut; 1 is the full bilinear form.

    Returns:
      ``call`` maps two tensors [batch, units] to logits, float32 [batch].
    """

    def __init__(self, num_heads: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._num_heads = num_heads
        self._linear = logit_layer("linear")

    def build(self, input_shape: Any) -> None:
        self._head_dim = input_shape[-1] // self._num_heads
        shape = [self._num_heads, self._head_dim, self._head_dim]
        initializer = stacked_glorot(self._head_dim, self._head_dim)
        self._kernel = self.add_weight(name="kernel", shape=shape, initializer=initializer)
        super().build(input_shape)

    def call(self, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        # [batch, num_heads, head_dim]
        first_heads, second_heads = (
            tf.reshape(stream, [-1, self._num_heads, self._head_dim]) for stream in (first, second)
        )
        bilinear = tf.einsum("bhi,hij->bhj", first_heads, self._kernel) * second_heads
        linear = tf.squeeze(self._linear(tf.concat([first, second], axis=1)), axis=1)
        return linear + tf.reduce_sum(tf.cast(bilinear, tf.float32), axis=[1, 2])


class FinalMlp(Backbone):
    """logits = bilinear_fusion(mlp_1(gate_1(embeddings)), mlp_2(gate_2(embeddings))).

    Gate 1 is conditioned on the user's features (``inputs.user_features``), gate 2 on all others, so that the two
    streams see different things. Where one of these sets is empty, both gates are conditioned on every field.

    Source: Mao et al. (2023), "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction", sections
    "Stream-Specific Feature Selection" and "Stream-Level Interaction Aggregation".

    Args:
      num_heads: heads of the bilinear fusion, >= 1; must divide the last entry of hidden_units.
      gate_units: size of each gate's hidden layer, >= 1.
    """

    def __init__(self, inputs: ModelInputs, *, num_heads: int = 2, gate_units: int = 64, **kwargs: Any):
        super().__init__(inputs, **kwargs)
        hidden_units, dropout = list(self._config["hidden_units"]), self._config["dropout"]
        require_unit_sizes("hidden_units", hidden_units, min_layers=1)
        require_positive_integers(num_heads=num_heads, gate_units=gate_units)
        if hidden_units[-1] % num_heads:
            raise ValueError(
                "num_heads must divide the last entry of hidden_units. "
                f"Received: num_heads={num_heads}, hidden_units={hidden_units}. num_heads=1 always does"
            )
        self._config.update(num_heads=num_heads, gate_units=gate_units)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim)
        contexts = _gate_contexts(inputs)
        self._gates = [FeatureGate(context, gate_units, name=f"gate_{i}") for i, context in enumerate(contexts)]
        self._streams = [mlp(hidden_units, dropout, name=f"mlp_{i}") for i in range(2)]
        self._fusion = BilinearFusion(num_heads, name="fusion")

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings = self._embeddings(features)
        first, second = (
            stream(gate(embeddings), training=training) for gate, stream in zip(self._gates, self._streams, strict=True)
        )
        return self._fusion(first, second)


def _gate_contexts(inputs: ModelInputs) -> tuple[list[int], list[int]]:
    """Positions of the fields that condition each gate: the user's, and all others."""
    positions = {name: index for index, name in enumerate(field_names(inputs))}
    of_user = [index for name, index in positions.items() if name in inputs.user_features]
    others = [index for name, index in positions.items() if name not in inputs.user_features]
    return (of_user, others) if of_user and others else (list(positions.values()), list(positions.values()))
