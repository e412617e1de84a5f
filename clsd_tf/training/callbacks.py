"""Keras callbacks of the training job: validation, NaN stop, TensorBoard, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import rich.progress
import tensorflow as tf

from clsd_tf.commands.console import console
from clsd_tf.distributed.strategies import chiefs_value, is_multi_worker, is_parameter_server
from clsd_tf.methods.method import Objective
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.throughput import Throughput

_SCALARS_EVERY_STEPS = 100
_BAR_UPDATE_SECONDS = 0.1  # Reading loss and counters at every step would slow small models down.


class TrainingDivergedError(RuntimeError):
    """The loss is not a finite number."""


class StopOnNonFiniteLoss(tf.keras.callbacks.Callback):
    """Ends training at the first loss that is NaN or infinite, naming the step."""

    _supports_tf_logs = True  # Keras then hands over tensors: only the loss is copied to Python at each step.

    def on_train_batch_end(self, batch: int, logs: dict[str, tf.Tensor]) -> None:
        self._check(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        self._check(logs)  # A chief that schedules steps is told of no other.

    def _check(self, logs: dict[str, Any]) -> None:
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            step = int(self.model.optimizer.iterations.numpy())
            raise TrainingDivergedError(
                f"the loss must be finite. Received: loss={loss} at step {step}. "
                "Lower learning_rate, or look at the inputs of this step for extreme values"
            )


class ValidationMetrics(tf.keras.callbacks.Callback):
    """Adds what a method measures of the validation split to the logs of each epoch, for the callbacks behind it.

    Args:
      batches: (features, labels, sample_weight), in a fixed order.
      fields: record fields of the same rows, each [num_rows].
      measure: (fields, scores [num_rows]) -> name -> value; the logs get them as ``val_<name>``.
      strategy: of several workers, each predicts all rows, and the chief's values are those of all.
    """

    def __init__(
        self,
        batches: tf.data.Dataset,
        fields: Mapping[str, np.ndarray],
        measure: Callable[[Mapping[str, np.ndarray], np.ndarray], Mapping[str, float | None]],
        strategy: tf.distribute.Strategy | None = None,
    ):
        super().__init__()
        self._strategy = strategy
        self._batches = batches
        self._fields = fields
        self._measure = measure

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        for name, value in self._measure(self._fields, self._predict()).items():
            logs[f"val_{name}"] = chiefs_value(self._strategy, value)

    def _predict(self) -> np.ndarray:
        if not (is_multi_worker(self._strategy) or is_parameter_server(self._strategy)):
            return self.model.predict(self._batches, verbose=0)
        scores = tf.function(self.model, reduce_retracing=True)  # Keras would divide the rows among workers.
        return np.concatenate([scores(features).numpy() for features, _, _ in self._batches])


class Scalars(tf.keras.callbacks.Callback):
    """Writes logs and throughput as TensorBoard scalars, every 100 optimizer steps and after each epoch.

    Keras' TensorBoard callback goes through all logs at every step, even when it writes per epoch: with a mean per
    user group that took a third of a small model's step. The values are means since the epoch began. A resumed run
    writes the steps since its checkpoint again, with the same values.

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
        self._hundreds = int(self.model.optimizer.iterations.numpy()) // _SCALARS_EVERY_STEPS

    def on_train_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        self._throughput.step()
        hundreds = int(self.model.optimizer.iterations.numpy()) // _SCALARS_EVERY_STEPS
        if hundreds > self._hundreds:
            self._hundreds = hundreds
            self._write(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        self._write(logs)

    def _write(self, logs: dict[str, Any]) -> None:
        with self._writer.as_default(step=int(self.model.optimizer.iterations.numpy())):
            for name, value in {**logs, **self._throughput.read()}.items():
                tf.summary.scalar(name, value)
        self._writer.flush()


class ProgressBar(tf.keras.callbacks.Callback):
    """A live bar with loss, throughput and the time left in the epoch, then one line per epoch.

    Args:
      title: what is being trained.
      objective: which of the logs each epoch's line shows.
      steps_per_epoch: optimizer steps of an epoch.
      batch_size: examples per step.
    """

    _supports_tf_logs = True

    def __init__(self, title: str, objective: Objective, *, steps_per_epoch: int, batch_size: int):
        super().__init__()
        self._title = title
        self._objective = objective
        self._steps = steps_per_epoch
        self._throughput = Throughput(batch_size)
        self._next_update = 0.0
        self._bar: rich.progress.Progress | None = None

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
        done = self._steps - self.params["steps"]  # Of an epoch that was interrupted, Keras counts the rest.
        self._steps_before_epoch = int(self.model.optimizer.iterations.numpy()) - done
        self._task = self._bar.add_task(
            f"{self._title} epoch {epoch + 1}", total=self._steps, completed=done, loss=0.0, throughput=""
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        self._throughput.step()
        if not console.is_terminal or time.monotonic() < self._next_update:
            return
        self._next_update = time.monotonic() + _BAR_UPDATE_SECONDS
        assert self._bar is not None, "an epoch has begun"
        done = int(self.model.optimizer.iterations.numpy()) - self._steps_before_epoch
        self._bar.update(self._task, completed=done, loss=float(logs["loss"]), throughput=self._described())

    def _described(self) -> str:
        found = self._throughput.read()
        text = f"{found['examples_per_second']:,.0f} examples/s"
        if "input_wait_share" in found:
            text += f", {found['input_wait_share']:.0%} waiting for input"
        return text

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        self.close()
        console.print(
            f"{self._title} epoch {epoch + 1}: loss {logs['loss']:.4f}, "
            f"validation {self._objective.title} {logs[self._objective.log_name]:.4f}, "
            f"{self._described()}",
            soft_wrap=True,
        )

    def close(self) -> None:
        """Ends the bar, also of an epoch that did not reach its end: it hides the terminal's cursor."""
        if self._bar is not None:
            self._bar.stop()
