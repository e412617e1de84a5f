"""Guards: training stops when confidence goes wrong, instead of writing a model that looks finished."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from clsd_tf.distributed.replicas import SAME_EVERYWHERE
from clsd_tf.methods.clsd.config import GuardConfig
from clsd_tf.methods.method import MethodGuardError

_UNTRAINED_CTR = 0.5
_MOMENTUM = 0.98  # Moving means over about the last 50 steps.
_CHECK_EVERY_STEPS = 20
_CTR, _REFERENCE, _CLICK_SHARE, _DRIFT = range(4)


class ConfidenceGuardError(MethodGuardError):
    """Confidence collapsed: predictions, clicks or AdGate left their range."""


class GuardState(tf.Module):
    """Moving means of what the guards look at, updated inside the training step.

    The reference of mean ctr follows the smaller of mean ctr and click rate until loss warm-up ends, and then stays:
    an untrained model that starts at 0.5 would otherwise seem to collapse while it learns a low click rate. Without
    loss warm-up it is the click rate throughout, or 0.5 where that is less.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums = tf.Variable(tf.zeros([4]), trainable=False, name="guard_sums", **SAME_EVERYWHERE)
        self._weight = tf.Variable(0.0, trainable=False, name="guard_weight", **SAME_EVERYWHERE)
        self._reference = tf.Variable(0.0, trainable=False, name="guard_reference", **SAME_EVERYWHERE)

    def update(
        self,
        *,
        mean_ctr: tf.Tensor,
        click_rate: tf.Tensor,
        click_share: tf.Tensor,
        drift: tf.Tensor,
        is_warming_up: tf.Tensor,
        has_warmup: bool,
    ) -> None:
        """Takes in a training step; tensors are scalars over the global batch.

        Args:
          mean_ctr: in [0, 1].
          click_rate: likewise.
          click_share: of ``effective_click_share``, in (0, 1].
          drift: distance of AdGate's mean correction from 1 - the mean teacher score, >= 0.
          is_warming_up: bool, whether the step came before loss warm-up ended.
          has_warmup: whether the run has a loss warm-up.
        """
        reference = tf.minimum(click_rate, mean_ctr if has_warmup else _UNTRAINED_CTR)
        now = tf.stack([mean_ctr, reference, click_share, drift])
        # Sums over their weight, so that the first batch does not count for fifty.
        sums = self._sums.assign(_MOMENTUM * self._sums + (1.0 - _MOMENTUM) * now)
        weight = self._weight.assign(_MOMENTUM * self._weight + (1.0 - _MOMENTUM))
        follows = tf.logical_or(is_warming_up, not has_warmup)
        self._reference.assign(tf.where(follows, sums[_REFERENCE] / weight, self._reference))

    def begin(self, reference: float) -> None:
        """Sets the ``reference`` of mean ctr, for training that begins behind loss warm-up."""
        self._reference.assign(reference)

    def check(self, limits: GuardConfig, step: int) -> None:
        """Compares the moving means with the limits.

        Args:
          limits: of the config.
          step: of the optimizer, for the message.

        Raises:
          ConfidenceGuardError: names the limit, what was seen and what to do.
        """
        values = self._sums.numpy() / max(float(self._weight.numpy()), 1e-12)
        ctr, reference = values[_CTR], float(self._reference.numpy())
        if ctr < limits.min_ctr_ratio * reference:
            raise ConfidenceGuardError(
                f"mean ctr must not fall below {limits.min_ctr_ratio:g} of what it was at the end of loss warm-up "
                "(without one: of the click rate). "
                f"Received: {ctr:.4f} after {reference:.4f}, at step {step}. Weighting clicks pulls predictions "
                "down: lower method.kappa, method.lambda or method.mu, or use a cross_fit teacher"
            )
        if values[_CLICK_SHARE] < limits.min_effective_click_share:
            raise ConfidenceGuardError(
                "confidence must not collapse onto few clicks. Received: an effective sample size of "
                f"{values[_CLICK_SHARE]:.1%} of the clicks, at step {step}. Allowed: at least "
                f"{limits.min_effective_click_share:.0%}. Lower method.kappa or method.max_confidence"
            )
        if values[_DRIFT] > limits.max_ad_gate_drift:
            raise ConfidenceGuardError(
                "AdGate's mean correction over clicks must stay near 1 - the mean teacher score. Received: a distance "
                f"of {values[_DRIFT]:.2f}, at step {step}. Allowed: {limits.max_ad_gate_drift:g}. "
                "Lower method.ad_gate.learning_rate, or check the numeric features that AdGate reads"
            )


class ConfidenceGuard(tf.keras.callbacks.Callback):
    """Checks the guards every 20 optimizer steps and after each epoch; ``ClsdModel.fit`` adds it by itself."""

    _supports_tf_logs = True  # No need to copy the logs to Python for it.

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        # Not by ``batch``, which Keras counts anew in a resumed epoch.
        if int(self.model.optimizer.iterations.numpy()) % _CHECK_EVERY_STEPS == 0:
            self._check()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._check()

    def _check(self) -> None:
        self.model.guard_state.check(self.model.config.guards, int(self.model.optimizer.iterations.numpy()))
