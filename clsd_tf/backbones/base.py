"""The contract of a backbone and the parts that several share."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.layers.embeddings import FieldEmbeddings, SharedRows
from clsd_tf.spec.model_inputs import ModelInputs

Features = Mapping[str, tf.Tensor | SharedRows]


class Backbone(tf.keras.Model):
    """A feature dict -> logits, float32 [batch].

    A backbone reads the model inputs only: user-group ids, row ids and teacher scores may be in the dict, too. Where
    one user's features serve many items, they are ``SharedRows``, which ``FieldEmbeddings`` takes as they are;
    ``embeddings.per_row`` is for backbones that read features themselves.

    Args:
      inputs: what the transform gives.
      embeddings: of each field; the penalty on the tables' squares is part of ``losses``.
      hidden_units: units of the hidden layers; empty for none.
      dropout: rate after each hidden layer, in [0, 1).

    Raises:
      ValueError: an argument out of range, or fewer inputs than the model's formula needs.
    """

    min_num_fields: ClassVar[int] = 1

    def __init__(
        self,
        inputs: ModelInputs,
        *,
        embeddings: EmbeddingConfig = EmbeddingConfig(),  # noqa: B008 - it is frozen.
        hidden_units: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        require_unit_sizes("hidden_units", hidden_units)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1). Received: {dropout}")
        if inputs.num_fields < self.min_num_fields:
            raise ValueError(
                f"{type(self).__name__} needs {self.min_num_fields} or more inputs. "
                f"Received: {', '.join(field_names(inputs)) or 'none'}. Declare more features or take another backbone"
            )
        self.embeddings = embeddings
        self._config: dict[str, Any] = {
            "inputs": inputs.to_dict(),
            "embeddings": embeddings.model_dump(),
            "hidden_units": list(hidden_units),
            "dropout": dropout,
        }

    @property
    def model_inputs(self) -> ModelInputs:
        """The inputs that it was made for."""
        return ModelInputs.from_dict(self._config["inputs"])

    def field_embeddings(self, inputs: ModelInputs, num_columns: int) -> FieldEmbeddings:
        """Creates the layer that embeds ``inputs``, by this backbone's settings.

        Args:
          inputs: all model inputs, or some of them.
          num_columns: numbers in each embedding; ``split_first_order`` takes one more than ``embeddings.dim``.

        Returns:
          A layer that is not built yet.
        """
        return FieldEmbeddings(inputs, self.embeddings.model_copy(update={"dim": num_columns}))

    def get_config(self) -> dict[str, Any]:
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Backbone:
        return cls(
            **{
                **config,
                "inputs": ModelInputs.from_dict(config["inputs"]),
                "embeddings": EmbeddingConfig(**config["embeddings"]),
            }
        )

    @classmethod
    def argument_names(cls) -> set[str]:
        """Returns the names of the keyword arguments, those of the parent classes included."""
        initializers = [vars(parent).get("__init__") for parent in cls.__mro__ if issubclass(parent, Backbone)]
        return {
            parameter.name
            for initializer in initializers
            if initializer
            for parameter in inspect.signature(initializer).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }


def require_positive_integers(**arguments: Any) -> None:
    """Checks that each of ``arguments`` is a whole number of at least 1; raises ValueError otherwise."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1. Received: {value!r}")


