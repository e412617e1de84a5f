"""A training run from start to end: prepare -> teachers -> fit -> calibrate -> finish."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import tensorflow as tf

from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.distributed.strategies import explaining_lost_workers, in_turn, is_chief, wait_for_all
from clsd_tf.layers.calibration import fit_calibration
from clsd_tf.spec.model_inputs import GroupInput
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import predict_logits
from clsd_tf.training.best_epoch import work_fingerprint
from clsd_tf.training.claim import claim
from clsd_tf.training.config import TrainConfig
from clsd_tf.training.fit import PreparedRun, fit, prepare
from clsd_tf.training.teachers.stored import scores_of


def train(
    dataset: DatasetDir,
    config: TrainConfig,
    work_dir: WorkDir,
    *,
    title: str | None = "train",
    init_from: WorkDir | None = None,
    strategy: tf.distribute.Strategy | None = None,
) -> list[dict[str, Any]]:
    """Runs or resumes a training run; a finished one is left as it is.

    Args:
      dataset: what to train on.
      config: the run.
      work_dir: gets config, checkpoints, history, best weights, calibration, TensorBoard events and, last,
        ``_SUCCESS``.
      title: what progress lines call the run; None for no progress lines.
      init_from: a finished run to go on from, see ``warm_start``; None to begin anew, or to go on from a checkpoint.
      strategy: of ``strategies.create_strategy``. Every worker calls this, with a work directory that they share.

    Returns:
      The history: one dict per epoch.

    Raises:
      ArtifactError: the work directory belongs to another config, dataset or lineage; or ``init_from`` does not fit.
      TrainingDivergedError: the loss is not finite.
      MethodGuardError: a guard of the method ended training.
      ValueError: the config does not fit the dataset.
      WorkerLostError: another process of the cluster is gone.
    """
    if work_dir.is_complete:  # Before it is held: all processes of a cluster may look at once.
        claim(work_dir, config, dataset, init_from)
        return read_json(work_dir.history)
    own = work_dir.exclusive() if is_chief(strategy) else contextlib.nullcontext()
    with own, explaining_lost_workers(strategy):
        group = _calibration_group(dataset, config)
        run = prepare(dataset, config, work_dir, init_from=init_from, strategy=strategy)
        scores = _teacher_scores(run, title)
        history = fit(run, title=title, teacher_scores=scores)
        _calibrate(run, group)
        _finish(run)
    return history


def _teacher_scores(run: PreparedRun, title: str | None) -> dict[str, RowValues]:
    """Feature name -> scores. Of several workers, the chief alone trains a teacher; the others wait, and read them."""
    if run.keeper.is_finished:
        return {}
    scores = {}
    for teacher in run.config.teacher_runs:
        give = functools.partial(scores_of, run.dataset, run.config, teacher, title)
        scores[teacher.feature] = in_turn(run.strategy, give)
    return scores


def _calibration_group(dataset: DatasetDir, config: TrainConfig) -> GroupInput | None:
    name = config.calibration.user_group
    if name is None:
        return None
    groups = {group.name: group for group in dataset.inputs.groups}
    if name not in groups:
        raise ValueError(
            "calibration.user_group must be a user group of the spec. "
            f"Received: {name!r}. Allowed: {', '.join(groups) or 'none declared'}"
        )
    return groups[name]


def _calibrate(run: PreparedRun, group: GroupInput | None) -> None:
    """Fits the calibration of the method's first output on the validation split."""
    config, (output, *_) = run.config, run.method.outputs(run.config.method)
    if config.calibration.method == "none" or not output.is_calibrated:
        return
    assert output.label is not None, "a calibrated output predicts a label"
    names = [output.label, "sample_weight", *([group.name] if group else [])]
    columns = input_pipeline.read_columns(run.dataset, "validation", names)
    calibration = fit_calibration(
        config.calibration,
        predict_logits(run.model, run.dataset, "validation"),
        columns[output.label],
        columns["sample_weight"],
        columns[group.name] if group else None,
        group,
    )
    if run.is_chief:
        write_json(run.work_dir.calibration, calibration.to_dict())


def _finish(run: PreparedRun) -> None:
    if run.is_chief:
        run.work_dir.mark_complete(work_fingerprint(run.work_dir, run.config))
    wait_for_all(run.strategy)  # A worker that left early would look like one that was lost.
