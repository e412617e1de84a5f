"""The best epoch of a run: which it is, its weights on disk, and when there is no hope of a better one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.methods import method_of
from clsd_tf.methods.method import Objective
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.storage.files import remove
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.checkpoints import RunState, explaining_damage
from clsd_tf.training.config import TrainConfig

_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


class BestEpoch:
    """Keeps the weights of the epoch with the best value of the objective.

    Without patience, the last epoch counts as the best, and nothing stops.

    Args:
      work_dir: where weights go.
      objective: what is compared.
      patience_epochs: epochs without a better value before training stops; None for no end.
      to_keep: weights of how many epochs that were the best stay: as many as checkpoints.
      is_chief: only the chief writes.
    """

    def __init__(
        self, work_dir: WorkDir, objective: Objective, patience_epochs: int | None, to_keep: int, *, is_chief: bool
    ):
        self._work_dir = work_dir
        self._objective = objective
        self._patience = patience_epochs
        self._to_keep = to_keep
        self._is_chief = is_chief

    def compete(self, model: MethodModel, state: RunState, epoch: int, value: float | None) -> None:
        """Takes an epoch for the best one, or counts it as one without gain.

        Args:
          model: as it is at the end of the epoch.
          state: of the run; changed in place.
          epoch: from 0.
          value: of the objective; None where it is not defined.

        Raises:
          ValueError: it is not defined.
        """
        if value is None:
            raise ValueError(self._objective.missing)
        best = self._objective.worst if state.best_value is None else state.best_value
        if self._patience is not None and not self._objective.is_better(value, best):
            state.epochs_without_gain += 1
            return
        state.best_epoch, state.best_value, state.epochs_without_gain = epoch, float(value), 0
        # Beside those that the newest checkpoint names: a killed epoch is repeated, and may then not be the best.
        if self._is_chief:
            best_weights(model).write(str(self._work_dir.weights_of(epoch)))

    def is_exhausted(self, state: RunState) -> bool:
        """Returns whether patience has run out in the ``state`` of a run."""
        return self._patience is not None and state.epochs_without_gain >= self._patience

    def remove_others(self, state: RunState) -> None:
        """Removes weights of epochs that no checkpoint calls the best: replaced since, or of a killed run.

        Args:
          state: of the run.
        """
        if not self._is_chief:
            return
        files, best = self._work_dir.weights_files, state.best_epoch
        # Where the newest checkpoint cannot be read, one before it needs those that were the best then.
        kept = sorted(epoch for epoch in files if epoch <= best)[-self._to_keep :]
        for epoch in files.keys() - set(kept):
            for path in files[epoch]:
                remove(path)


def kept_epoch(history: Sequence[Mapping[str, Any]], config: TrainConfig) -> Mapping[str, Any]:
    """Finds the epoch whose weights a finished run kept: the best one, or without patience the last.

    Args:
      history: one dict per epoch.
      config: of the run.

    Returns:
      One of the dicts.
    """
    if config.patience_epochs is None:
        return history[-1]
    objective = method_of(config.method).objective
    best = max if objective.greater_is_better else min
    return best((entry for entry in history if entry["competes"]), key=lambda entry: entry[objective.log_name])


def best_weights(model: MethodModel) -> tf.train.Checkpoint:
    """Makes a checkpoint of what is kept of the best epoch: the parts of ``model`` that are served, without optimizers.

    Returns:
      A checkpoint to write or read.
    """
    return tf.train.Checkpoint(**model.parts)


def read_best_weights(model: MethodModel, work_dir: WorkDir) -> None:
    """Gives a model the best weights of a run.

    Args:
      model: built from the run's config; changed in place.
      work_dir: of the run.

    Raises:
      ArtifactError: they are missing or damaged, or those of another model.
    """
    with explaining_damage(str(work_dir.best_weights)):
        best_weights(model).read(str(work_dir.best_weights)).assert_consumed()


def work_fingerprint(work_dir: WorkDir, config: TrainConfig) -> str:
    """Fingerprints what a run has become: settings, what it was trained on, lineage, best weights, calibration.

    The same for runs that gave the same, however often they were killed, saved, and in what process: names of variables
    count what a process has made before, the paths that lead to them in the model do not.

    Args:
      work_dir: of a run that has ended.
      config: of the run.

    Returns:
      16 hex digits.
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
