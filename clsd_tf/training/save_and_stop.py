"""The callback that saves a run as often as asked, ends it on SIGTERM or without hope, and lets epochs compete."""

from __future__ import annotations

import math
import time
from typing import Any

import tensorflow as tf

from clsd_tf.commands.interruption import Sigterm, TrainingInterruptedError
from clsd_tf.methods import method_of
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.storage.files import read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.best_epoch import BestEpoch
from clsd_tf.training.checkpoints import Checkpoints, RunState, random_generators
from clsd_tf.training.config import TrainConfig


class SaveAndStop(tf.keras.callbacks.Callback):
    """Checkpoints a run, and stops it when epochs get no better or on SIGTERM.

    Epochs that end before the model's ``first_competing_step`` do not compete for the best weights. SIGTERM ends the
    run after the step that is running, or, where that was an epoch's last, after its validation.

    Args:
      work_dir: where checkpoints, history and best weights go.
      config: how often, how many, and how patient.
      steps_per_epoch: optimizer steps of an epoch.
      sigterm: whether to stop.
      is_chief: as for ``Checkpoints``; only the chief writes history and best weights.
    """

    _supports_tf_logs = True  # Nothing is copied to Python at each step.

    def __init__(
        self, work_dir: WorkDir, config: TrainConfig, *, steps_per_epoch: int, sigterm: Sigterm, is_chief: bool = True
    ):
        super().__init__()
        self._work_dir = work_dir
        self._config = config
        self._objective = method_of(config.method).objective
        self._steps_per_epoch = steps_per_epoch
        self._sigterm = sigterm
        self._is_chief = is_chief
        self._best = BestEpoch(
            work_dir, self._objective, config.patience_epochs, config.checkpoints_to_keep, is_chief=is_chief
        )
        self._interrupted_epoch: list[tuple[tf.Variable, Any]] = []
        self._stop_is_granted = False
        self.state = RunState()

    def resume(self, model: MethodModel) -> None:
        """Restores the newest checkpoint into ``model`` and ``state``, if there is one."""
        self._checkpoints = Checkpoints(
            self._work_dir.checkpoints,
            to_keep=self._config.checkpoints_to_keep,
            is_chief=self._is_chief,
            model=model,
            random_generators=random_generators(model),
            run=self.state,
        )
        if self._checkpoints.restore():
            self._write_history()  # A kill may have come between the checkpoint and the file.
            if self.state.steps_done:
                self._interrupted_epoch = [(variable, variable.numpy()) for variable in model.epoch_variables]
        self._best.remove_others(self.state)

    @property
    def is_finished(self) -> bool:
        """True if all epochs are done, or patience has run out."""
        return self.state.epoch >= self._config.max_epochs or self._best.is_exhausted(self.state)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._saved_at = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._steps_before_epoch = int(self.model.optimizer.iterations.numpy()) - self.state.steps_done
        # Keras has just reset the metrics.
        for variable, value in self._interrupted_epoch:
            variable.assign(value)
        self._interrupted_epoch = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        step = int(self.model.optimizer.iterations.numpy())
        self.state.steps_done = step - self._steps_before_epoch
        save, stop = self.model.requests.granted(self._is_due(step), self._sigterm.received)
        self._stop_is_granted = stop
        # The end of the epoch saves by itself.
        if self.state.steps_done < self._steps_per_epoch and (save or stop):
            self._save(step, stop)

    def _is_due(self, step: int) -> bool:
        every_steps, every_minutes = self._config.checkpoint_every_steps, self._config.checkpoint_every_minutes
        if every_steps is not None and step % every_steps == 0:
            return True
        return every_minutes is not None and time.monotonic() - self._saved_at >= 60 * every_minutes

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        step = int(self.model.optimizer.iterations.numpy())
        competes = step > self.model.first_competing_step
        if competes:
            self._best.compete(self.model, self.state, epoch, logs[self._objective.log_name])
        numbers = {name: _json_number(value) for name, value in logs.items()}
        self.state.history.append({"epoch": epoch, "competes": competes, **numbers})
        self.state.epoch, self.state.steps_done = epoch + 1, 0
        # Several processes cannot agree here on a new request: in the next epoch's first step.
        is_asked = self._sigterm.received and not self.model.requests.are_shared
        self._save(step, self._stop_is_granted or is_asked)
        if self._best.is_exhausted(self.state):
            self.model.stop_training = True

    def _save(self, step: int, stop: bool) -> None:
        self._checkpoints.save(step)
        self._saved_at = time.monotonic()
        if not self.state.steps_done:
            self._write_history()
            self._best.remove_others(self.state)
        if stop:
            raise TrainingInterruptedError(
                f"stopped by SIGTERM and saved: epoch {self.state.epoch + 1}, {self.state.steps_done:,} of "
                f"{self._steps_per_epoch:,} steps done, in {self._work_dir.path}. Start the same command again to go on"
            )

    def _write_history(self) -> None:
        path, history = self._work_dir.history, self.state.history
        if self._is_chief and not (path.exists() and read_json(path) == history):
            write_json(path, history)


def _json_number(value: Any) -> float | None:
    """NaN has no place in JSON: a group without a click has no mean."""
    number = float(value)
    return number if math.isfinite(number) else None
