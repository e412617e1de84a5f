"""ClsdModel: a backbone trained with click confidence, for ``model.compile`` / ``model.fit``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_recommenders as tfrs

from clsd_tf.backbones.base import Features
from clsd_tf.clsd.ad_gate import AdGate
from clsd_tf.clsd.confidence import (
    ClickMeans,
    global_confidence,
    local_confidence,
    mixed_confidence,
    shuffled_among_clicks,
)
from clsd_tf.clsd.config import ONLINE_TEACHERS, ClsdConfig, OverconfidentTeacherWarning
from clsd_tf.clsd.guards import ConfidenceGuard, GuardState
from clsd_tf.clsd.monitors import GroupLogs, MeansPerGroup, Range, WeightedMeans, effective_click_share
from clsd_tf.losses import bce_from_logits, weighted_mean
from clsd_tf.throughput import InputWait

_WATCHED = ("loss", "bce", "mean_pctr")
_WATCHED_CLICKS = ("ad_gate_loss", "effective_click_share")


class ClsdModel(tfrs.Model):
    """A CTR model whose clicks are weighted by confidence.

    For step < loss_warmup_steps the loss is the ordinary one. From then on

      loss = weighted_mean(click_confidence * loss_function(labels, logits), sample_weight)

    with click_confidence from ``mixed_confidence`` of the teacher's scores. An online teacher is the model itself in
    the same forward pass, behind a stop-gradient (which is the model as the previous batch left it), or its moving
    average; other teachers' scores come in ``features["teacher_score"]``. AdGate learns from its own loss, with its own
    optimizer, from the first step on. Guards end training when confidence goes wrong.

    Source: arXiv 2309.16322; the equations are this package's reading of its abstract.

    Args:
      backbone: any ``tf.keras.Model`` from a feature dict to logits, float32 [batch].
      ad_gate: the local correction; None needs mu = 0.
      config: how clicks are weighted.
      loss_function: (labels, logits) -> loss of each row, [batch].
      teacher_backbone: a second backbone like the first, which the ``ema`` teacher turns into its moving average.

    Returns:
      ``call`` maps the feature dict to pctr, float32 [batch]: calibrated once ``calibration`` is set, a layer from
      (logits, features) to pctr.
    """

    def __init__(
        self,
        backbone: tf.keras.Model,
        ad_gate: AdGate | None = None,
        config: ClsdConfig | None = None,
        *,
        loss_function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = bce_from_logits,
        teacher_backbone: tf.keras.Model | None = None,
    ):
        super().__init__()
        config = config or ClsdConfig(teacher="self", **({} if ad_gate else {"lambda": 1.0, "mu": 0.0}))
        if ad_gate is None and config.mu > 0:
            raise ValueError(f"mu > 0 needs an AdGate. Received: mu={config.mu:g}, ad_gate=None. Give one or set mu=0")
        if (config.teacher == "ema") != (teacher_backbone is not None):
            raise ValueError(
                "teacher='ema' and teacher_backbone go together. "
                f"Received: teacher={config.teacher!r}, teacher_backbone={teacher_backbone}"
            )
        self.backbone = backbone
        self.ad_gate = ad_gate
        self.config = config
        self._calibration: tf.keras.layers.Layer | None = None
        self._loss_function = loss_function
        self._teacher_backbone = teacher_backbone
        self._click_means = ClickMeans(config.normaliser_momentum)
        self.guard_state = GuardState()
        self._means = WeightedMeans((*_WATCHED, *_WATCHED_CLICKS) if self.weights_clicks else _WATCHED)
        self._range = Range("click_confidence") if self.weights_clicks else None
        watched_groups = ad_gate.groups if ad_gate and self.weights_clicks else ()
        self._per_group = [MeansPerGroup(("click_confidence", "ad_gate"), group) for group in watched_groups]
        self._input_wait = InputWait()

    @property
    def calibration(self) -> tf.keras.layers.Layer | None:
        """From (logits, features) to calibrated pctr; None as long as there is none."""
        return self._calibration

    @calibration.setter
    def calibration(self, layer: tf.keras.layers.Layer | None) -> None:
        self._calibration = layer
        self.predict_function = None  # Keras would go on with the function that it traced before.

    @property
    def weights_clicks(self) -> bool:
        """Whether confidence ever enters the loss."""
        return self.config.lambda_ + self.config.mu > 0

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
          ad_gate_optimizer: trains AdGate; by default Adam with the config's learning rate.
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
        default = tf.keras.optimizers.Adam(self.config.ad_gate.learning_rate)
        self.ad_gate_optimizer = tf.keras.optimizers.get(ad_gate_optimizer or default)

    def fit(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> tf.keras.callbacks.History:
        """As ``tf.keras.Model.fit``, with the guards on.

        Warns with ``OverconfidentTeacherWarning`` where an online teacher meets more than one epoch.

        Raises:
          ConfidenceGuardError: confidence collapsed.
        """
        if self.weights_clicks:
            warning = self.config.teacher_warning(kwargs.get("epochs", 1))
            if warning:
                warnings.warn(warning, OverconfidentTeacherWarning, stacklevel=2)
            # First in the list: nothing that went wrong must be kept by the callbacks behind it.
            given = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
            callbacks = [ConfidenceGuard(), GroupLogs(self._per_group), *given]
        return super().fit(*args, callbacks=callbacks, **kwargs)

    @property
    def input_wait_seconds(self) -> float | None:
        """How long training steps have waited for input here; None where a coordinator hands steps to workers."""
        return None if self._cluster_coordinator else self._input_wait.seconds

    def make_train_function(self, force: bool = False) -> Callable:
        """As ``tf.keras.Model.make_train_function``; the steps measure ``input_wait_seconds``."""
        if self.train_function is not None and not force:
            return self.train_function
        function = super().make_train_function(force)
        if self._cluster_coordinator:
            return function

        def train_function(iterator):
            return function(self._input_wait.timed(iterator))

        self.train_function = train_function
        if not self.run_eagerly:
            self.train_function = tf.function(train_function, reduce_retracing=True, autograph=False)
        return self.train_function

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        logits = self.logits(features, training=training)
        return tf.sigmoid(logits) if self.calibration is None else self.calibration(logits, features)

    def logits(self, features: Features, training: bool = False) -> tf.Tensor:
        """The backbone's output as float32 [batch]; a backbone may also give [batch, 1].

        Raises:
          ValueError: any other shape.
        """
        return _as_logits(self.backbone(features, training=training))

    def debug_outputs(self, features: Features) -> dict[str, tf.Tensor]:
        """Logit, the self teacher's score (uncalibrated pctr) and AdGate's correction, each float32 [batch].

        The scores of other teachers exist for training rows only; what serves is the model itself.
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
        config, ones = self.config, tf.ones_like(labels)
        click_weight = labels * sample_weight
        global_part, local_part = ones, ones
        if config.lambda_:
            global_part = global_confidence(teacher_score, click_weight, config, self._click_means)
        if config.mu:
            local_part = local_confidence(teacher_score, correction, click_weight, config, self._click_means)
        # Arithmetic on the step tensor: a Python condition would be frozen when the step is traced.
        is_on = tf.cast(step >= config.resolved_loss_warmup_steps, tf.float32)
        confidence = mixed_confidence(labels, global_part, local_part, is_on * config.lambda_, is_on * config.mu)
        if config.placebo == "shuffled_confidence":
            confidence = shuffled_among_clicks(confidence, click_weight, _step_seed(step))
        return confidence

    def _teacher_score(self, features: Features, logits: tf.Tensor) -> tf.Tensor:
        if self.config.teacher == "self" or not self.weights_clicks:
            return tf.stop_gradient(tf.sigmoid(logits))
        if self.config.teacher == "ema":
            return tf.stop_gradient(tf.sigmoid(_as_logits(self._teacher_backbone(features))))
        if "teacher_score" not in features:
            raise ValueError(
                f"teacher={self.config.teacher!r} needs features['teacher_score']. Received: {sorted(features)}. Add "
                f"the scores with input_pipeline.with_teacher_scores, or use one of {', '.join(ONLINE_TEACHERS)}"
            )
        return features["teacher_score"]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        features, labels, sample_weight = _unpack(data)
        step = tf.identity(self.optimizer.iterations)  # Of this step: applying gradients moves the variable on.
        with tf.GradientTape() as tape:
            logits = self.logits(features, training=True)
            losses = self._loss_function(labels, logits)
            with tape.stop_recording():
                batch = self._weigh(features, labels, sample_weight, logits, step)
            loss = weighted_mean(batch.confidence * losses, sample_weight) + tf.add_n([0.0, *self.backbone.losses])
        variables = self.backbone.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        if self._teacher_backbone is not None and self.weights_clicks:
            self._move_teacher(step)
        self._watch(features, batch, loss, step)
        return self._updated_metrics(labels, logits, sample_weight)

    def _weigh(
        self, features: Features, labels: tf.Tensor, sample_weight: tf.Tensor, logits: tf.Tensor, step: tf.Tensor
    ) -> _WeighedBatch:
        """Teacher, AdGate and confidence of a batch; nothing here is for the backbone's gradient."""
        bce = bce_from_logits(labels, logits)
        teacher_score = self._teacher_score(features, logits)
        known = tf.ones_like(labels)
        if self.config.teacher == "prequential":  # No model precedes the first day: its clicks count 1.
            known = tf.cast(tf.math.is_finite(teacher_score), tf.float32)
            teacher_score = tf.where(known > 0, teacher_score, 0.0)
        click_weight = labels * sample_weight * known
        correction, gate_loss = tf.zeros_like(logits), tf.constant(0.0)
        if self.ad_gate is not None:
            correction, gate_loss = self._train_ad_gate(features, teacher_score, bce, click_weight, step)
        confidence = self.click_confidence(labels, teacher_score, correction, sample_weight * known, step)
        confidence = tf.where(known > 0, confidence, 1.0)
        return _WeighedBatch(
            labels, sample_weight, click_weight, logits, bce, teacher_score, correction, gate_loss, confidence
        )

    def _train_ad_gate(
        self, features: Features, teacher_score: tf.Tensor, bce: tf.Tensor, click_weight: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One step of AdGate on its own loss; returns the correction from before the step, [batch], and the loss."""
        seen = {name: features[name] for name in self.ad_gate.features}
        if self.config.placebo == "permuted_groups":
            rows = tf.range(tf.shape(teacher_score)[0])
            rows = tf.random.experimental.stateless_shuffle(rows, seed=_step_seed(step))
            seen = {name: tf.gather(values, rows) for name, values in seen.items()}
        with tf.GradientTape() as tape:
            correction = self.ad_gate(seen)
            loss = self.ad_gate.loss(correction, teacher_score, bce, click_weight)
        variables = self.ad_gate.trainable_variables
        self.ad_gate_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.stop_gradient(correction), loss

    def _move_teacher(self, step: tf.Tensor) -> None:
        """teacher = momentum * teacher + (1 - momentum) * backbone, with a small momentum in the first steps."""
        count = tf.cast(step, tf.float32)
        momentum = tf.minimum(self.config.ema_momentum, count / (count + 10.0))
        for slow, fast in zip(self._teacher_backbone.variables, self.backbone.variables, strict=True):
            slow.assign(momentum * slow + (1.0 - momentum) * fast)

    def _watch(self, features: Features, batch: _WeighedBatch, loss: tf.Tensor, step: tf.Tensor) -> None:
        rows, clicks = tf.reduce_sum(batch.sample_weight), tf.reduce_sum(batch.click_weight)
        mean_bce = weighted_mean(batch.bce, batch.sample_weight)
        mean_pctr = weighted_mean(tf.sigmoid(batch.logits), batch.sample_weight)
        values, counts = [loss, mean_bce, mean_pctr], [rows] * 3
        if self.weights_clicks:
            click_share = effective_click_share(batch.confidence, batch.click_weight)
            values, counts = [*values, batch.gate_loss, click_share], [*counts, clicks, clicks]
            self._update_guards(batch, mean_pctr, click_share, step)
            self._range.update_state(batch.confidence, batch.click_weight)
            for means in self._per_group:
                means.update_state(features[means.group.name], (batch.confidence, batch.correction), batch.click_weight)
        self._means.update_state(values, counts)

    def _update_guards(
        self, batch: _WeighedBatch, mean_pctr: tf.Tensor, click_share: tf.Tensor, step: tf.Tensor
    ) -> None:
        drift = tf.constant(0.0)
        if self.ad_gate is not None and self.config.ad_gate.objective == "residual":
            drift = tf.abs(weighted_mean(batch.correction + batch.teacher_score - 1.0, batch.click_weight))
        self.guard_state.update(
            mean_pctr=mean_pctr,
            click_rate=weighted_mean(batch.labels, batch.sample_weight),
            click_share=click_share,
            drift=drift,
            is_warming_up=step < self.config.resolved_loss_warmup_steps,
            has_warmup=self.config.resolved_loss_warmup_steps > 0,
        )

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Evaluates with plain BCE: the loss of different confidences would not be comparable."""
        features, labels, sample_weight = _unpack(data)
        logits = self.logits(features)
        bce, pctr = bce_from_logits(labels, logits), tf.sigmoid(logits)
        means = [weighted_mean(bce, sample_weight)] * 2 + [weighted_mean(pctr, sample_weight)]
        idle = [0.0] * (len(self._means.names) - 3)
        self._means.update_state([*means, *idle], [*[tf.reduce_sum(sample_weight)] * 3, *idle])
        metrics = self._updated_metrics(labels, logits, sample_weight)
        watched = {*_WATCHED_CLICKS, "bce", "min_click_confidence", "max_click_confidence"}
        return {name: value for name, value in metrics.items() if name not in watched}

    def _updated_metrics(self, labels, logits, sample_weight) -> dict[str, tf.Tensor]:
        self.compiled_metrics.update_state(labels, tf.sigmoid(logits), sample_weight)
        return self.get_metrics_result()


class _WeighedBatch(NamedTuple):
    """What a training step found out about its batch; all [batch] but ``gate_loss``."""

    labels: tf.Tensor
    sample_weight: tf.Tensor
    click_weight: tf.Tensor
    logits: tf.Tensor
    bce: tf.Tensor
    teacher_score: tf.Tensor
    correction: tf.Tensor
    gate_loss: tf.Tensor
    confidence: tf.Tensor


def _as_logits(output: tf.Tensor) -> tf.Tensor:
    logits = tf.cast(output, tf.float32)
    if logits.shape.rank == 2 and logits.shape[1] == 1:
        return tf.squeeze(logits, axis=1)
    if logits.shape.rank != 1:
        raise ValueError(f"a backbone gives logits [batch] or [batch, 1]. Received: shape {logits.shape}")
    return logits


def _step_seed(step: tf.Tensor) -> tf.Tensor:
    """A seed per step for the placebos' permutations."""
    return tf.stack([tf.constant(0, tf.int64), tf.cast(step, tf.int64)])


def _unpack(data: Any) -> tuple[Features, tf.Tensor, tf.Tensor]:
    """(features, labels[, sample_weight]) -> float32 [batch] labels and weights (1 where not given)."""
    features, labels, sample_weight = tf.keras.utils.unpack_x_y_sample_weight(data)
    labels = tf.reshape(tf.cast(labels, tf.float32), [-1])
    if sample_weight is None:
        return features, labels, tf.ones_like(labels)
    return features, labels, tf.reshape(tf.cast(sample_weight, tf.float32), [-1])
