"""Runs with paired seeds: every method with the same seeds on the same rows, and their differences to a baseline."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.artifacts import DatasetDir, WorkDir, read_json, write_json
from clsd_tf.evaluation import evaluate
from clsd_tf.significance import paired_difference
from clsd_tf.training import TrainConfig, load_model, make_deterministic, parse_config, train

# Method -> what it changes in the config that all methods share.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "bce": {"method": "bce"},
    "clsd_self": {"method": "clsd", "clsd": {"teacher": "self"}},
    "clsd_cross_fit": {"method": "clsd", "clsd": {"teacher": "cross_fit"}},
}
BASELINE = "bce"
METRICS = ("auc", "gauc", "log_loss", "pcoc", "ece", "intensity_auc", "intensity_auc_among_clicks")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study: a method and a seed."""

    method: str
    seed: int

    def work_dir(self, study_dir: pathlib.Path) -> WorkDir:
        return WorkDir(study_dir / self.method / f"seed_{self.seed}")

    def config(self, shared: TrainConfig) -> TrainConfig:
        """The shared config with what the method changes.

        Raises:
          ValueError: unknown method; the message lists the known ones.
        """
        if self.method not in METHODS:
            raise ValueError(f"unknown method. Received: {self.method!r}. Allowed: {', '.join(METHODS)}")
        content = shared.to_dict()
        changes = METHODS[self.method]
        nested = {"clsd": {**content["clsd"], **changes.get("clsd", {})}}
        return parse_config({**content, **changes, **nested, "seed": self.seed}, f"method {self.method}")


def use_one_thread() -> None:
    """Gives TensorFlow one thread in this process: runs side by side on few cores finish sooner than one on all."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    make_deterministic()


def run_cell(cell: Cell, dataset_path: str, study_dir: str, shared: TrainConfig, split: str) -> Cell:
    """Trains and evaluates a cell; a finished one is kept."""
    dataset, work_dir = DatasetDir(dataset_path), cell.work_dir(pathlib.Path(study_dir))
    config = cell.config(shared)
    train(dataset, config, work_dir, title=None)
    if not work_dir.evaluation(split).exists():
        write_json(work_dir.evaluation(split), evaluate(load_model(work_dir, dataset), dataset, split))
    tf.keras.backend.clear_session()
    return cell


def summarise(cells: Sequence[Cell], study_dir: pathlib.Path, split: str) -> dict[str, Any]:
    """Mean and standard deviation of each metric per method, and the paired difference to the baseline.

    Args:
      cells: finished cells; every method with the same seeds.
      study_dir: where they are.
      split: the evaluated split.

    Returns:
      method -> metric -> ``mean``, ``std`` (None below two seeds) and, except for the baseline, ``difference`` and
      ``standard_error``.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        overall = read_json(cell.work_dir(study_dir).evaluation(split))["overall"]
        for metric in METRICS:
            if overall[metric] is not None:
                values.setdefault(cell.method, {}).setdefault(metric, []).append(overall[metric])
    return {
        method: {
            metric: _summary(found, None if method == BASELINE else values.get(BASELINE, {}).get(metric))
            for metric, found in by_metric.items()
        }
        for method, by_metric in values.items()
    }


def _summary(values: list[float], baseline: list[float] | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "num_seeds": len(values),
    }
    if baseline:
        difference = paired_difference(values, baseline)
        summary |= {"difference": difference.mean, "standard_error": difference.standard_error}
    return summary


def table_rows(summary: Mapping[str, Any], metrics: Sequence[str] = METRICS) -> list[list[str]]:
    """Two rows per method: mean (std), and below it the difference to the baseline +- its standard error."""
    rows = []
    for method in (name for name in METHODS if name in summary):
        found = summary[method]
        rows.append([method, *(_mean_text(found.get(metric)) for metric in metrics)])
        if method != BASELINE:
            rows.append([f"  minus {BASELINE}", *(_difference_text(found.get(metric)) for metric in metrics)])
    return rows


def _mean_text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.4f}" + ("" if found["std"] is None else f" ({found['std']:.4f})")


def _difference_text(found: Mapping[str, Any] | None) -> str:
    if found is None or "difference" not in found:
        return "-"
    error = found["standard_error"]
    return f"{found['difference']:+.4f}" + ("" if error is None else f" +- {error:.4f}")
