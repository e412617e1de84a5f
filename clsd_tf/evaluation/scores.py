"""The scores that the analyses of click confidence look at."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from scipy.special import expit

from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model, predict_logits
from clsd_tf.training.teachers.stored import stored_scores

TEACHER = "stored scores of the teacher, which was not trained on the rows"
MODEL = "predictions of the run's own model, before calibration"


def split_scores(work_dir: WorkDir, dataset: DatasetDir, split: str) -> tuple[np.ndarray, str]:
    """Scores of every row of a split, in file order: the teacher's for the training split, if the run stored some.

    Args:
      work_dir: of a finished run.
      dataset: that it was trained on.
      split: train, validation or test.

    Returns:
      (float32 [num_rows], NaN where the teacher has no score; ``TEACHER`` or ``MODEL``).

    Raises:
      ArtifactError: the run is not complete, or was trained on another dataset.
    """
    work_dir.require_complete(dataset)
    stored = stored_scores(work_dir, dataset) if split == "train" else None
    if stored is None:
        logits = predict_logits(load_model(work_dir, dataset), dataset, split)
        return expit(logits), MODEL
    row_ids = read_columns(dataset, split, ["row_id"])["row_id"]
    return stored.lookup_table().lookup(tf.constant(row_ids)).numpy(), TEACHER