def require_unit_sizes(name: str, sizes: Any, *, min_layers: int = 0) -> None:
    """Checks a sequence of layer sizes.

    Args:
      name: for the message.
      sizes: units of each layer.
      min_layers: how many there must be.

    Raises:
      ValueError: too few layers, or a size that is no whole number of at least 1.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or len(sizes) < min_layers:
        raise ValueError(f"{name} must be a list of {min_layers} or more layer sizes. Received: {sizes!r}")
    require_positive_integers(**{f"{name}[{index}]": units for index, units in enumerate(sizes)})


def require_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Checks an argument that has a closed set of names.

    Args:
      name: for the message.
      value: the argument.
      allowed: its names.

    Raises:
      ValueError: ``value`` is none of them.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}. Received: {value!r}")


def field_names(inputs: ModelInputs) -> list[str]:
    """Returns the names of ``inputs`` in the order in which ``FieldEmbeddings`` gives their embeddings."""
    return [*(entry.name for entry in inputs.categorical), *inputs.numeric]


def feature_inputs(inputs: ModelInputs) -> dict[str, tf.Tensor]:
    """Creates the inputs of a functional Keras model.

    Args:
      inputs: the model inputs.

    Returns:
      Name -> ``tf.keras.Input``: int64 [batch] or [batch, num_ids], float32 [batch].
    """
    ids = {
        entry.name: tf.keras.Input([] if entry.num_ids is None else [entry.num_ids], dtype=tf.int64)
        for entry in inputs.categorical
    }
    return ids | {name: tf.keras.Input([], dtype=tf.float32) for name in inputs.numeric}


def example_features(inputs: ModelInputs) -> dict[str, tf.Tensor]:
    """Makes one row of zeros, user groups included: a model that has seen it has all its variables.

    Args:
      inputs: what the transform gives.

    Returns:
      Tensors by name, shaped as in a batch of 1.
    """
    features = {
        entry.name: tf.zeros([1] if entry.num_ids is None else [1, entry.num_ids], tf.int64)
        for entry in inputs.categorical
    }
    features |= {name: tf.zeros([1]) for name in inputs.numeric}
    return features | {group.name: tf.zeros([1], tf.int64) for group in inputs.groups}


def declared_features(backbone: tf.keras.Model, features: Features) -> Features:
    """Selects the features that a backbone takes: of a functional model its inputs, since Keras warns of others.

    Args:
      backbone: any Keras model from a feature dict to logits.
      features: all that a batch has, user groups, row ids and teacher scores included.

    Returns:
      A part of ``features``; for a subclassed model all of them.
    """
    if not backbone.inputs or not isinstance(features, Mapping):  # Of a subclassed model, only its code tells.
        return features
    declared = backbone.input
    names = declared if isinstance(declared, Mapping) else backbone.input_names
    return {name: features[name] for name in names if name in features}


def concat_fields(embeddings: tf.Tensor) -> tf.Tensor:
    """Returns ``embeddings`` [batch, num_fields, embedding_dim] as [batch, num_fields * embedding_dim]."""
    return tf.reshape(embeddings, [-1, embeddings.shape[1] * embeddings.shape[2]])


def split_first_order(looked_up: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Takes embeddings apart whose last column is the first-order weight: one lookup serves both.

    Args:
      looked_up: [batch, num_fields, embedding_dim + 1].

    Returns:
      Embeddings [batch, num_fields, embedding_dim]; first-order term, float32 [batch].
    """
    # Not slices: the gradient of two slices is two padded copies and their sum, that of a split one concatenation.
    embeddings, first_order = tf.split(looked_up, [looked_up.shape[2] - 1, 1], axis=2)
    return embeddings, tf.reduce_sum(tf.cast(first_order, tf.float32), axis=[1, 2])


def pair_products(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """left_i * right_j, element-wise, for all pairs of fields i < j.

    Args:
      left: [batch, num_fields, dim]; its last field is in no pair and may be missing.
      right: [batch, num_fields, dim].

    Returns:
      [batch, num_fields * (num_fields - 1) / 2, dim].
    """
    i, j = np.triu_indices(right.shape[1], 1)
    return tf.gather(left, i, axis=1) * tf.gather(right, j, axis=1)


def mlp(hidden_units: Sequence[int], dropout: float, name: str = "mlp") -> tf.keras.Sequential:
    """Creates ReLU layers, each followed by dropout.

    Args:
      hidden_units: of the layers, in their order.
      dropout: rate, in [0, 1).
      name: of the model.

    Returns:
      A model that maps [..., any] to [..., hidden_units[-1]]; the identity where there are no layers.
    """
    layers: list[tf.keras.layers.Layer] = []
    for index, units in enumerate(hidden_units):
        layers.append(tf.keras.layers.Dense(units, activation="relu", name=f"hidden_{index}"))
        if dropout:
            layers.append(tf.keras.layers.Dropout(dropout))
    return tf.keras.Sequential(layers, name=name)


def stacked_glorot(num_rows: int, num_columns: int) -> tf.keras.initializers.Initializer:
    """Creates Glorot's uniform initializer for a stack of matrices, [..., num_rows, num_columns].

    Keras' own would take the leading dimensions for a receptive field and make the weights too small.

    Args:
      num_rows: of each matrix.
      num_columns: of each matrix.

    Returns:
      Uniform in [-limit, limit], limit = sqrt(6 / (num_rows + num_columns)).
    """
    limit = math.sqrt(6 / (num_rows + num_columns))
    return tf.keras.initializers.RandomUniform(-limit, limit)


def logit_layer(name: str = "logits") -> tf.keras.layers.Dense:
    """Creates a layer of one unit in float32, whatever the precision policy: a loss needs more than half precision.

    Args:
      name: of the layer.

    Returns:
      A layer that maps [batch, any] to [batch, 1].
    """
    return tf.keras.layers.Dense(1, dtype="float32", name=name)


class LogitBias(tf.keras.layers.Layer):
    """logits + bias in float32, for models whose logits are a plain sum; ``call`` takes and gives [batch]."""

    def __init__(self, name: str = "logit_bias"):
        super().__init__(name=name, dtype="float32")

    def build(self, input_shape: Any) -> None:
        self._bias = self.add_weight(name="bias", shape=[], initializer="zeros")
        super().build(input_shape)

    def call(self, logits: tf.Tensor) -> tf.Tensor:
        return logits + self._bias
