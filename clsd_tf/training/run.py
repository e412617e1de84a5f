"""A training run from start to end: teacher, fit, calibration, complete work directory."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.distributed.strategies import explaining_lost_workers, in_turn, is_chief, wait_for_all
from clsd_tf.layers.calibration import Calibration, fit_calibration
from clsd_tf.methods.clsd import ClsdModel
from clsd_tf.spec.model_inputs import GroupInput
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import predict_logits
from clsd_tf.training.checkpoints import work_fingerprint
from clsd_tf.training.config import TrainConfig
from clsd_tf.training.fit import claim, fit
from clsd_tf.training.teachers import teacher_scores


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
      strategy: of ``distribution.create_strategy``. Every worker calls this, with a work directory that they share.

    Returns:
      The history: one dict per epoch.

    Raises:
      ArtifactError: the work directory belongs to another config, dataset or lineage; or ``init_from`` does not fit.
      TrainingDivergedError: the loss is not finite.
      ConfidenceGuardError: confidence collapsed.
      ValueError: the config does not fit the dataset.
      WorkerLostError: another process of the cluster is gone.
    """
    if work_dir.is_complete:  # Before it is held: all processes of a cluster may look at once.
        claim(work_dir, config, dataset, init_from)
        return read_json(work_dir.history)
    own = work_dir.exclusive() if is_chief(strategy) else contextlib.nullcontext()
    with own, explaining_lost_workers(strategy):
        group = _calibration_group(dataset, config)
        model, history = fit(
            dataset,
            config,
            work_dir,
            title=title,
            init_from=init_from,
            row_weights=_intense_clicks_only(dataset) if config.clicks == "intense" else None,
            # Of several workers, the chief alone trains a teacher; the others wait, and read its scores.
            teacher_scores=lambda: in_turn(strategy, lambda: teacher_scores(dataset, config, title)),
            strategy=strategy,
        )
        if config.calibration.method != "none":
            calibration = _calibrated(model, dataset, config, group)
            if is_chief(strategy):
                write_json(work_dir.calibration, calibration.to_dict())
        if is_chief(strategy):
            work_dir.mark_complete(work_fingerprint(work_dir, config))
        wait_for_all(strategy)  # A worker that left early would look like one that was lost.
        return history


def _intense_clicks_only(dataset: DatasetDir) -> RowValues:
    """Weight 0 for clicks without the intensity label, 1 for all other rows."""
    if dataset.spec.intensity_label is None:
        raise ValueError("clicks=intense needs a spec with an intensity_label. Received: none. Use clicks=all")
    columns = input_pipeline.read_columns(dataset, "train", ["row_id", "label", "intensity_label"])
    is_weak_click = (columns["label"] > 0.5) & (columns["intensity_label"] < 0.5)
    return RowValues(columns["row_id"], (~is_weak_click).astype(np.float32))


def _calibration_group(dataset: DatasetDir, config: TrainConfig) -> GroupInput | None:
    groups = {group.name: group for group in dataset.inputs.groups}
    if config.calibration.user_group not in (None, *groups):
        raise ValueError(
            "calibration.user_group must be a user group of the spec. "
            f"Received: {config.calibration.user_group!r}. Allowed: {', '.join(groups) or 'none declared'}"
        )
    return groups.get(config.calibration.user_group)


def _calibrated(model: ClsdModel, dataset: DatasetDir, config: TrainConfig, group: GroupInput | None) -> Calibration:
    names = ["label", "sample_weight", *([group.name] if group else [])]
    columns = input_pipeline.read_columns(dataset, "validation", names)
    return fit_calibration(
        config.calibration,
        predict_logits(model, dataset, "validation"),
        columns["label"],
        columns["sample_weight"],
        columns[group.name] if group else None,
        group,
    )
