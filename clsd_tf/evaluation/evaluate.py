"""Evaluation of a model on a split: overall and per user group."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.evaluation.scored_rows import rows_by_label, score_split
from clsd_tf.metrics import pointwise, table
from clsd_tf.metrics.scored_rows import ScoredRows
from clsd_tf.spec.model_inputs import GroupInput
from clsd_tf.storage.dataset_dir import DatasetDir


def evaluate(
    model: tf.keras.Model, dataset: DatasetDir, split: str, metrics: Collection[str] | None = None
) -> dict[str, Any]:
    """Scores a split and measures it, with the model's calibration where it has one.

    Args:
      model: maps features to ctr.
      dataset: a complete dataset directory.
      split: train, validation or test.
      metrics: names in the table of metrics; None for all that an evaluation has.

    Returns:
      ``overall``, ``groups`` (user group -> label -> metrics) and ``uncalibrated`` (overall, without the calibration),
      ready for JSON. Rows of weight 0 and groups without rows are left out, and groups of fewer than 20 users are part
      of "other"; a metric that is not defined on its rows is None.

    Raises:
      ValueError: every row has weight 0, or a metric is unknown.
    """
    return {
        "split": split,
        "dataset_fingerprint": dataset.fingerprint,
        "label": dataset.spec.label,
        "intensity_label": dataset.spec.intensity_label,
        **measure_with_groups(score_split(model, dataset, split), dataset.inputs.groups, metrics),
    }


def measure_with_groups(
    rows: ScoredRows, groups: Sequence[GroupInput], metrics: Collection[str] | None = None
) -> dict[str, Any]:
    """Measures rows overall, without the calibration, and per user group.

    Args:
      rows: with ids of ``groups``.
      groups: the user groups to measure.
      metrics: as of ``evaluate``.

    Returns:
      ``overall``, ``uncalibrated`` and ``groups``, see ``evaluate``.
    """
    return {
        "overall": _measure(rows, metrics),
        "uncalibrated": _measure(rows.without_calibration(), metrics),
        "groups": {
            group.name: {label: _measure(part, metrics) for label, part in rows_by_label(rows, group)}
            for group in groups
        },
    }


def _measure(rows: ScoredRows, metrics: Collection[str] | None) -> dict[str, Any]:
    bins = pointwise.calibration_bins(rows.label, rows.ctr, rows.sample_weight, num_bins=10)
    return {**table.measure(rows, "evaluation", metrics), "calibration_bins": bins}


def evaluation_table(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes a table of an evaluation.

    Args:
      evaluation: from ``evaluate``.

    Returns:
      (columns, lines): overall first, then each user group; None where a metric is not defined.
    """
    shown = table.headlines(evaluation["overall"])
    entries = {"overall": evaluation["overall"]}
    for name, labels in evaluation["groups"].items():
        entries |= {f"{name} {label}": entry for label, entry in labels.items()}
    lines = [[name, *(entry[metric.name] for metric in shown)] for name, entry in entries.items()]
    return ["", *(metric.heading for metric in shown)], lines
