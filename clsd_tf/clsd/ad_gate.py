"""AdGate: the local correction of click confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import mlp
from clsd_tf.model_inputs import GroupInput


class AdGate(tf.keras.layers.Layer):
    """correction = w . mlp(concat(group embeddings)) + b, a small MLP over user-group features.

    The correction is added to the teacher score before weighting (arXiv 2309.16322, abstract: a local confidence
    function per user group). It is trained by ``ad_gate_loss`` alone: trained by the loss it weights, it would run to
    minus infinity. The output layer starts at 0, so that an untrained gate corrects nothing.

    Args:
      groups: the user groups it reads; at least one. Item features do not belong here.
      embedding_dim: size of each group's embedding.
      hidden_units: units of the hidden layers.

    Returns:
      ``call`` maps the feature dict to the correction, float32 [batch].
    """

    def __init__(
        self,
        groups: Sequence[GroupInput],
        *,
        embedding_dim: int = 8,
        hidden_units: Sequence[int] = (16,),
        name: str = "ad_gate",
        **kwargs: Any,
    ):
        super().__init__(name=name, dtype="float32", **kwargs)
        if not groups:
            raise ValueError("AdGate needs at least one user group. Received: none. Declare user_groups in the spec")
        self.groups = tuple(groups)
        self._settings = {"embedding_dim": embedding_dim, "hidden_units": list(hidden_units)}
        self._tables = [
            tf.keras.layers.Embedding(len(group.labels), embedding_dim, name=f"group_{group.name}") for group in groups
        ]
        self._mlp = mlp(hidden_units, dropout=0.0)
        self._output = tf.keras.layers.Dense(1, kernel_initializer="zeros", name="correction")

    def call(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        embedded = [table(features[group.name]) for group, table in zip(self.groups, self._tables, strict=True)]
        return tf.squeeze(self._output(self._mlp(tf.concat(embedded, axis=1))), axis=1)

    def get_config(self) -> dict[str, Any]:
        groups = [{"name": group.name, "labels": list(group.labels)} for group in self.groups]
        return {**super().get_config(), "groups": groups, **self._settings}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AdGate:
        groups = [GroupInput(group["name"], tuple(group["labels"])) for group in config["groups"]]
        return cls(**{**{key: value for key, value in config.items() if key != "dtype"}, "groups": groups})


def ad_gate_loss(correction: tf.Tensor, teacher_score: tf.Tensor, click_weight: tf.Tensor) -> tf.Tensor:
    """mean over clicks of (1 - teacher_score - correction)^2; no gradient reaches the teacher.

    Its minimum is correction = 1 - E[teacher_score | click, group]: the typical confidence of the group, a convex
    problem of its own with nothing to drive to infinity.

    Args:
      correction: AdGate's output, [batch].
      teacher_score: [batch], in [0, 1].
      click_weight: labels * sample_weight, [batch].

    Returns:
      Scalar; 0 in a batch without clicks.
    """
    error = tf.square(1.0 - tf.stop_gradient(teacher_score) - correction)
    return tf.math.divide_no_nan(tf.reduce_sum(click_weight * error), tf.reduce_sum(click_weight))
