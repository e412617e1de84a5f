"""ClsdModel: a backbone trained with click confidence, for ``model.compile`` / ``model.fit``."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from clsd_tf.backbones.base import Features
from clsd_tf.clsd.ad_gate import AdGate, ad_gate_loss
from clsd_tf.clsd.confidence import ClsdConfig, global_confidence, local_confidence, mixed_confidence
from clsd_tf.clsd.monitors import Extremum, MeanPerGroup
from clsd_tf.losses import bce_from_logits, weighted_mean


class ClsdModel(tfrs.Model):
    """A CTR model whose clicks are weighted by confidence.

    For step < loss_warmup_steps the loss is BCE. From then on

      loss = weighted_mean(click_confidence * bce_from_logits(labels, logits), sample_weight)

    with click_confidence from ``mixed_confidence`` of the teacher's scores. The teacher is the model itself in the
    same forward pass, behind a stop-gradient (which is the model as the previous batch left it), or
    ``features["teacher_score"]``. AdGate learns from its own loss, with its own optimizer, from the first step on.

    Source: arXiv 2309.16322; the equations are this package's reading of its abstract.

    Args:
      backbone: any ``tf.keras.Model`` from a feature dict to logits, float32 [batch].
      ad_gate: the local correction; None needs mu = 0.
      config: how clicks are weighted.

    Returns:
      ``call`` maps the feature dict to pctr, float32 [batch].
    """

    def __init__(self, backbone: tf.keras.Model, ad_gate: AdGate | None = None, config: ClsdConfig | None = None):
        super().__init__()
        config = config or ClsdConfig(teacher="self", mu=0.5 if ad_gate else 0.0)
        if ad_gate is None and config.mu > 0:
            raise ValueError(f"mu > 0 needs an AdGate. Received: mu={config.mu:g}, ad_gate=None. Give one or set mu=0")
        self.backbone = backbone
        self.ad_gate = ad_gate
        self.config = config
        self._means = {name: tf.keras.metrics.Mean(name=name) for name in ("loss", "bce", "ad_gate_loss", "mean_pctr")}
        self._extrema = [
            Extremum("min_click_confidence", largest=False),
            Extremum("max_click_confidence", largest=True),
        ]
        self._per_group = [
            (group, MeanPerGroup("click_confidence", group), MeanPerGroup("ad_gate", group))
            for group in (ad_gate.groups if ad_gate else ())
        ]

    def compile(
        self,
        optimizer: Any = "adam",
        *,
        ad_gate_optimizer: Any = None,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """As ``tf.keras.Model.compile``; the loss is the model's own.

        Args:
          optimizer: trains the backbone.
          ad_gate_optimizer: trains AdGate; Adam with learning rate 1e-3 by default.
          metrics: Keras metrics on (labels, pctr).

        Raises:
          ValueError: a loss was given.
        """
        if kwargs.get("loss") is not None:
            raise ValueError(
                f"ClsdModel brings its own loss. Received: loss={kwargs['loss']!r}. Leave it out; "
                "ClsdConfig(lambda_=0, mu=0) trains with plain BCE"
            )
        super().compile(optimizer=optimizer, metrics=metrics, **kwargs)
        self.ad_gate_optimizer = tf.keras.optimizers.get(ad_gate_optimizer or tf.keras.optimizers.Adam(1e-3))

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        return tf.sigmoid(self.logits(features, training=training))

    def logits(self, features: Features, training: bool = False) -> tf.Tensor:
        """The backbone's output as float32 [batch]; a backbone may also give [batch, 1].

        Raises:
          ValueError: any other shape.
        """
        logits = tf.cast(self.backbone(features, training=training), tf.float32)
        if logits.shape.rank == 2 and logits.shape[1] == 1:
            return tf.squeeze(logits, axis=1)
        if logits.shape.rank != 1:
            raise ValueError(f"a backbone gives logits [batch] or [batch, 1]. Received: shape {logits.shape}")
        return logits

    def debug_outputs(self, features: Features) -> dict[str, tf.Tensor]:
        """Logit, the self teacher's score (pctr) and AdGate's correction, each float32 [batch].

        The scores of a cross_fit teacher exist for training rows only; what serves is the model itself.
        """
        logits = self.logits(features)
        correction = self.ad_gate(features) if self.ad_gate else tf.zeros_like(logits)
        return {"logit": logits, "teacher_score": tf.sigmoid(logits), "ad_gate_correction": correction}

    def click_confidence(
        self,
        labels: tf.Tensor,
        teacher_score: tf.Tensor,
        correction: tf.Tensor,
        sample_weight: tf.Tensor,
        step: tf.Tensor,
    ) -> tf.Tensor:
        """Weights of the loss at optimizer step ``step``: 1 during loss warm-up and for rows without a click.

        Args:
          labels: float [batch].
          teacher_score: estimated click probability, float [batch].
          correction: AdGate's output, float [batch].
          sample_weight: float [batch].
          step: integer scalar.

        Returns:
          float32 [batch], without gradient.
        """
        click_weight = labels * sample_weight
        # Arithmetic on the step tensor: a Python condition would be frozen when the step is traced.
        is_on = tf.cast(step >= self.config.loss_warmup_steps, tf.float32)
        return mixed_confidence(
            labels,
            global_confidence(teacher_score, click_weight, self.config),
            local_confidence(teacher_score, correction, click_weight, self.config),
            is_on * self.config.lambda_,
            is_on * self.config.mu,
        )

    def _teacher_score(self, features: Features, logits: tf.Tensor) -> tf.Tensor:
        if self.config.teacher == "self":
            return tf.stop_gradient(tf.sigmoid(logits))
        if "teacher_score" not in features:
            raise ValueError(
                f"teacher={self.config.teacher!r} needs features['teacher_score']. Received: {sorted(features)}. "
                "Add the scores with input_pipeline.with_teacher_scores, or use teacher='self'"
            )
        return features["teacher_score"]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        features, labels, sample_weight = _unpack(data)
        step = self.optimizer.iterations
        with tf.GradientTape() as tape:
            logits = self.logits(features, training=True)
            teacher_score = self._teacher_score(features, logits)
            with tape.stop_recording():
                correction = self._train_ad_gate(features, labels, teacher_score, sample_weight)
            confidence = self.click_confidence(labels, teacher_score, correction, sample_weight, step)
            bce = bce_from_logits(labels, logits)
            loss = weighted_mean(confidence * bce, sample_weight) + tf.add_n([0.0, *self.backbone.losses])
        variables = self.backbone.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

        self._means["loss"].update_state(loss)
        self._means["bce"].update_state(bce, sample_weight)
        self._watch(features, labels, logits, confidence, correction, sample_weight)
        return self._updated_metrics(labels, logits, sample_weight)

    def _train_ad_gate(
        self, features: Features, labels: tf.Tensor, teacher_score: tf.Tensor, sample_weight: tf.Tensor
    ) -> tf.Tensor:
        """One step of AdGate on its own loss; returns the correction from before the step, float32 [batch]."""
        if self.ad_gate is None:
            return tf.zeros_like(teacher_score)
        with tf.GradientTape() as tape:
            correction = self.ad_gate(features)
            loss = ad_gate_loss(correction, teacher_score, labels * sample_weight)
        variables = self.ad_gate.trainable_variables
        self.ad_gate_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self._means["ad_gate_loss"].update_state(loss)
        return tf.stop_gradient(correction)

    def _watch(self, features, labels, logits, confidence, correction, sample_weight) -> None:
        click_weight = labels * sample_weight
        self._means["mean_pctr"].update_state(tf.sigmoid(logits), sample_weight)
        for metric in self._extrema:
            metric.update_state(confidence, click_weight)
        for group, of_confidence, of_correction in self._per_group:
            of_confidence.update_state(features[group.name], confidence, click_weight)
            of_correction.update_state(features[group.name], correction, click_weight)

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Evaluates with plain BCE: the loss of different confidences would not be comparable."""
        features, labels, sample_weight = _unpack(data)
        logits = self.logits(features)
        bce = bce_from_logits(labels, logits)
        self._means["loss"].update_state(bce, sample_weight)
        self._means["mean_pctr"].update_state(tf.sigmoid(logits), sample_weight)
        metrics = self._updated_metrics(labels, logits, sample_weight)
        watched_in_training = {"bce", "ad_gate_loss", *(metric.name for metric in self._extrema)}
        return {name: value for name, value in metrics.items() if name not in watched_in_training and "/" not in name}

    def _updated_metrics(self, labels, logits, sample_weight) -> dict[str, tf.Tensor]:
        self.compiled_metrics.update_state(labels, tf.sigmoid(logits), sample_weight)
        return self.get_metrics_result()


def _unpack(data: Any) -> tuple[Features, tf.Tensor, tf.Tensor]:
    """(features, labels[, sample_weight]) -> float32 [batch] labels and weights (1 where not given)."""
    features, labels, sample_weight = tf.keras.utils.unpack_x_y_sample_weight(data)
    labels = tf.reshape(tf.cast(labels, tf.float32), [-1])
    if sample_weight is None:
        return features, labels, tf.ones_like(labels)
    return features, labels, tf.reshape(tf.cast(sample_weight, tf.float32), [-1])
