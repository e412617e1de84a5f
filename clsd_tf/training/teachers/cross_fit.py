"""The teacher ``cross_fit``: each row is scored by models of folds that it was left out of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from clsd_tf.data import input_pipeline
from clsd_tf.data.hashing import mix_row_ids
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import predict
from clsd_tf.training.fit import fit, prepare
from clsd_tf.training.teachers.job import TeacherJob

_FOLD_SEED_STEP = 1000  # Fold models must not share the seed of the model they teach, nor of other seeds' folds.


def cross_fit(job: TeacherJob) -> RowValues:
    """Scores each row by the model of the fold that it was left out of; the mean of ``num_repeats`` such scores.

    Rows, or users, are assigned to ``num_folds`` folds by a seeded hash. The fold models are runs of their own, so a
    killed job goes on in the fold that it had reached.

    Args:
      job: its settings are ``num_folds``, ``fold_by`` and ``num_repeats``.

    Returns:
      Scores in [0, 1] of all training rows.
    """
    columns = input_pipeline.read_columns(job.dataset, "train", ["row_id", "user_hash", "event_time"])
    keys = _fold_keys(columns, job.settings["fold_by"])
    scores = np.zeros(len(keys), np.float64)
    num_folds, num_repeats = job.settings["num_folds"], job.settings["num_repeats"]
    for repeat in range(num_repeats):
        folds = mix_row_ids(keys, job.config.seed + repeat * _FOLD_SEED_STEP) % np.uint64(num_folds)
        for fold in range(num_folds):
            index, held_out = repeat * num_folds + fold, folds == fold
            weights = RowValues(columns["row_id"], (~held_out).astype(np.float32))
            title = job.title and f"{job.title}: teacher fold {index + 1}/{num_folds * num_repeats}"
            scores[held_out] += _scores_of_fold(job, index, weights, title)[held_out]
    return RowValues(columns["row_id"], (scores / num_repeats).astype(np.float32))


def _scores_of_fold(job: TeacherJob, index: int, weights: RowValues, title: str | None) -> np.ndarray:
    """Scores of all training rows by a model that was trained with these weights."""
    config = job.config.model_copy(update={"seed": job.config.seed + (index + 1) * _FOLD_SEED_STEP})
    run = prepare(job.dataset, config, WorkDir(job.directory / "models" / f"fold_{index}"))
    fit(run, title=title, row_weights=weights)
    return predict(run.model, job.dataset, "train")


def _fold_keys(columns: Mapping[str, np.ndarray], fold_by: str) -> np.ndarray:
    """uint64 [num_rows]: rows of equal keys share a fold.

    By row: what a user saw in the same moment stays together. Logs repeat events, and a model that was trained on the
    copy of a row has seen its label.
    """
    users = columns["user_hash"].astype(np.uint64)
    return users if fold_by == "user" else users ^ mix_row_ids(columns["event_time"], 0)
