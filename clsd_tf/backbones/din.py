"""DIN: a user's history, weighed by its relation to the item in question."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import tensorflow as tf

from clsd_tf.backbones.base import (
    Backbone,
    Features,
    concat_fields,
    logit_layer,
    mlp,
    require_choice,
    require_unit_sizes,
)
from clsd_tf.spec.model_inputs import ModelInputs


class TargetAttention(tf.keras.layers.Layer):
    """sum_t a_t * history_t with a_t = w . mlp(concat(history_t, target, history_t * target)) + b, 0 for padding.

    The weights are not normalized: their sum says how strong the interest is (the paper's section 4.3). The
    difference history_t - target, which the authors' code also feeds to the MLP, is a linear function of the others.

    Args:
      units: hidden layers of the attention network.

    Returns:
      ``call`` maps history [batch, length, dim], target [batch, dim] and present [batch, length] (1 for a value,
      0 for padding) to [batch, dim].
    """

    def __init__(self, units: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        self._mlp = mlp(units, dropout=0.0)
        self._weight = tf.keras.layers.Dense(1, name="weight")

    def call(self, history: tf.Tensor, target: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
        # [batch, length, dim]
        targets = tf.tile(target[:, tf.newaxis, :], [1, history.shape[1], 1])
        hidden = self._mlp(tf.concat([history, targets, history * targets], axis=2))
        weights = tf.squeeze(self._weight(hidden), axis=2) * present
        return tf.einsum("bt,btd->bd", weights, history)


class Dice(tf.keras.layers.Layer):
    """p * x + (1 - p) * alpha * x with p = sigmoid((x - mean) / std), per unit; alpha is learned and starts at 0.

    Mean and std are those of the batch in training, and their moving averages afterwards.
    Source: Zhou et al. (2018), section 5.2.
    """

    def build(self, input_shape: Any) -> None:
        # With Keras' momentum of 0.99, a short training would serve averages that still remember where they started.
        self._standardise = tf.keras.layers.BatchNormalization(momentum=0.9, center=False, scale=False, epsilon=1e-8)
        self._alpha = self.add_weight(name="alpha", shape=[input_shape[-1]], initializer="zeros")
        super().build(input_shape)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        p = tf.sigmoid(self._standardise(x, training=training))
        return x * (p + (1.0 - p) * self._alpha)


def _dice_mlp(hidden_units: Sequence[int], dropout: float) -> tf.keras.Sequential:
    """As ``mlp``, with Dice in the place of ReLU."""
    layers: list[tf.keras.layers.Layer] = []
    for index, units in enumerate(hidden_units):
        layers += [tf.keras.layers.Dense(units, name=f"hidden_{index}"), Dice(name=f"dice_{index}")]
        if dropout:
            layers.append(tf.keras.layers.Dropout(dropout))
    return tf.keras.Sequential(layers, name="mlp")


class Din(Backbone):
    """logits = w . mlp(concat(embeddings of the other fields, target attention over each history)) + b.

    A history is an input with several values of a single-valued input, its target (``CategoricalInput.history_of``).
    Other inputs with several values are averaged, as everywhere.

    Source: Zhou et al. (2018), "Deep Interest Network for Click-Through Rate Prediction", sections 4.3 and 5.2.

    Args:
      attention_units: hidden layers of each history's attention network.
      activation: of the MLP's hidden layers, "relu" or "dice". The attention network always uses ReLU, since padding
        would enter the batch statistics of Dice.

    Raises:
      ValueError: no input is a history.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        *,
        attention_units: Sequence[int] = (32,),
        activation: Literal["relu", "dice"] = "relu",
        **kwargs: Any,
    ):
        super().__init__(inputs, **kwargs)
        require_unit_sizes("attention_units", attention_units)
        require_choice("activation", activation, ("relu", "dice"))
        self._config.update(attention_units=list(attention_units), activation=activation)
        self._target_of = _history_targets(inputs)
        self._vocabulary_of = {entry.name: entry.vocabulary for entry in inputs.categorical}
        others = tuple(entry for entry in inputs.categorical if entry.name not in self._target_of)
        self._position = {entry.name: index for index, entry in enumerate(others)}
        self._embeddings = self.field_embeddings(dataclasses.replace(inputs, categorical=others), self.embeddings.dim)
        self._attentions = {
            name: TargetAttention(attention_units, name=f"attention_{name}") for name in self._target_of
        }
        make_mlp = mlp if activation == "relu" else _dice_mlp
        self._mlp = make_mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        fields = self._embeddings(features)
        pooled = [self._pool(name, features[name], fields) for name in self._target_of]
        flat = tf.concat([concat_fields(fields), *pooled], axis=1)
        return tf.squeeze(self._logits(self._mlp(flat, training=training)), axis=1)

    def _pool(self, name: str, ids: tf.Tensor, fields: tf.Tensor) -> tf.Tensor:
        """Ids of a history, [batch, num_ids] -> [batch, embedding_dim]."""
        vocabulary, target = self._vocabulary_of[name], self._target_of[name]
        history = self._embeddings.lookup(vocabulary, ids)
        present = tf.cast(self._embeddings.present(vocabulary, ids), history.dtype)
        return self._attentions[name](history, fields[:, self._position[target]], present)


def _history_targets(inputs: ModelInputs) -> dict[str, str]:
    """Name of each history -> name of its target; raises ValueError where there is none."""
    targets = {entry.name: entry.history_of for entry in inputs.categorical if entry.history_of is not None}
    if not targets:
        received = ", ".join(entry.name for entry in inputs.categorical) or "none"
        raise ValueError(
            "Din needs a history: an input with several values of a single-valued input. "
            f"Received categorical inputs: {received}. Declare a feature of type history, or take another backbone"
        )
    return targets
