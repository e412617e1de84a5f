"""Checkpoints: the state of a run on disk, saved as often as asked, found again after a kill, exact to the bit."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from clsd_tf.commands.console import warn
from clsd_tf.storage.files import ArtifactError, remove

_PREFIX = "ckpt"
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
                remove(path)


class RunState(tf.train.experimental.PythonState):
    """The state of a run beside its variables. One text in the checkpoint, so that nothing of it can be out of step.

    Attributes:
      epoch: the running one, from 0.
      steps_done: optimizer steps of it.
      best_epoch: the best so far; -1 as long as none competed.
      best_value: its value of the objective; None as long as none competed.
      epochs_without_gain: since the best one.
      history: of the finished epochs.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.steps_done = 0
        self.best_epoch = -1
        self.best_value: float | None = None
        self.epochs_without_gain = 0
        self.history: list[dict[str, Any]] = []

    def serialize(self) -> str:
        names = ("epoch", "steps_done", "best_epoch", "best_value", "epochs_without_gain", "history")
        return json.dumps({name: getattr(self, name) for name in names})

    def deserialize(self, string_value: bytes) -> None:
        for name, value in json.loads(string_value).items():
            setattr(self, "best_value" if name == "best_auc" else name, value)  # As version 0.1 called it.


@contextlib.contextmanager
def explaining_damage(path: str) -> Iterator[None]:
    """Explains errors of reading the checkpoint of a finished run within the block.

    Args:
      path: of the checkpoint, for the message.

    Yields:
      Once.

    Raises:
      ArtifactError: the checkpoint is missing or damaged, or another model's.
    """
    try:
        yield
    except (*_UNREADABLE, AssertionError) as error:
        raise ArtifactError(
            f"the weights of a run must be readable. Received: {path}: {_first_line(error)}. Put the files back, or "
            "train that run again in a new --work_dir"
        ) from error


def random_generators(model: tf.keras.Model) -> list[tf.random.Generator]:
    """Finds the generators of Dropout and other random Keras layers, which Keras leaves out of its checkpoints.

    Layers have one if they were made after ``enable_tf_random_generator``, as ``assembly.build_model`` sees to.

    Args:
      model: with all its layers.

    Returns:
      A generator for each such layer, in the order of layers.
    """
    layers = [layer for layer in model.submodules if isinstance(layer, tf.keras.__internal__.layers.BaseRandomLayer)]
    for layer in layers:
        layer._random_generator._maybe_init()  # Keras waits for the first call, which may be in training only.
    found = [layer._random_generator._generator for layer in layers]
    return [generator for generator in found if generator is not None]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
