"""ClsdModel: a backbone trained with click confidence, for ``model.compile`` / ``model.fit``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from clsd_tf.backbones.base import Features, declared_features
from clsd_tf.distributed.replicas import in_own_row, sum_over_replicas
from clsd_tf.layers.losses import weighted_mean
from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.confidence import (
    ClickMeans,
    confidences,
    mean_score,
    mixed_confidence,
    shuffled_among_clicks,
)
from clsd_tf.methods.clsd.config import ONLINE_TEACHERS, ClsdConfig, OverconfidentTeacherWarning
from clsd_tf.methods.clsd.guards import ConfidenceGuard, GuardState
from clsd_tf.methods.clsd.monitors import (
    GroupLogs,
    MeansPerGroup,
    Range,
    effective_click_share,
    power_sums,
    signed_maxima,
)
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.methods.pointwise.model import Batch, LossFunction, PointwiseModel, Weighed, as_logits

_WATCHED_CLICKS = ("ad_gate_loss", "effective_click_share")
_ONLY_IN_TRAINING = {*_WATCHED_CLICKS, "bce", "min_click_confidence", "max_click_confidence"}


class ClsdModel(PointwiseModel):
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
      loss_function: (labels, logits) -> loss of each row, [batch], instead of the config's.
      teacher_backbone: a second backbone like the first, which the ``ema`` teacher turns into its moving average.

    Raises:
      ValueError: config, AdGate and teacher_backbone do not go together.
    """

    config: ClsdConfig

    def __init__(
        self,
        backbone: tf.keras.Model,
        ad_gate: AdGate | None = None,
        config: ClsdConfig | None = None,
        *,
        loss_function: LossFunction | None = None,
        teacher_backbone: tf.keras.Model | None = None,
    ):
        shares: dict[str, Any] = {} if ad_gate else {"lambda": 1.0, "mu": 0.0}
        config = config or ClsdConfig(teacher="self", **shares)
        if ad_gate is None and config.mu > 0:
            raise ValueError(f"mu > 0 needs an AdGate. Received: mu={config.mu:g}, ad_gate=None. Give one or set mu=0")
        if (config.teacher == "ema") != (teacher_backbone is not None):
            raise ValueError(
                "teacher='ema' and teacher_backbone go together. "
                f"Received: teacher={config.teacher!r}, teacher_backbone={teacher_backbone}"
            )
        super().__init__(backbone, config, loss_function=loss_function)
        self.ad_gate = ad_gate
        self._teacher_backbone = teacher_backbone
        self._click_means = ClickMeans(config.normalizer_momentum)
        self.guard_state = GuardState()
        self._range = Range("click_confidence") if config.weights_clicks else None
        watched_groups = ad_gate.groups if ad_gate and config.weights_clicks else ()
        self._per_group = [MeansPerGroup(("click_confidence", "ad_gate"), group) for group in watched_groups]

    @property
    def parts(self) -> dict[str, tf.Module]:
        return super().parts | ({"ad_gate": self.ad_gate} if self.ad_gate is not None else {})

    @property
    def training_state(self) -> dict[str, Sequence[tf.Variable]]:
        parts = super().training_state
        parts["moving means"] = [*self._click_means.variables, *self.guard_state.variables]
        if self.ad_gate is not None:
            parts |= {
                "AdGate": list(self.ad_gate.variables),
                "optimizer of AdGate": list(self.ad_gate_optimizer.variables),
            }
        if self._teacher_backbone is not None:
            parts["EMA teacher"] = list(self._teacher_backbone.variables)
        return parts

    @property
    def epoch_variables(self) -> list[tf.Variable]:
        return [*super().epoch_variables, *(variable for part in self._per_group for variable in part.variables)]

    @property
    def first_competing_step(self) -> int:
        """Epochs that end within loss warm-up do not compete: their weights are those of plain BCE."""
        return self.config.resolved_loss_warmup_steps

    @property
    def watched(self) -> tuple[str, ...]:
        return (*super().watched, *_WATCHED_CLICKS) if self.config.weights_clicks else super().watched

    def compile(self, optimizer: Any = "adam", *, ad_gate_optimizer: Any = None, **kwargs: Any) -> None:
        """As ``tf.keras.Model.compile``; the loss is the model's own.

        Args:
          optimizer: trains the backbone.
          ad_gate_optimizer: trains AdGate; by default Adam with the config's learning rate.
          kwargs: as there, ``metrics`` on (labels, ctr).

        Raises:
          ValueError: a loss was given.
        """
        super().compile(optimizer=optimizer, **kwargs)
        default = tf.keras.optimizers.Adam(self.config.ad_gate.learning_rate)
        self.ad_gate_optimizer = tf.keras.optimizers.get(ad_gate_optimizer or default)

    def build_optimizers(self) -> None:
        super().build_optimizers()
        if self.ad_gate is not None:
            self.ad_gate_optimizer.build(self.ad_gate.trainable_variables)

    def fit(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> tf.keras.callbacks.History:
        """As ``tf.keras.Model.fit``, with the guards on.

        Warns with ``OverconfidentTeacherWarning`` where an online teacher meets more than one epoch.

        Raises:
          ConfidenceGuardError: confidence collapsed.
        """
        given = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
        if self.config.weights_clicks:
            warning = self.config.teacher_warning(kwargs.get("epochs", 1))
            if warning:
                warnings.warn(warning, OverconfidentTeacherWarning, stacklevel=2)
            # First in the list: nothing that went wrong must be kept by the callbacks behind it.
            given = [ConfidenceGuard(), GroupLogs(self._per_group), *given]
        return super().fit(*args, callbacks=given, **kwargs)

    def begin_after(self, earlier: MethodModel, last_epoch: Mapping[str, Any]) -> None:
        """Sets what loss warm-up would have left, where the earlier run weighted no clicks and so has not kept it.

        Args:
          earlier: the model of the run before, a ``ClsdModel``.
          last_epoch: its last entry in the history.
        """
        assert isinstance(earlier, ClsdModel), "a warm start is from a run of the same method"
        if not self.config.weights_clicks or earlier.config.weights_clicks:
            return
        self.guard_state.begin(last_epoch.get("mean_ctr", last_epoch.get("mean_pctr")))  # As version 0.1 called it.
        if self._teacher_backbone is not None:
            for slow, fast in zip(self._teacher_backbone.variables, self.backbone.variables, strict=True):
                slow.assign(fast)

    def debug_outputs(self, features: Features) -> dict[str, tf.Tensor]:
        """Computes what the signature ``debug`` tells of each row.

        The scores of other teachers than the model itself exist for training rows only.

        Args:
          features: name -> [batch, ...].

        Returns:
          ``logit``, ``teacher_score`` (uncalibrated ctr) and ``ad_gate_correction``, each float32 [batch].
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
        references: dict[str, tf.Tensor] = {}
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
        if self.config.teacher == "self" or not self.config.weights_clicks:
            return tf.stop_gradient(tf.sigmoid(logits))
        slow = self._teacher_backbone
        if slow is not None:
            return tf.stop_gradient(tf.sigmoid(as_logits(slow(declared_features(slow, features)))))
        if "teacher_score" not in features:
            raise ValueError(
                f"teacher={self.config.teacher!r} needs features['teacher_score']. Received: {sorted(features)}. Add "
                f"the scores with input_pipeline.with_teacher_scores, or use one of {', '.join(ONLINE_TEACHERS)}"
            )
        return features["teacher_score"]

    def weigh(self, batch: Batch) -> Weighed:
        """Runs teacher and AdGate on a ``batch``; nothing here is for the backbone's gradient.

        Returns:
          Confidence as the weight of each row's loss; ``found`` is what is watched of it.
        """
        labels, sample_weight = batch.labels, batch.sample_weight
        teacher_score = self._teacher_score(batch.features, batch.logits)
        # A teacher may have no score for some rows (no model precedes the first day): their clicks count 1.
        known = tf.ones_like(labels)
        if self.config.teacher not in ONLINE_TEACHERS:
            known = tf.cast(tf.math.is_finite(teacher_score), tf.float32)
            teacher_score = tf.where(known > 0, teacher_score, 0.0)
        click_weight = labels * sample_weight * known
        totals = sum_over_replicas((tf.reduce_sum(sample_weight), tf.reduce_sum(click_weight)))
        correction, gate_loss = tf.zeros_like(batch.logits), tf.constant(0.0)
        if self.ad_gate is not None:
            correction, gate_loss = self._train_ad_gate(self.ad_gate, batch, teacher_score, click_weight, totals[1])
        confidence = self.click_confidence(labels, teacher_score, correction, sample_weight * known, batch.step)
        confidence = tf.where(known > 0, confidence, 1.0)
        return Weighed(confidence, totals[0], _Found(click_weight, totals[1], teacher_score, correction, gate_loss))

    def _train_ad_gate(
        self,
        ad_gate: AdGate,
        batch: Batch,
        teacher_score: tf.Tensor,
        click_weight: tf.Tensor,
        total_click_weight: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One step of AdGate on its own loss.

        Returns:
          The correction from before the step, [batch], and this replica's share of the loss.
        """
        seen = {name: batch.features[name] for name in ad_gate.features}
        if self.config.placebo == "permuted_groups":
            rows = tf.range(tf.shape(teacher_score)[0])
            rows = tf.random.experimental.stateless_shuffle(rows, seed=_step_seed(batch.step))
            seen = {name: tf.gather(values, rows) for name, values in seen.items()}
        with tf.GradientTape() as tape:
            correction = ad_gate(seen)
            loss = ad_gate.loss(correction, teacher_score, batch.bce, click_weight, total_click_weight)
        variables = ad_gate.trainable_variables
        self.ad_gate_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.stop_gradient(correction), loss

    def after_update(self, batch: Batch) -> None:
        """Moves the EMA teacher: teacher = momentum * teacher + (1 - momentum) * backbone.

        The momentum is small in the first steps.

        Args:
          batch: of the step.
        """
        teacher = self._teacher_backbone
        if teacher is None or not self.config.weights_clicks:
            return
        count = tf.cast(batch.step, tf.float32)
        momentum = tf.minimum(self.config.ema_momentum, count / (count + 10.0))

        def moved(slow: tf.Variable, fast: tf.Tensor, momentum: tf.Tensor) -> Any:
            return slow.assign(momentum * slow + (1.0 - momentum) * fast)

        def move(strategy: tf.distribute.Strategy, momentum: tf.Tensor) -> None:
            for slow, fast in zip(teacher.variables, self.backbone.variables, strict=True):
                strategy.extended.update(slow, moved, args=(fast, momentum), group=False)

        # As optimizers do: a replica must not assign variables of which each replica has a copy.
        tf.distribute.get_replica_context().merge_call(move, (momentum,))

    def shares(self, batch: Batch, weighed: Weighed, loss: tf.Tensor) -> dict[str, Any]:
        shares = super().shares(batch, weighed, loss)
        if not self.config.weights_clicks:
            return shares
        found, confidence = weighed.found, weighed.loss_weight
        shares["click_rate"] = weighted_mean(batch.labels, batch.sample_weight, weighed.total_weight)
        shares["ad_gate_loss"] = found.gate_loss
        shares["power_sums"] = power_sums(confidence, found.click_weight)
        shares["signed_maxima"] = in_own_row(signed_maxima(confidence, found.click_weight))
        shares["drift"] = tf.constant(0.0)
        if self.ad_gate is not None and self.config.ad_gate.objective == "residual":
            error = found.correction + found.teacher_score - 1.0
            shares["drift"] = weighted_mean(error, found.click_weight, found.total_click_weight)
        return shares

    def watch(self, seen: Mapping[str, Any], batch: Batch, weighed: Weighed) -> None:
        if self._range is None:  # Clicks are not weighted.
            return super().watch(seen, batch, weighed)
        rows, clicks, found = weighed.total_weight, weighed.found.total_click_weight, weighed.found
        click_share = effective_click_share(*seen["power_sums"])
        self._update_guards(seen, click_share, batch.step)
        self._range.update_state(seen["signed_maxima"])
        for means in self._per_group:
            values = weighed.loss_weight, found.correction
            means.update_state(batch.features[means.group.name], values, found.click_weight)
        seen = {**seen, "effective_click_share": click_share}
        counts = [clicks if name in _WATCHED_CLICKS else rows for name in self.watched]
        return self._means.update_state([seen[name] for name in self.watched], counts)

    def _update_guards(self, seen: Mapping[str, Any], click_share: tf.Tensor, step: tf.Tensor) -> None:
        self.guard_state.update(
            mean_ctr=seen["mean_ctr"],
            click_rate=seen["click_rate"],
            click_share=click_share,
            drift=tf.abs(seen["drift"]),
            is_warming_up=step < self.config.resolved_loss_warmup_steps,
            has_warmup=self.config.resolved_loss_warmup_steps > 0,
        )

    @property
    def _only_in_training(self) -> set[str]:
        return _ONLY_IN_TRAINING


class _Found(NamedTuple):
    """The values by which a batch came by its confidence: [batch], or scalars.

    ``total_click_weight`` is a sum over the global batch, ``gate_loss`` is the replica's share.
    """

    click_weight: tf.Tensor
    total_click_weight: tf.Tensor
    teacher_score: tf.Tensor
    correction: tf.Tensor
    gate_loss: tf.Tensor


def _step_seed(step: tf.Tensor) -> tf.Tensor:
    """A seed per step for the placebos' permutations."""
    return tf.stack([tf.constant(0, tf.int64), tf.cast(step, tf.int64)])
