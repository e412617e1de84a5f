"""Evaluation of a model on a split: overall and per user group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from clsd_tf.data import input_pipeline
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.metrics import pointwise
from clsd_tf.spec.model_inputs import GroupInput
from clsd_tf.statistics.small_groups import merge_small_groups
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.training.assembly import predict, predict_logits

# The metrics of a table, in order: key in the report, heading.
HEADLINES = (
    ("rows", "rows"),
    ("click_rate", "click rate"),
    ("auc", "AUC"),
    ("gauc", "GAUC"),
    ("log_loss", "log loss"),
    ("normalized_entropy", "NE"),
    ("pcoc", "PCOC"),
    ("ece", "ECE"),
    ("intensity_auc", "intensity AUC"),
    ("intensity_auc_among_clicks", "among clicks"),
)


def evaluate(model: MethodModel, dataset: DatasetDir, split: str) -> dict[str, Any]:
    """Scores a split and measures it, with the model's calibration where it has one.

    Args:
      model: maps features to pctr.
      dataset: a complete dataset directory.
      split: train, validation or test.

    Returns:
      ``overall``, ``groups`` (user group -> label -> metrics) and ``uncalibrated`` (overall, without the calibration),
      ready for JSON. Rows of weight 0 and groups without rows are left out, and groups of fewer than 20 users are part
      of "other"; a metric that is not defined on its rows is None.
    """
    return {
        "split": split,
        "dataset_fingerprint": dataset.fingerprint,
        "label": dataset.spec.label,
        "intensity_label": dataset.spec.intensity_label,
        **measure_with_groups(scored_rows(model, dataset, split), dataset.inputs.groups),
    }


def measure_with_groups(columns: dict[str, np.ndarray | None], groups: Sequence[GroupInput]) -> dict[str, Any]:
    """``overall``, ``uncalibrated`` and ``groups`` of scored rows, see ``evaluate``."""
    return {
        "overall": measure(columns),
        "uncalibrated": measure({**columns, "pctr": columns["uncalibrated"]}),
        "groups": {
            group.name: {label: measure(rows) for label, rows in rows_by_label(columns, group)} for group in groups
        },
    }


def scored_rows(model: MethodModel, dataset: DatasetDir, split: str) -> dict[str, np.ndarray | None]:
    """What ``measure`` needs of a split's rows of weight above 0, ``uncalibrated`` pctr and the ids of user groups.

    Raises:
      ValueError: every row has weight 0.
    """
    names = [group.name for group in dataset.inputs.groups]
    record_fields = ["label", "intensity_label", "sample_weight", "user_hash"]
    columns = input_pipeline.read_columns(dataset, split, [*record_fields, *names])
    columns["pctr"] = predict(model, dataset, split)
    columns["uncalibrated"] = expit(predict_logits(model, dataset, split).astype(np.float64))
    if dataset.spec.intensity_label is None:
        columns["intensity_label"] = None
    columns = _rows(columns, columns["sample_weight"] > 0)
    if not len(columns["label"]):
        raise ValueError(f"the rows of a split must not all have sample weight 0. Received: {split}")
    return columns


def rows_by_label(
    columns: dict[str, np.ndarray | None], group: GroupInput
) -> Iterator[tuple[str, dict[str, np.ndarray | None]]]:
    """(label, its rows) of a user group: those of fewer than 20 users as "other", those without rows not at all."""
    ids, labels = merge_small_groups(columns[group.name], group.labels, columns["user_hash"])
    for index, label in enumerate(labels):
        if np.any(ids == index):
            yield label, _rows(columns, ids == index)


def _rows(columns: dict[str, np.ndarray | None], mask: np.ndarray) -> dict[str, np.ndarray | None]:
    return {name: None if values is None else values[mask] for name, values in columns.items()}


def measure(columns: dict[str, np.ndarray | None]) -> dict[str, Any]:
    """All metrics of some rows.

    Args:
      columns: ``label``, ``pctr``, ``sample_weight``, ``user_hash``, and ``intensity_label`` (None if not declared);
        each [num_rows], num_rows >= 1.
    """
    labels, pctr, weights = columns["label"], columns["pctr"], columns["sample_weight"]
    gauc, gauc_share = pointwise.gauc(labels, pctr, columns["user_hash"], weights)
    return {
        "rows": len(labels),
        "clicks": int(labels.sum()),
        "click_rate": float(np.average(labels, weights=weights)),
        "mean_pctr": float(np.average(pctr, weights=weights)),
        "auc": pointwise.auc(labels, pctr, weights),
        "gauc": gauc,
        "gauc_share_of_rows": gauc_share,
        "log_loss": pointwise.log_loss(labels, pctr, weights),
        "normalized_entropy": pointwise.normalized_entropy(labels, pctr, weights),
        "pcoc": pointwise.pcoc(labels, pctr, weights),
        "ece": pointwise.ece(labels, pctr, weights),
        "calibration_bins": pointwise.calibration_bins(labels, pctr, weights, num_bins=10),
        **_intensity(columns),
    }


def _intensity(columns: dict[str, np.ndarray | None]) -> dict[str, float | None]:
    """AUC of the held-out intensity label, over all rows and among clicks only."""
    intensity = columns["intensity_label"]
    if intensity is None:
        return {"intensity_auc": None, "intensity_auc_among_clicks": None}
    clicked = columns["label"] > 0.5
    scores, weights = columns["pctr"], columns["sample_weight"]
    return {
        "intensity_auc": pointwise.auc(intensity, scores, weights),
        "intensity_auc_among_clicks": pointwise.auc(intensity[clicked], scores[clicked], weights[clicked]),
    }


def table_rows(evaluation: dict[str, Any]) -> list[list[Any]]:
    """Rows of a table with the headlines: overall first, then each group."""
    rows = [["overall", *(evaluation["overall"][key] for key, _ in HEADLINES)]]
    for name, labels in evaluation["groups"].items():
        rows += [[f"{name} {label}", *(entry[key] for key, _ in HEADLINES)] for label, entry in labels.items()]
    return rows
