"""The state of a run on disk: saved as often as asked, found again after a kill, exact to the bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from clsd_tf.commands.console import warn
from clsd_tf.commands.interruption import Sigterm, TrainingInterruptedError
from clsd_tf.methods.clsd import ClsdModel
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.config import TrainConfig

_PREFIX = "ckpt"
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# What TensorFlow raises for files that are missing, cut off or changed, and for values of another shape.
_UNREADABLE = (tf.errors.OpError, IndexError, ValueError, DecodeError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class Checkpoints:
    """Checkpoints of a state in one directory, of which the newest stay.

    One counts from the moment that TensorFlow names it in the file ``checkpoint``, the last thing it writes: a kill in
    the middle of a save leaves the earlier ones as they are.

    Args:
      directory: theirs alone.
      to_keep: how many stay, >= 1.
      is_chief: False for workers that must take part in a save, whose files nobody reads: theirs are removed.
      state: what is saved, by name: anything that ``tf.train.Checkpoint`` takes.

    Raises:
      ArtifactError: there are checkpoints, but the list of them cannot be read.
    """

    def __init__(self, directory: pathlib.Path, *, to_keep: int, is_chief: bool = True, **state: Any):
        self._directory = directory
        self._is_chief = is_chief
        self._checkpoint = tf.train.Checkpoint(**state)
        self._checkpoint.save_counter.read_value()  # Made now, by all workers: the chief's save would wait for them.
        try:
            self._manager = tf.train.CheckpointManager(
                self._checkpoint, str(directory), max_to_keep=to_keep, checkpoint_name=_PREFIX
            )
        except ValueError as error:
            raise self._refusal(_first_line(error)) from error

    def restore(self) -> bool:
        """Restores the newest checkpoint that can be read; False if there is none at all.

        Raises:
          ArtifactError: there are some, and none can be read, or they hold another state.
        """
        errors = []
        for path in self._newest_first():
            try:
                self._checkpoint.restore(path).assert_existing_objects_matched()
            except _UNREADABLE as error:
                errors.append(f"{path}: {_first_line(error)}")
            except AssertionError as error:
                raise self._refusal(f"{path} holds another state: {_first_line(error)}") from error
            else:
                if errors:
                    warn(f"a checkpoint cannot be read; going on from the one before it. Received: {errors[0]}")
                self._remove_what_kills_left()
                return True
        if errors or (self._directory / "checkpoint").exists():
            raise self._refusal(errors[0] if errors else f"{self._directory / 'checkpoint'}, which names none")
        self._remove_what_kills_left()
        return False

    def save(self, step: int) -> None:
        """Saves the state under the number ``step``.

        Raises:
          CheckpointError: the directory cannot be written, or its disk is full.
        """
        try:
            if self._is_chief:
                self._manager.save(checkpoint_number=step)
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    self._checkpoint.write(f"{scratch}/{_PREFIX}")
        except (tf.errors.OpError, OSError) as error:
            raise CheckpointError(
                f"a checkpoint of step {step:,} could not be written to {self._directory}. "
                f"Received: {_first_line(error)}. The earlier ones are kept: free the disk, then start the same "
                "command again"
            ) from error

    def _newest_first(self) -> list[str]:
        found = [self._manager.latest_checkpoint, *reversed(self._manager.checkpoints)]
        return [path for path in dict.fromkeys(found) if path is not None]

    def _refusal(self, received: str) -> ArtifactError:
        return ArtifactError(
            f"the checkpoints of a run must be readable. Received: {received}. Put the files back, or remove "
            f"{self._directory} to train from the start"
        )

    def _remove_what_kills_left(self) -> None:
        """Files of saves that were killed: the manager does not know them and would keep them for ever."""
        if not self._is_chief:
            return
        known = {pathlib.Path(path).name for path in self._newest_first()}
        for path in self._directory.glob(f"{_PREFIX}-*"):
            if path.is_dir() or path.name.split(".")[0] not in known:
                _remove(path)


class RunState(tf.train.experimental.PythonState):
    """What a run knows beside its variables. One text in the checkpoint, so that nothing of it can be out of step.

    Attributes:
      epoch: the running one, from 0.
      steps_done: optimizer steps of it.
      best_epoch: the best so far; -1 as long as none competed.
      best_auc: its validation AUC; -1 as long as none competed.
      epochs_without_gain: since the best one.
      history: of the finished epochs.
    """

    def __init__(self):
        self.epoch = 0
        self.steps_done = 0
        self.best_epoch = -1
        self.best_auc = -1.0
        self.epochs_without_gain = 0
        self.history: list[dict[str, Any]] = []

    def serialize(self) -> str:
        names = ("epoch", "steps_done", "best_epoch", "best_auc", "epochs_without_gain", "history")
        return json.dumps({name: getattr(self, name) for name in names})

    def deserialize(self, string_value: bytes) -> None:
        for name, value in json.loads(string_value).items():
            setattr(self, name, value)


class CheckpointAndStop(tf.keras.callbacks.Callback):
    """Checkpoints a run, keeps the best weights by ``val_auc``, and stops when they get no better or on SIGTERM.

    Epochs that end within loss warm-up do not compete: their weights are those of plain BCE. Without patience, the last
    epoch counts as the best, and nothing stops.

    SIGTERM ends the run after the step that is running, or, where that was an epoch's last, after its validation.

    Args:
      work_dir: where checkpoints, history and best weights go.
      config: how often, how many, and how patient.
      steps_per_epoch: optimizer steps of an epoch.
      first_counted_step: optimizer steps before an epoch may count as best.
      sigterm: whether to stop.
      is_chief: as for ``Checkpoints``; only the chief writes history and best weights.
    """

    _supports_tf_logs = True  # Nothing is copied to Python at each step.

    def __init__(
        self,
        work_dir: WorkDir,
        config: TrainConfig,
        *,
        steps_per_epoch: int,
        first_counted_step: int,
        sigterm: Sigterm,
        is_chief: bool = True,
    ):
        super().__init__()
        self._work_dir = work_dir
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._first_counted_step = first_counted_step
        self._sigterm = sigterm
        self._is_chief = is_chief
        self._interrupted_epoch: list[tuple[tf.Variable, Any]] = []
        self._stop_is_granted = False
        self.state = RunState()

    def resume(self, model: ClsdModel) -> None:
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
        self._remove_weights()

    @property
    def is_exhausted(self) -> bool:
        """Whether patience has run out."""
        patience = self._config.patience_epochs
        return patience is not None and self.state.epochs_without_gain >= patience

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

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        step = int(self.model.optimizer.iterations.numpy())
        competes = step > self._first_counted_step
        if competes:
            self._compete(epoch, logs["val_auc"])
        numbers = {name: _json_number(value) for name, value in logs.items()}
        self.state.history.append({"epoch": epoch, "competes": competes, **numbers})
        self.state.epoch, self.state.steps_done = epoch + 1, 0
        # Several processes cannot agree here on a new request: in the next epoch's first step.
        is_asked = self._sigterm.received and not self.model.requests.are_shared
        self._save(step, self._stop_is_granted or is_asked)
        if self.is_exhausted:
            self.model.stop_training = True

    def _save(self, step: int, stop: bool) -> None:
        self._checkpoints.save(step)
        self._saved_at = time.monotonic()
        if not self.state.steps_done:
            self._write_history()
            self._remove_weights()
        if stop:
            raise TrainingInterruptedError(
                f"stopped by SIGTERM and saved: epoch {self.state.epoch + 1}, {self.state.steps_done:,} of "
                f"{self._steps_per_epoch:,} steps done, in {self._work_dir.path}. Start the same command again to go on"
            )

    def _write_history(self) -> None:
        path, history = self._work_dir.history, self.state.history
        if self._is_chief and not (path.exists() and read_json(path) == history):
            write_json(path, history)

    def _remove_weights(self) -> None:
        """Removes weights of epochs that no checkpoint calls the best: replaced since, or of a killed run."""
        if not self._is_chief:
            return
        files, best = self._work_dir.weights_files, self.state.best_epoch
        # Where the newest checkpoint cannot be read, one before it needs those that were the best then.
        kept = sorted(epoch for epoch in files if epoch <= best)[-self._config.checkpoints_to_keep :]
        for epoch in files.keys() - set(kept):
            for path in files[epoch]:
                _remove(path)

    def _compete(self, epoch: int, val_auc: float | None) -> None:
        if val_auc is None:
            raise ValueError(
                "the validation split needs clicks and non-clicks of positive sample weight. Received: no AUC. "
                "Change the spec's split or weights"
            )
        if self._config.patience_epochs is None or val_auc > self.state.best_auc:
            self.state.best_epoch, self.state.best_auc, self.state.epochs_without_gain = epoch, float(val_auc), 0
            # Beside those that the newest checkpoint names: a killed epoch is repeated, and may then not be the best.
            if self._is_chief:
                best_weights(self.model).write(str(self._work_dir.weights_of(epoch)))
        else:
            self.state.epochs_without_gain += 1


def best_weights(model: ClsdModel) -> tf.train.Checkpoint:
    """What is kept of the best epoch: backbone and AdGate, without optimizers."""
    parts = {"backbone": model.backbone}
    if model.ad_gate is not None:
        parts["ad_gate"] = model.ad_gate
    return tf.train.Checkpoint(**parts)


def read_best_weights(model: ClsdModel, work_dir: WorkDir) -> None:
    """Gives a model the best weights of a run.

    Raises:
      ArtifactError: they are missing or damaged, or those of another model.
    """
    with explaining_damage(str(work_dir.best_weights)):
        best_weights(model).read(str(work_dir.best_weights)).assert_consumed()


@contextlib.contextmanager
def explaining_damage(path: str) -> Iterator[None]:
    """Raises:
    ArtifactError: the checkpoint of a finished run, which is read within, is missing or damaged, or another model's.
    """
    try:
        yield
    except (*_UNREADABLE, AssertionError) as error:
        raise ArtifactError(
            f"the weights of a run must be readable. Received: {path}: {_first_line(error)}. Put the files back, or "
            "train that run again in a new --work_dir"
        ) from error


def work_fingerprint(work_dir: WorkDir, config: TrainConfig) -> str:
    """16 hex digits over what a run has become: settings, what it was trained on, lineage, best weights, calibration.

    The same for runs that gave the same, however often they were killed, saved, and in what process: names of variables
    count what a process has made before, the paths that lead to them in the model do not.
    """
    digest = hashlib.sha256(json.dumps(config.result_settings, sort_keys=True).encode())
    for path in (work_dir.trained_on, work_dir.lineage, work_dir.calibration):
        if path.exists():
            digest.update(path.name.encode() + path.read_bytes())
    weights = tf.train.load_checkpoint(str(work_dir.best_weights))
    for name in sorted(weights.get_variable_to_shape_map()):
        if name != _OBJECT_GRAPH:
            digest.update(name.encode() + weights.get_tensor(name).tobytes())
    return digest.hexdigest()[:16]


def random_generators(model: tf.keras.Model) -> list[tf.random.Generator]:
    """Those of Dropout and other random Keras layers, which Keras leaves out of its checkpoints.

    Layers have one if they were made after ``enable_tf_random_generator``, as ``assembly.build_model`` sees to.
    """
    layers = [layer for layer in model.submodules if isinstance(layer, tf.keras.__internal__.layers.BaseRandomLayer)]
    for layer in layers:
        layer._random_generator._maybe_init()  # Keras waits for the first call, which may be in training only.
    found = [layer._random_generator._generator for layer in layers]
    return [generator for generator in found if generator is not None]


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _json_number(value: Any) -> float | None:
    """NaN has no place in JSON: a group without a click has no mean."""
    number = float(value)
    return number if math.isfinite(number) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
