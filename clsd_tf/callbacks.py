"""Keras callbacks of the training job: validation AUC, checkpoints with early stopping, NaN stop, progress."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import rich.progress
import tensorflow as tf

from clsd_tf import metrics
from clsd_tf.artifacts import WorkDir, read_json, write_json
from clsd_tf.console import console
from clsd_tf.throughput import Throughput

_SCALARS_EVERY_STEPS = 100
_BAR_UPDATE_SECONDS = 0.1  # Reading loss and counters at every step would slow small models down.


class TrainingDivergedError(RuntimeError):
    """The loss is not a finite number."""


class StopOnNonFiniteLoss(tf.keras.callbacks.Callback):
    """Ends training at the first loss that is NaN or infinite, naming the step."""

    _supports_tf_logs = True  # Keras then hands over tensors: only the loss is copied to Python at each step.

    def on_train_batch_end(self, batch: int, logs: dict[str, tf.Tensor] | None = None) -> None:
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            step = int(self.model.optimizer.iterations)
            raise TrainingDivergedError(
                f"the loss must be finite. Received: loss={loss} at step {step}. "
                "Lower learning_rate, or look at the inputs of this step for extreme values"
            )


class ValidationAuc(tf.keras.callbacks.Callback):
    """Adds the exact validation AUC and log loss to the logs of each epoch, for the callbacks behind it.

    Args:
      batches: (features, labels, sample_weight), in a fixed order.
      labels: their labels, [num_rows].
      sample_weight: their weights, [num_rows].
    """

    def __init__(self, batches: tf.data.Dataset, labels: np.ndarray, sample_weight: np.ndarray):
        super().__init__()
        self._batches = batches
        self._labels = labels
        self._sample_weight = sample_weight

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        pctr = self.model.predict(self._batches, verbose=0)
        logs["val_auc"] = metrics.auc(self._labels, pctr, self._sample_weight)
        logs["val_log_loss"] = metrics.log_loss(self._labels, pctr, self._sample_weight)


class CheckpointAndStop(tf.keras.callbacks.Callback):
    """Keeps the best weights by ``val_auc``, stops when they get no better, and checkpoints each epoch for a resume.

    Epochs that end within loss warm-up do not compete: their weights are those of plain BCE. Without patience, the last
    epoch counts as the best, and nothing stops.

    Args:
      work_dir: where checkpoints, history and best weights go.
      patience_epochs: stop after this many epochs without a better AUC; None for a fixed number of epochs.
      first_counted_step: optimizer steps before an epoch may count as best.
    """

    def __init__(self, work_dir: WorkDir, *, patience_epochs: int | None, first_counted_step: int):
        super().__init__()
        self._work_dir = work_dir
        self._patience_epochs = patience_epochs
        self._first_counted_step = first_counted_step
        self._next_epoch = tf.Variable(0, dtype=tf.int64)
        self._best_auc = tf.Variable(-1.0, dtype=tf.float64)
        self._epochs_without_gain = tf.Variable(0, dtype=tf.int64)
        self.history: list[dict[str, Any]] = []

    def resume(self, model: tf.keras.Model) -> int:
        """Restores the newest checkpoint into ``model``, if there is one, and returns the epoch to start with."""
        state = tf.train.Checkpoint(
            model=model,
            next_epoch=self._next_epoch,
            best_auc=self._best_auc,
            epochs_without_gain=self._epochs_without_gain,
        )
        self._manager = tf.train.CheckpointManager(state, str(self._work_dir.checkpoints), max_to_keep=2)
        if self._manager.restore_or_initialize():
            next_epoch = int(self._next_epoch)
            self.history = read_json(self._work_dir.history)[:next_epoch]
            return next_epoch
        return 0

    @property
    def is_exhausted(self) -> bool:
        """Whether patience had run out when the run was last checkpointed."""
        return self._patience_epochs is not None and int(self._epochs_without_gain) >= self._patience_epochs

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        competes = int(self.model.optimizer.iterations) > self._first_counted_step
        if competes:
            self._compete(logs["val_auc"])
        self.history.append(
            {"epoch": epoch, "competes": competes, **{name: _json_number(value) for name, value in logs.items()}}
        )
        write_json(self._work_dir.history, self.history)
        self._next_epoch.assign(epoch + 1)
        self._manager.save()
        if self.is_exhausted:
            self.model.stop_training = True

    def _compete(self, val_auc: float | None) -> None:
        if val_auc is None:
            raise ValueError(
                "the validation split needs clicks and non-clicks of positive sample weight. Received: no AUC. "
                "Change the spec's split or weights"
            )
        if self._patience_epochs is None or val_auc > float(self._best_auc):
            self._best_auc.assign(val_auc)
            self._epochs_without_gain.assign(0)
            best_weights(self.model).write(str(self._work_dir.best_weights))
        else:
            self._epochs_without_gain.assign_add(1)


def best_weights(model: tf.keras.Model) -> tf.train.Checkpoint:
    """What is kept of the best epoch: backbone and AdGate, without optimizers."""
    parts = {"backbone": model.backbone}
    if model.ad_gate is not None:
        parts["ad_gate"] = model.ad_gate
    return tf.train.Checkpoint(**parts)


def _json_number(value: Any) -> float | None:
    """NaN has no place in JSON: a group without a click has no mean."""
    number = float(value)
    return number if math.isfinite(number) else None


class Scalars(tf.keras.callbacks.Callback):
    """Writes logs and throughput as TensorBoard scalars, every 100 optimizer steps and after each epoch.

    Keras' TensorBoard callback walks through all logs at every step, even when it writes per epoch: with a mean per
    user group that took a third of a small model's step. The values are means since the epoch began.

    Args:
      work_dir: where the events go.
      batch_size: examples per step.
    """

    _supports_tf_logs = True  # Nothing is copied to Python at the steps between.

    def __init__(self, work_dir: WorkDir, *, batch_size: int):
        super().__init__()
        self._writer = tf.summary.create_file_writer(str(work_dir.tensorboard))
        self._throughput = Throughput(batch_size)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._throughput.begin(self.model)
        self._hundreds = int(self.model.optimizer.iterations) // _SCALARS_EVERY_STEPS

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._throughput.step()
        hundreds = int(self.model.optimizer.iterations) // _SCALARS_EVERY_STEPS
        if hundreds > self._hundreds:
            self._hundreds = hundreds
            self._write(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._write(logs)

    def _write(self, logs: dict[str, Any]) -> None:
        with self._writer.as_default(step=int(self.model.optimizer.iterations)):
            for name, value in {**logs, **self._throughput.read()}.items():
                tf.summary.scalar(name, value)
        self._writer.flush()


class ProgressBar(tf.keras.callbacks.Callback):
    """A live bar with loss, throughput and the time left in the epoch, then one line per epoch.

    Args:
      title: what is being trained.
      steps_per_epoch: optimizer steps of an epoch.
      batch_size: examples per step.
    """

    _supports_tf_logs = True

    def __init__(self, title: str, *, steps_per_epoch: int, batch_size: int):
        super().__init__()
        self._title = title
        self._steps = steps_per_epoch
        self._throughput = Throughput(batch_size)
        self._next_update = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._throughput.begin(self.model)
        self._bar = rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(),
            rich.progress.TextColumn("loss {task.fields[loss]:.4f}  {task.fields[throughput]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar.start()
        done = int(self.model.optimizer.iterations) % self._steps
        self._task = self._bar.add_task(
            f"{self._title} epoch {epoch + 1}", total=self._steps, completed=done, loss=0.0, throughput=""
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._throughput.step()
        if not console.is_terminal or time.monotonic() < self._next_update:
            return
        self._next_update = time.monotonic() + _BAR_UPDATE_SECONDS
        done = (int(self.model.optimizer.iterations) - 1) % self._steps + 1
        self._bar.update(self._task, completed=done, loss=float(logs["loss"]), throughput=self._described())

    def _described(self) -> str:
        found = self._throughput.read()
        text = f"{found['examples_per_second']:,.0f} examples/s"
        if "input_wait_share" in found:
            text += f", {found['input_wait_share']:.0%} waiting for input"
        return text

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._bar.stop()
        console.print(
            f"{self._title} epoch {epoch + 1}: loss {logs['loss']:.4f}, validation AUC {logs['val_auc']:.4f}, "
            f"{self._described()}",
            soft_wrap=True,
        )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._bar.stop()
