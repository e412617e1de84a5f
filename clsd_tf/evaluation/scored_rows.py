"""Scores a split: a model's predictions beside what they are measured by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet
import tensorflow as tf
from scipy.special import expit

from clsd_tf.data import input_pipeline
from clsd_tf.metrics.scored_rows import Array, ScoredRows
from clsd_tf.spec.model_inputs import GroupInput
from clsd_tf.statistics.small_groups import merge_small_groups
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError
from clsd_tf.training.assembly import predict, predict_logits

_RECORD_FIELDS = ("label", "intensity_label", "sample_weight", "user_hash", "row_id")


def score_split(model: tf.keras.Model, dataset: DatasetDir, split: str, ground_truth: str | None = None) -> ScoredRows:
    """Scores the rows of a split that have a weight above 0.

    Args:
      model: maps features to ctr, with its calibration where it has one.
      dataset: a complete dataset directory.
      split: train, validation or test.
      ground_truth: Parquet file of a simulated log, with ``row_id``, ascending, and ``is_genuine``.

    Returns:
      The rows in file order, with ids of all user groups.

    Raises:
      ValueError: every row has weight 0.
      ArtifactError: ``ground_truth`` lacks a row.
    """
    names = [group.name for group in dataset.inputs.groups]
    columns = input_pipeline.read_columns(dataset, split, [*_RECORD_FIELDS, *names])
    if dataset.spec.intensity_label is None:
        del columns["intensity_label"]
    rows = ScoredRows(
        ctr=predict(model, dataset, split),
        # A sigmoid in float32 would make ties of scores that differ.
        uncalibrated=expit(predict_logits(model, dataset, split).astype(np.float64)),
        genuine=None if ground_truth is None else _genuine(ground_truth, columns["row_id"]),
        group_ids={name: columns.pop(name) for name in names},
        **columns,
    ).select(columns["sample_weight"] > 0)
    if not len(rows):
        raise ValueError(f"the rows of a split must not all have sample weight 0. Received: {split}")
    return rows


def _genuine(ground_truth: str, row_ids: Array) -> Array:
    table = pyarrow.parquet.read_table(ground_truth, columns=["row_id", "is_genuine"])
    known = table.column("row_id").to_numpy()  # Ascending: the file is written in the order of the log.
    places = np.minimum(np.searchsorted(known, row_ids), len(known) - 1)
    if (known[places] != row_ids).any():
        raise ArtifactError(
            f"the ground truth must hold every row of the dataset. Received: {ground_truth}, which lacks some. "
            "Simulate and build the feed again"
        )
    return table.column("is_genuine").to_numpy()[places].astype(np.float64)


def rows_by_label(rows: ScoredRows, group: GroupInput) -> Iterator[tuple[str, ScoredRows]]:
    """Splits rows by a user group.

    Args:
      rows: with ids of the group.
      group: one of the dataset's.

    Yields:
      (label, its rows). Labels of fewer than 20 users are part of "other"; those without rows are left out.
    """
    ids, labels = merge_small_groups(rows.group_ids[group.name], group.labels, rows.user_hash)
    for index, label in enumerate(labels):
        if np.any(ids == index):
            yield label, rows.select(ids == index)
