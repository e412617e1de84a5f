"""AdGate: the local correction of click confidence."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from clsd_tf.backbones.base import mlp
from clsd_tf.layers.losses import weighted_mean
from clsd_tf.methods.clsd.config import AdGateConfig
from clsd_tf.spec.model_inputs import GroupInput, ModelInputs


class AdGate(tf.keras.layers.Layer):
    """correction = w . mlp(concat(embeddings of ids, numbers)) + b, a small MLP over user-profile features.

    The correction is added to the teacher score before weighting (arXiv 2309.16322, abstract: a local confidence
    function per user group). The output layer starts at 0, so that an untrained gate corrects nothing. With the
    ``literal`` objective the output is bound * tanh(...).

    Args:
      inputs: what the transform gives.
      config: which of the inputs it reads, and its sizes.

    Returns:
      ``call`` maps the feature dict to the correction, float32 [batch].

    Raises:
      ValueError: it would read an item feature, an unknown one, or none at all.
    """

    def __init__(
        self, inputs: ModelInputs, config: AdGateConfig | None = None, *, name: str = "ad_gate", **kwargs: Any
    ):
        super().__init__(name=name, dtype="float32", **kwargs)
        self.config = config or AdGateConfig()
        self._inputs = inputs
        self.features = _checked_features(inputs, self.config.features)
        sizes = {group.name: len(group.labels) for group in inputs.groups}
        sizes |= {entry.name: entry.vocabulary_size for entry in inputs.categorical if entry.max_values is None}
        self._numeric = [feature for feature in self.features if feature not in sizes]
        # One variable for all tables, each from its own offset on: every variable costs the optimizer a pass.
        ids = [feature for feature in self.features if feature in sizes]
        offsets = itertools.accumulate((sizes[feature] for feature in ids), initial=0)
        self._offsets = dict(zip(ids, offsets, strict=False))
        self._sizes = {feature: sizes[feature] for feature in ids}
        num_ids = sum(self._sizes.values())
        self._tables = tf.keras.layers.Embedding(num_ids, self.config.embedding_dim, name="tables") if ids else None
        self._mlp = mlp(self.config.hidden_units, dropout=0.0)
        self._output = tf.keras.layers.Dense(1, kernel_initializer="zeros", name="correction")

    @property
    def model_inputs(self) -> ModelInputs:
        """The inputs that it was made for."""
        return self._inputs

    @property
    def row_ranges(self) -> dict[str, range]:
        """Feature with ids -> its rows in the one variable of all tables."""
        return {name: range(start, start + self._sizes[name]) for name, start in self._offsets.items()}

    @property
    def groups(self) -> tuple[GroupInput, ...]:
        """The user groups among its features: what is watched."""
        return tuple(group for group in self._inputs.groups if group.name in self.features)

    def call(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        parts = [features[name][:, tf.newaxis] for name in self._numeric]
        if self._tables is not None:
            ids = tf.stack([features[name] + offset for name, offset in self._offsets.items()], axis=1)
            width = len(self._offsets) * self.config.embedding_dim
            parts.append(tf.reshape(self._tables(ids), [-1, width]))  # [batch, num_ids * embedding_dim]
        correction = tf.squeeze(self._output(self._mlp(tf.concat(parts, axis=1))), axis=1)
        if self.config.objective == "literal":
            return self.config.bound * tf.tanh(correction)
        return correction

    def loss(
        self,
        correction: tf.Tensor,
        teacher_score: tf.Tensor,
        bce: tf.Tensor,
        click_weight: tf.Tensor,
        total_click_weight: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Computes ``residual_loss`` or ``literal_loss``, as the config's objective says.

        Args:
          correction: this layer's output, [batch].
          teacher_score: [batch], in [0, 1].
          bce: cross-entropy of each row, [batch]; read by ``literal_loss`` alone.
          click_weight: labels * sample_weight, [batch].
          total_click_weight: as ``total_weight`` of ``weighted_mean``.

        Returns:
          Scalar; 0 in a batch without clicks.
        """
        if self.config.objective == "literal":
            return literal_loss(correction, teacher_score, bce, click_weight, total_click_weight)
        return residual_loss(correction, teacher_score, click_weight, total_click_weight)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inputs": self._inputs.to_dict(), "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AdGate:
        rest = {key: value for key, value in config.items() if key not in ("dtype", "inputs", "config")}
        settings = {**config["config"], "hidden_units": tuple(config["config"]["hidden_units"])}
        if settings["features"] is not None:
            settings["features"] = tuple(settings["features"])
        return cls(ModelInputs.from_dict(config["inputs"]), AdGateConfig(**settings), **rest)


def _checked_features(inputs: ModelInputs, features: tuple[str, ...] | None) -> tuple[str, ...]:
    groups = tuple(group.name for group in inputs.groups)
    allowed = (*groups, *inputs.user_features)
    wrong = [feature for feature in features or () if feature not in allowed]
    if wrong:
        raise ValueError(
            "AdGate reads user groups and single-valued features of the user table only: a correction by item would "
            f"undo the confidence it corrects. Received: {', '.join(wrong)}. Allowed: {', '.join(allowed) or 'none'}"
        )
    if not (features or groups):
        raise ValueError(
            "AdGate needs at least one user group. Received: none. Declare user_groups in the spec, or do without "
            "local confidence: method.mu=0 with method.lambda=1"
        )
    return features or groups


def residual_loss(
    correction: tf.Tensor,
    teacher_score: tf.Tensor,
    click_weight: tf.Tensor,
    total_click_weight: tf.Tensor | None = None,
) -> tf.Tensor:
    """mean over clicks of (1 - teacher_score - correction)^2; no gradient reaches the teacher.

    Its minimum is correction = 1 - E[teacher_score | click, features]: the typical confidence of the group, a convex
    problem of its own with nothing to drive to infinity.

    Args:
      correction: AdGate's output, [batch].
      teacher_score: [batch], in [0, 1].
      click_weight: labels * sample_weight, [batch].
      total_click_weight: as ``total_weight`` of ``weighted_mean``.

    Returns:
      Scalar; 0 in a batch without clicks.
    """
    error = tf.square(1.0 - tf.stop_gradient(teacher_score) - correction)
    return weighted_mean(error, click_weight, total_click_weight)


def literal_loss(
    correction: tf.Tensor,
    teacher_score: tf.Tensor,
    bce: tf.Tensor,
    click_weight: tf.Tensor,
    total_click_weight: tf.Tensor | None = None,
) -> tf.Tensor:
    """mean over clicks of (teacher_score + correction) * bce: what the gate would see of the loss that it weights.

    Its gradient on every correction is positive, so nothing but a bound stops it.

    Args:
      correction: AdGate's output, [batch].
      teacher_score: [batch], in [0, 1].
      bce: cross-entropy of each row, [batch].
      click_weight: labels * sample_weight, [batch].
      total_click_weight: as ``total_weight`` of ``weighted_mean``.

    Returns:
      Scalar; 0 in a batch without clicks.
    """
    weighted = (tf.stop_gradient(teacher_score) + correction) * tf.stop_gradient(bce)
    return weighted_mean(weighted, click_weight, total_click_weight)
