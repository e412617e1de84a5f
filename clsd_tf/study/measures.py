"""What is measured of a run of a study: overall and per user group, against the planted truth where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow.parquet
from scipy.special import expit

from clsd_tf.data import input_pipeline
from clsd_tf.methods.clsd.confidence_report import click_noise_floor
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.metrics import pointwise
from clsd_tf.spec.model_inputs import GroupInput
from clsd_tf.statistics.small_groups import merge_small_groups
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError
from clsd_tf.training.assembly import predict, predict_logits

OVERALL = "overall"
_SLICED = ("auc", "pcoc", "ece", "intensity_auc", "intensity_auc_among_clicks", "genuine_auc")
_HEADLINES = ("auc", "gauc", "log_loss", "pcoc", "ece", "intensity_auc", "intensity_auc_among_clicks")
_UNCALIBRATED = ("log_loss", "pcoc", "ece")


def scored_rows(model: MethodModel, dataset: DatasetDir, split: str, truth: str | None) -> dict[str, np.ndarray]:
    """Columns of the rows of a split that have weight, with ``pctr``, ``uncalibrated`` and the planted ``genuine``."""
    record = ["label", "intensity_label", "sample_weight", "user_hash", "row_id"]
    columns = input_pipeline.read_columns(dataset, split, [*record, *(group.name for group in dataset.inputs.groups)])
    columns["pctr"] = predict(model, dataset, split)
    columns["uncalibrated"] = expit(predict_logits(model, dataset, split).astype(np.float64))
    if dataset.spec.intensity_label is None:
        del columns["intensity_label"]
    if truth is not None:
        columns["genuine"] = _genuine(truth, columns["row_id"])
    counted = columns["sample_weight"] > 0
    return {name: values[counted] for name, values in columns.items()}


def measure(columns: Mapping[str, np.ndarray], groups: Sequence[GroupInput]) -> Iterator[tuple[str, str, float]]:
    """(slice, metric, value) of scored rows; the slice is ``overall`` or ``<user group>=<label>``.

    User groups of few users are part of the label "other".
    """
    yield from ((OVERALL, *found) for found in _overall(columns, [group.name for group in groups]))
    for group in groups:
        ids, labels = merge_small_groups(columns[group.name], group.labels, columns["user_hash"])
        floor = click_noise_floor(columns["uncalibrated"], {group.name: (ids, labels)})[group.name]
        for index, label in enumerate(labels):
            rows = ids == index
            if rows.any():
                name = f"{group.name}={label}"
                yield from ((name, *found) for found in _sliced(columns, rows) if found[0] in _SLICED)
                yield name, "click_noise_floor", floor[label]["floor"]


def _genuine(truth: str, row_ids: np.ndarray) -> np.ndarray:
    """Whether interest alone would have drawn a click, per row: the planted truth, found by row id."""
    table = pyarrow.parquet.read_table(truth, columns=["row_id", "is_genuine"])
    known = table.column("row_id").to_numpy()  # Ascending: the truth is written in the order of the log.
    places = np.minimum(np.searchsorted(known, row_ids), len(known) - 1)
    if (known[places] != row_ids).any():
        raise ArtifactError(
            f"the planted truth must hold every row of the dataset. Received: {truth}, which lacks some. "
            "Simulate and build the feed again"
        )
    return table.column("is_genuine").to_numpy()[places].astype(np.float64)


def _overall(columns: Mapping[str, np.ndarray], groups: Sequence[str]) -> Iterator[tuple[str, float]]:
    rows = np.ones(len(columns["label"]), bool)
    yield from (found for found in _sliced(columns, rows) if found[0] in (*_HEADLINES, "genuine_auc"))
    label, weight = columns["label"], columns["sample_weight"]
    gauc, _ = pointwise.gauc(label, columns["pctr"], columns["user_hash"], weight)
    yield from _defined("gauc", gauc)
    if groups:
        within, _ = pointwise.gauc(label, columns["pctr"], columns[groups[0]], weight)
        yield from _defined("group_auc", within)
        if "genuine" in columns:
            within, _ = pointwise.gauc(columns["genuine"], columns["pctr"], columns[groups[0]], weight)
            yield from _defined("genuine_group_auc", within)
    for metric in _UNCALIBRATED:
        yield from _defined(
            f"uncalibrated_{metric}", getattr(pointwise, metric)(label, columns["uncalibrated"], weight)
        )


def _sliced(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> Iterator[tuple[str, float]]:
    label, pctr, weight = (columns[name][rows] for name in ("label", "pctr", "sample_weight"))
    for metric in ("auc", "log_loss", "pcoc", "ece"):
        yield from _defined(metric, getattr(pointwise, metric)(label, pctr, weight))
    if "intensity_label" in columns:
        intensity, clicked = columns["intensity_label"][rows], label > 0.5
        yield from _defined("intensity_auc", pointwise.auc(intensity, pctr, weight))
        among = pointwise.auc(intensity[clicked], pctr[clicked], weight[clicked])
        yield from _defined("intensity_auc_among_clicks", among)
    if "genuine" in columns:
        yield from _defined("genuine_auc", pointwise.auc(columns["genuine"][rows], pctr, weight))


def _defined(metric: str, value: float | None) -> Iterator[tuple[str, float]]:
    if value is not None:
        yield metric, float(value)
