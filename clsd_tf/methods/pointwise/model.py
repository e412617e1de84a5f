"""A backbone trained row by row: what methods of rows share, and the whole of ``bce``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from clsd_tf.backbones.base import Features, declared_features, example_features
from clsd_tf.distributed.replicas import num_replicas, sum_over_replicas
from clsd_tf.layers.losses import bce_from_logits, loss_function, weighted_mean
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.methods.monitors import WeightedMeans
from clsd_tf.methods.pointwise.config import BceConfig, PointwiseConfig

LossFunction = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
_WATCHED = ("loss", "bce", "mean_ctr")


class Batch(NamedTuple):
    """A training step's rows.

    Attributes:
      features: name -> [batch, ...].
      labels, sample_weight, logits, bce: float32 [batch]; logits are those of the step's forward pass.
      step: of the optimizer, before this batch; integer scalar.
    """

    features: Features
    labels: tf.Tensor
    sample_weight: tf.Tensor
    logits: tf.Tensor
    bce: tf.Tensor
    step: tf.Tensor


class Weighed(NamedTuple):
    """The weights of the rows of a batch.

    Attributes:
      loss_weight: factor of each row's loss, [batch], without gradient.
      total_weight: sum of sample_weight over the global batch, scalar.
      found: what a method wants to watch of how it came by the weights.
    """

    loss_weight: tf.Tensor
    total_weight: tf.Tensor
    found: Any = None


class PointwiseModel(MethodModel):
    """A CTR model of rows:

      loss = weighted_mean(loss_weight * loss_function(labels, logits), sample_weight)

    with a loss_weight of 1. A method that weights rows overrides ``loss_weights``; one that must know more of the batch
    on the way, ``weigh``.

    Under a synchronous ``tf.distribute`` strategy each replica has a part of the batch, and every mean is one over the
    global batch: the gradients that the replicas add up are those of one replica with all rows. Batch normalization
    within a backbone (``din``) stays that of the replica's rows.

    Args:
      backbone: any ``tf.keras.Model`` from a feature dict to logits, float32 [batch] or [batch, 1].
      config: which loss.
      loss_function: (labels, logits) -> loss of each row, [batch], instead of the config's.

    Returns:
      ``call`` maps the feature dict to ctr, float32 [batch]: calibrated once ``calibration`` is set, a layer from
      (logits, features) to ctr.
    """

    config: PointwiseConfig
    built: bool

    def __init__(
        self,
        backbone: tf.keras.Model,
        config: PointwiseConfig | None = None,
        *,
        loss_function: LossFunction | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.config = config or BceConfig()
        self._calibration: tf.keras.layers.Layer | None = None
        self._loss_function = loss_function or _loss_of(self.config)
        self._means = WeightedMeans(self.watched)

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the means that every training step reports, those of all methods first."""
        return _WATCHED

    @property
    def calibration(self) -> tf.keras.layers.Layer | None:
        """From (logits, features) to calibrated ctr; None as long as there is none."""
        return self._calibration

    @calibration.setter
    def calibration(self, layer: tf.keras.layers.Layer | None) -> None:
        self._calibration = layer
        self.predict_function = None  # Keras would go on with the function that it traced before.

    @property
    def parts(self) -> dict[str, tf.Module]:
        return {"backbone": self.backbone}

    @property
    def training_state(self) -> dict[str, Sequence[tf.Variable]]:
        return {"backbone": list(self.backbone.variables), "optimizer": list(self.optimizer.variables)}

    def compile(self, optimizer: Any = "adam", *, metrics: Any = None, **kwargs: Any) -> None:
        """As ``tf.keras.Model.compile``; the loss is the model's own.

        Args:
          optimizer: trains the backbone.
          metrics: Keras metrics on (labels, ctr).

        Raises:
          ValueError: a loss was given.
        """
        if kwargs.get("loss") is not None:
            raise ValueError(
                f"{type(self).__name__} brings its own loss. Received: loss={kwargs['loss']!r}. Leave it out; "
                "loss_function of the model replaces it"
            )
        super().compile(optimizer=optimizer, metrics=metrics, **kwargs)

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        logits = self.logits(features, training=training)
        return tf.sigmoid(logits) if self.calibration is None else self.calibration(logits, features)

    def logits(self, features: Features, training: bool = False) -> tf.Tensor:
        """Runs the backbone.

        Args:
          features: name -> [batch, ...].
          training: whether Dropout and the like are on.

        Returns:
          float32 [batch]; a backbone may also give [batch, 1].

        Raises:
          ValueError: any other shape.
        """
        return as_logits(self.backbone(declared_features(self.backbone, features), training=training))

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """As ``tf.keras.Model.summary``; a model that has seen no rows is built first, where its inputs are known.

        Args:
          args: as there.
          kwargs: as there.
        """
        if not self.built:
            known = [part.model_inputs for part in self.parts.values() if hasattr(part, "model_inputs")]
            if known:
                self.debug_outputs(example_features(known[0]))
            self.built = self.backbone.built
        super().summary(*args, **kwargs)

    def debug_outputs(self, features: Features) -> dict[str, tf.Tensor]:
        """Computes what the signature ``debug`` tells of each row beside ``ctr``.

        Args:
          features: name -> [batch, ...].

        Returns:
          Name -> float32 [batch]: the ``logit``.
        """
        return {"logit": self.logits(features)}

    def loss_weights(self, batch: Batch) -> tf.Tensor:
        """Weights the rows of a ``batch``; for methods to override.

        Returns:
          Factor of each row's loss, [batch], without gradient.
        """
        return tf.ones_like(batch.labels)

    def weigh(self, batch: Batch) -> Weighed:
        """Calls ``loss_weights`` on a ``batch``; nothing here is for the backbone's gradient.

        Returns:
          The weights with the batch's total weight.
        """
        return Weighed(self.loss_weights(batch), sum_over_replicas(tf.reduce_sum(batch.sample_weight)))

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        features, labels, sample_weight = unpack(data)
        step = tf.identity(self.optimizer.iterations)  # Of this step: applying gradients moves the variable on.
        with tf.GradientTape() as tape:
            logits = self.logits(features, training=True)
            losses = self._loss_function(labels, logits)
            with tape.stop_recording():
                batch = Batch(features, labels, sample_weight, logits, bce_from_logits(labels, logits), step)
                weighed = self.weigh(batch)
            loss = weighted_mean(weighed.loss_weight * losses, sample_weight, weighed.total_weight) + self._penalty()
        variables = self.backbone.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self.after_update(batch)
        self.watch(self.requests.exchanged_with(self.shares(batch, weighed, loss)), batch, weighed)
        return self._updated_metrics(labels, logits, sample_weight)

    def _penalty(self) -> tf.Tensor:
        """This replica's share of the backbone's own losses, which do not depend on the batch."""
        penalty = tf.add_n([0.0, *self.backbone.losses])
        return penalty if num_replicas() == 1 else penalty / num_replicas()

    def after_update(self, batch: Batch) -> None:
        """Does what follows the optimizer's update of the backbone on a ``batch``."""

    def shares(self, batch: Batch, weighed: Weighed, loss: tf.Tensor) -> dict[str, Any]:
        """Computes this replica's part of what is watched.

        Args:
          batch: this replica's.
          weighed: of it.
          loss: this replica's share, scalar.

        Returns:
          Name -> tensor, or tensors, that add up over replicas to the values of the global batch.
        """
        of_rows = {"bce": batch.bce, "mean_ctr": tf.sigmoid(batch.logits)}
        means = {
            name: weighted_mean(values, batch.sample_weight, weighed.total_weight) for name, values in of_rows.items()
        }
        return {"loss": loss, **means}

    def watch(self, seen: Mapping[str, Any], batch: Batch, weighed: Weighed) -> None:
        """Takes note of a step.

        Args:
          seen: ``shares``, summed over replicas.
          batch: this replica's.
          weighed: of it.
        """
        self._means.update_state([seen[name] for name in self.watched], [weighed.total_weight] * len(self.watched))

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Evaluates with plain BCE: the loss of different weights would not be comparable."""
        features, labels, sample_weight = unpack(data)
        logits = self.logits(features)
        bce, ctr = bce_from_logits(labels, logits), tf.sigmoid(logits)
        sums = sample_weight * bce, sample_weight * ctr, sample_weight
        sum_of_bce, sum_of_ctr, rows = sum_over_replicas([tf.reduce_sum(values) for values in sums])
        mean_bce, mean_ctr = (tf.math.divide_no_nan(values, rows) for values in (sum_of_bce, sum_of_ctr))
        idle = [0.0] * (len(self.watched) - len(_WATCHED))
        self._means.update_state([mean_bce, mean_bce, mean_ctr, *idle], [rows, rows, rows, *idle])
        metrics = self._updated_metrics(labels, logits, sample_weight)
        return {name: value for name, value in metrics.items() if name not in self._only_in_training}

    @property
    def _only_in_training(self) -> set[str]:
        return {"bce", *self.watched[len(_WATCHED) :]}

    def _updated_metrics(self, labels, logits, sample_weight) -> dict[str, tf.Tensor]:
        self.compiled_metrics.update_state(labels, tf.sigmoid(logits), sample_weight)
        return self.get_metrics_result()


def _loss_of(config: PointwiseConfig) -> LossFunction:
    return loss_function(config.loss, smoothing=config.label_smoothing, gamma=config.focal_gamma)


def as_logits(output: tf.Tensor) -> tf.Tensor:
    """Brings a backbone's output into the shape of logits.

    Args:
      output: [batch] or [batch, 1], of any floating type.

    Returns:
      float32 [batch].

    Raises:
      ValueError: any other shape.
    """
    logits = tf.cast(output, tf.float32)
    if logits.shape.rank == 2 and logits.shape[1] == 1:
        return tf.squeeze(logits, axis=1)
    if logits.shape.rank != 1:
        raise ValueError(f"a backbone gives logits [batch] or [batch, 1]. Received: shape {logits.shape}")
    return logits


def unpack(data: Any) -> tuple[Features, tf.Tensor, tf.Tensor]:
    """Takes apart what a training step is given.

    Args:
      data: (features, labels[, sample_weight]).

    Returns:
      The same three; labels and weights float32 [batch], weights 1 if not given.
    """
    features, labels, sample_weight = tf.keras.utils.unpack_x_y_sample_weight(data)
    labels = tf.reshape(tf.cast(labels, tf.float32), [-1])
    if sample_weight is None:
        return features, labels, tf.ones_like(labels)
    return features, labels, tf.reshape(tf.cast(sample_weight, tf.float32), [-1])
