"""ClsdModel: a backbone trained with click confidence, for ``model.compile`` / ``model.fit``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_recommenders as tfrs

from clsd_tf.backbones.base import Features
from clsd_tf.distributed.replicas import AgreedFlags, in_own_row, num_replicas, sum_over_replicas
from clsd_tf.distributed.strategies import at_epoch_ends, is_parameter_server
from clsd_tf.layers.losses import bce_from_logits, weighted_mean
from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.confidence import ClickMeans, confidences, mean_score, mixed_confidence, shuffled_among_clicks
from clsd_tf.methods.clsd.config import ONLINE_TEACHERS, ClsdConfig, OverconfidentTeacherWarning
from clsd_tf.methods.clsd.guards import ConfidenceGuard, GuardState
from clsd_tf.methods.clsd.monitors import (
    GroupLogs,
    MeansPerGroup,
    Range,
    WeightedMeans,
    effective_click_share,
    power_sums,
    signed_maxima,
)
from clsd_tf.methods.input_wait import InputWait

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

    Under a synchronous ``tf.distribute`` strategy each replica has a part of the batch, and every mean above is one
    over the global batch: the gradients that the replicas add up are those of one replica with all rows. Batch
    normalisation within a backbone (``din``) stays that of the replica's rows.

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
        self.requests = AgreedFlags(2)  # To save, and to stop: callbacks ask.
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
    def training_state(self) -> dict[str, Sequence[tf.Variable]]:
        """All that training goes on from, by part: weights, slots and step counts of optimizers, moving means."""
        parts = {
            "backbone": self.backbone.variables,
            "optimizer": self.optimizer.variables,
            "moving means": [*self._click_means.variables, *self.guard_state.variables],
        }
        if self.ad_gate is not None:
            parts |= {"AdGate": self.ad_gate.variables, "optimizer of AdGate": self.ad_gate_optimizer.variables}
        if self._teacher_backbone is not None:
            parts["EMA teacher"] = self._teacher_backbone.variables
        return {name: list(variables) for name, variables in parts.items()}

    @property
    def epoch_variables(self) -> list[tf.Variable]:
        """What starts anew in each epoch: the state of the metrics and of the means per user group."""
        return [variable for part in (*self.metrics, *self._per_group) for variable in part.variables]

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
        given = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
        if self.weights_clicks:
            warning = self.config.teacher_warning(kwargs.get("epochs", 1))
            if warning:
                warnings.warn(warning, OverconfidentTeacherWarning, stacklevel=2)
            # First in the list: nothing that went wrong must be kept by the callbacks behind it.
            given = [ConfidenceGuard(), GroupLogs(self._per_group), *given]
        if is_parameter_server(self.distribute_strategy):
            given = [at_epoch_ends(callback) for callback in given]
        return super().fit(*args, callbacks=given, **kwargs)

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
        config, ones, references = self.config, tf.ones_like(labels), {}
        click_weight = labels * sample_weight
        if config.lambda_:
            references["global"] = mean_score(teacher_score, click_weight, self._click_means)
        if config.mu:
            references["local"] = 1.0 - correction
        parts = confidences(references, teacher_score, click_weight, config, self._click_means)
        global_part, local_part = parts.get("global", ones), parts.get("local", ones)
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
            loss = weighted_mean(batch.confidence * losses, sample_weight, batch.total_weight) + self._penalty()
        variables = self.backbone.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        if self._teacher_backbone is not None and self.weights_clicks:
            self._move_teacher(step)
        self._watch(features, batch, loss, step)
        return self._updated_metrics(labels, logits, sample_weight)

    def _penalty(self) -> tf.Tensor:
        """This replica's share of the backbone's own losses, which do not depend on the batch."""
        penalty = tf.add_n([0.0, *self.backbone.losses])
        return penalty if num_replicas() == 1 else penalty / num_replicas()

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
        totals = sum_over_replicas((tf.reduce_sum(sample_weight), tf.reduce_sum(click_weight)))
        correction, gate_loss = tf.zeros_like(logits), tf.constant(0.0)
        if self.ad_gate is not None:
            correction, gate_loss = self._train_ad_gate(features, teacher_score, bce, click_weight, totals[1], step)
        confidence = self.click_confidence(labels, teacher_score, correction, sample_weight * known, step)
        confidence = tf.where(known > 0, confidence, 1.0)
        return _WeighedBatch(
            labels, sample_weight, click_weight, *totals, logits, bce, teacher_score, correction, gate_loss, confidence
        )

    def _train_ad_gate(
        self,
        features: Features,
        teacher_score: tf.Tensor,
        bce: tf.Tensor,
        click_weight: tf.Tensor,
        total_click_weight: tf.Tensor,
        step: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One step of AdGate on its own loss.

        Returns:
          The correction from before the step, [batch], and this replica's share of the loss.
        """
        seen = {name: features[name] for name in self.ad_gate.features}
        if self.config.placebo == "permuted_groups":
            rows = tf.range(tf.shape(teacher_score)[0])
            rows = tf.random.experimental.stateless_shuffle(rows, seed=_step_seed(step))
            seen = {name: tf.gather(values, rows) for name, values in seen.items()}
        with tf.GradientTape() as tape:
            correction = self.ad_gate(seen)
            loss = self.ad_gate.loss(correction, teacher_score, bce, click_weight, total_click_weight)
        variables = self.ad_gate.trainable_variables
        self.ad_gate_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.stop_gradient(correction), loss

    def _move_teacher(self, step: tf.Tensor) -> None:
        """teacher = momentum * teacher + (1 - momentum) * backbone, with a small momentum in the first steps."""
        count = tf.cast(step, tf.float32)
        momentum = tf.minimum(self.config.ema_momentum, count / (count + 10.0))

        def moved(slow: tf.Variable, fast: tf.Tensor, momentum: tf.Tensor) -> Any:
            return slow.assign(momentum * slow + (1.0 - momentum) * fast)

        def move(strategy: tf.distribute.Strategy, momentum: tf.Tensor) -> None:
            for slow, fast in zip(self._teacher_backbone.variables, self.backbone.variables, strict=True):
                strategy.extended.update(slow, moved, args=(fast, momentum), group=False)

        # As optimizers do: a replica must not assign variables of which each replica has a copy.
        tf.distribute.get_replica_context().merge_call(move, (momentum,))

    def _watch(self, features: Features, batch: _WeighedBatch, loss: tf.Tensor, step: tf.Tensor) -> None:
        seen = self.requests.exchanged_with(self._shares_of_means(batch, loss))
        rows, clicks = batch.total_weight, batch.total_click_weight
        values, counts = [seen["loss"], seen["bce"], seen["mean_pctr"]], [rows] * 3
        if self.weights_clicks:
            click_share = effective_click_share(*seen["power_sums"])
            values, counts = [*values, seen["ad_gate_loss"], click_share], [*counts, clicks, clicks]
            self._update_guards(seen, click_share, step)
            self._range.update_state(seen["signed_maxima"])
            for means in self._per_group:
                means.update_state(features[means.group.name], (batch.confidence, batch.correction), batch.click_weight)
        self._means.update_state(values, counts)

    def _shares_of_means(self, batch: _WeighedBatch, loss: tf.Tensor) -> dict[str, Any]:
        """What this replica adds to the global batch's values of what is watched."""

        def of_rows(values: tf.Tensor) -> tf.Tensor:
            return weighted_mean(values, batch.sample_weight, batch.total_weight)

        shares = {"loss": loss, "bce": of_rows(batch.bce), "mean_pctr": of_rows(tf.sigmoid(batch.logits))}
        if not self.weights_clicks:
            return shares
        shares["click_rate"] = of_rows(batch.labels)
        shares["ad_gate_loss"] = batch.gate_loss
        shares["power_sums"] = power_sums(batch.confidence, batch.click_weight)
        shares["signed_maxima"] = in_own_row(signed_maxima(batch.confidence, batch.click_weight))
        shares["drift"] = tf.constant(0.0)
        if self.ad_gate is not None and self.config.ad_gate.objective == "residual":
            error = batch.correction + batch.teacher_score - 1.0
            shares["drift"] = weighted_mean(error, batch.click_weight, batch.total_click_weight)
        return shares

    def _update_guards(self, seen: dict[str, Any], click_share: tf.Tensor, step: tf.Tensor) -> None:
        self.guard_state.update(
            mean_pctr=seen["mean_pctr"],
            click_rate=seen["click_rate"],
            click_share=click_share,
            drift=tf.abs(seen["drift"]),
            is_warming_up=step < self.config.resolved_loss_warmup_steps,
            has_warmup=self.config.resolved_loss_warmup_steps > 0,
        )

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Evaluates with plain BCE: the loss of different confidences would not be comparable."""
        features, labels, sample_weight = _unpack(data)
        logits = self.logits(features)
        bce, pctr = bce_from_logits(labels, logits), tf.sigmoid(logits)
        sums = sample_weight * bce, sample_weight * pctr, sample_weight
        sum_of_bce, sum_of_pctr, rows = sum_over_replicas([tf.reduce_sum(values) for values in sums])
        mean_bce, mean_pctr = (tf.math.divide_no_nan(values, rows) for values in (sum_of_bce, sum_of_pctr))
        idle = [0.0] * (len(self._means.names) - 3)
        self._means.update_state([mean_bce, mean_bce, mean_pctr, *idle], [rows, rows, rows, *idle])
        metrics = self._updated_metrics(labels, logits, sample_weight)
        watched = {*_WATCHED_CLICKS, "bce", "min_click_confidence", "max_click_confidence"}
        return {name: value for name, value in metrics.items() if name not in watched}

    def _updated_metrics(self, labels, logits, sample_weight) -> dict[str, tf.Tensor]:
        self.compiled_metrics.update_state(labels, tf.sigmoid(logits), sample_weight)
        return self.get_metrics_result()


class _WeighedBatch(NamedTuple):
    """What a training step found out about its batch: [batch], or scalars.

    ``total_weight`` and ``total_click_weight`` are sums over the global batch, ``gate_loss`` is the replica's share.
    """

    labels: tf.Tensor
    sample_weight: tf.Tensor
    click_weight: tf.Tensor
    total_weight: tf.Tensor
    total_click_weight: tf.Tensor
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
