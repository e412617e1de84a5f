"""Cells of a study: one run each of data x backbone x method x seed, and what they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.commands.interruption import EXIT_CODE, TrainingInterruptedError
from clsd_tf.data import input_pipeline
from clsd_tf.evaluation.scored_rows import score_split
from clsd_tf.methods import DEFAULT_METHOD, METHODS, method_of
from clsd_tf.methods.method import MethodGuardError
from clsd_tf.metrics.user_errors import difference_errors
from clsd_tf.plugins.loading import load_plugins
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.study.measures import measure_slices
from clsd_tf.training.assembly import load_model, make_deterministic
from clsd_tf.training.callbacks import TrainingDivergedError
from clsd_tf.training.config import TrainConfig, differences, parse_config
from clsd_tf.training.run import train
from clsd_tf.training.teachers.stored import scores_of

BASELINE = "bce"


def known_rows() -> dict[str, Mapping[str, Any]]:
    """Rows that the registered methods bring to studies: name -> what it changes in the config that all rows share."""
    return {row: changes for method in METHODS.values() for row, changes in method.study_rows.items()}


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """A row of a study's tables: a name and what it changes in the shared config."""

    name: str
    changes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study; the names say which, ``config`` is what they stand for."""

    data: str
    backbone: str
    method: str
    seed: int
    config: TrainConfig = dataclasses.field(compare=False)

    def work_dir(self, study_dir: pathlib.Path) -> WorkDir:
        """Names the cell's work directory below ``study_dir``.

        Returns:
          The directory, which need not exist yet.
        """
        return WorkDir(study_dir / "runs" / self.data / self.backbone / self.method / f"seed_{self.seed}")

    def result(self, study_dir: pathlib.Path) -> pathlib.Path:
        """Names the file of the cell's result below ``study_dir``. Written last: a cell that has it is finished.

        Returns:
          A path, whether or not it is there.
        """
        return self.work_dir(study_dir).path / "result.json"

    def predictions(self, study_dir: pathlib.Path) -> pathlib.Path:
        """Names the file below ``study_dir`` with row ids and ctr of the rows that were measured.

        Returns:
          A path, whether or not it is there.
        """
        return self.work_dir(study_dir).path / "predictions.npz"

    def __str__(self) -> str:
        return f"{self.data} {self.backbone} {self.method} seed {self.seed}"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merges settings, mapping by mapping.

    Args:
      base: any.
      changes: win over those of ``base``.

    Returns:
      A new mapping.
    """
    result = dict(base)
    for key, value in changes.items():
        is_nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if is_nested else value
    return result


def merged_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``merged``, for training settings: those of a method hold for that method alone.

    Args:
      base: settings that rows share; what stands under ``method`` is for rows of the method that it names, by default
        ``clsd``.
      changes: of a row; where they name another method, nothing under ``base["method"]`` is for it.

    Returns:
      A new mapping.
    """
    shared, own = base.get("method", {}), changes.get("method", {})
    is_other = "name" in own and own["name"] != shared.get("name", DEFAULT_METHOD)
    return merged({**base, "method": {}} if is_other else base, changes)


def cell_config(shared: Mapping[str, Any], row: StudyRow, backbone: Mapping[str, Any], seed: int) -> TrainConfig:
    """Merges the shared settings, the backbone's, and the row's.

    Args:
      shared: by all rows.
      row: its changes win over all others.
      backbone: settings that come with it.
      seed: of the run.

    Returns:
      The config of a run.

    Raises:
      SpecError: unknown key or value out of range.
    """
    settings = merged_settings(merged_settings(shared, backbone), {**row.changes, "seed": seed})
    return parse_config(settings, f"method {row.name}")


def with_placebos(rows: Sequence[StudyRow], shared: Mapping[str, Any]) -> list[StudyRow]:
    """Adds the placebos of methods: without one, a table cannot tell a treatment from any change of its kind.

    Args:
      rows: of the tables.
      shared: settings that they have in common.

    Returns:
      The rows, and behind them each placebo of their methods, of the first row that has it.
    """
    placebos: dict[str, StudyRow] = {}
    for row in rows:
        config = cell_config(shared, row, {}, 0)
        for name, changes in method_of(config.method).placebos(config.method).items():
            control = StudyRow(f"{row.name}_{name}", merged(row.changes, {"method": changes}))
            placebos.setdefault(name, control)
    known = {row.name for row in rows}
    return [*rows, *(placebo for placebo in placebos.values() if placebo.name not in known)]


def start_worker(plugins: Sequence[str] = ()) -> None:
    """Prepares a process that runs cells side by side with others: one thread, and an end with its parent.

    One thread each: runs side by side on few cores finish sooner than one on all.

    Args:
      plugins: modules that register what the cells' configs name, beside those of installed packages.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    make_deterministic()
    load_plugins(plugins)


def _end_with_parent() -> None:
    """A killed study must not leave processes behind that work through its queue."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def run_task(function: Callable[..., None], *arguments: Any) -> None:
    """Runs a task of a worker; after a SIGTERM that interrupted its training the worker ends, as it would elsewhere.

    Args:
      function: the task.
      arguments: its own.
    """
    try:
        function(*arguments)
    except TrainingInterruptedError:
        os._exit(EXIT_CODE)


def prepare_teacher(dataset_path: str, config: TrainConfig) -> None:
    """Trains and stores the teacher scores that cells with this config will take from the dataset.

    A teacher that diverges stores none; its cells will find that out, too, and say so.

    Args:
      dataset_path: a complete dataset directory.
      config: of the cells.
    """
    with contextlib.suppress(TrainingDivergedError):
        dataset = DatasetDir(dataset_path)
        for run in config.teacher_runs:
            scores_of(dataset, config, run, title=None)
    tf.keras.backend.clear_session()


def run_cell(cell: Cell, dataset_path: str, study_dir: pathlib.Path, split: str, truth: str | None) -> None:
    """Trains and measures a cell; a finished one is kept.

    Args:
      cell: the run.
      dataset_path: a complete dataset directory.
      study_dir: where the cell's work directory and result go.
      split: the split to measure on.
      truth: Parquet file with the ground truth of a simulated log, or None.

    Raises:
      ArtifactError: the cell's directory holds a run of other settings.
    """
    if is_finished(cell, dataset_path, study_dir, split):
        return
    dataset, work_dir = DatasetDir(dataset_path), cell.work_dir(study_dir)
    result: dict[str, Any] = {"config": cell.config.to_dict(), "split": split, "stopped": None, "rows": []}
    start = time.monotonic()
    try:
        train(dataset, cell.config, work_dir, title=None)
        rows = score_split(load_model(work_dir, dataset), dataset, split, truth)
        np.savez(cell.predictions(study_dir), row_id=rows.row_id, ctr=rows.ctr)
        result["rows"] = list(measure_slices(rows, dataset.inputs.groups, method_of(cell.config.method).metrics))
    except (TrainingDivergedError, MethodGuardError) as error:
        result["stopped"] = str(error)  # A finding of the study, not a failure of it.
    result["seconds"] = round(time.monotonic() - start, 1)
    write_json(cell.result(study_dir), result)
    _remove_checkpoints(work_dir)
    tf.keras.backend.clear_session()


_open_dataset = functools.cache(DatasetDir)  # Hundreds of cells share a few.


def is_finished(cell: Cell, dataset_path: str, study_dir: pathlib.Path, split: str) -> bool:
    """Tells whether a cell has its result.

    Args:
      cell: the run.
      dataset_path: of its dataset, which need not be there any more.
      study_dir: that holds the cell.
      split: that is to be measured.

    Returns:
      True if it has one of these settings.

    Raises:
      ArtifactError: it has one of other settings, or of another dataset: old numbers must not stand under new ones.
    """
    if not cell.result(study_dir).exists():
        return False
    if pathlib.Path(dataset_path).exists():
        cell.work_dir(study_dir).require_same_dataset(_open_dataset(dataset_path))
    found = read_json(cell.result(study_dir))
    expected = {**cell.config.result_settings, "split": split}
    there = {**parse_config(found["config"], str(cell.result(study_dir))).result_settings, "split": found["split"]}
    received, allowed = differences(expected, there)
    if received:
        raise ArtifactError(
            f"{cell.work_dir(study_dir).path} holds a run of another config. Received: {received}. "
            f"Allowed: {allowed}. Choose another --study_dir, or remove this run"
        )
    return True


def _remove_checkpoints(work_dir: WorkDir) -> None:
    """The best weights stay; thousands of optimizer states would fill a disk."""
    for path in work_dir.checkpoints.glob("*"):
        path.unlink()


def read_results(cells: Sequence[Cell], study_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the results of finished cells.

    Args:
      cells: all of them finished.
      study_dir: that holds them.

    Returns:
      One dict per measured number: data, backbone, method, seed, slice, metric, value.
    """
    rows = []
    for cell in cells:
        key = {"data": cell.data, "backbone": cell.backbone, "method": cell.method, "seed": cell.seed}
        found = read_json(cell.result(study_dir))
        rows += [{**key, "slice": part, "metric": metric, "value": value} for part, metric, value in found["rows"]]
    return rows


def errors_over_users(
    cells: Sequence[Cell],
    study_dir: pathlib.Path,
    dataset_paths: Mapping[Cell, str],
    split: str,
    baseline: str = BASELINE,
) -> dict[tuple[str, str, str, str], float]:
    """Computes standard errors over users, of methods whose seeds share a dataset.

    With rows of its own for each seed, the spread over seeds is one over users already.

    Args:
      cells: all of them finished.
      study_dir: that holds them.
      dataset_paths: cell -> its dataset.
      split: that was measured.
      baseline: the method that others are compared with.

    Returns:
      (data, backbone, method, metric) -> standard error of its difference to the baseline.
    """
    stopped = stopped_cells(cells, study_dir)
    runs: dict[tuple[str, str], dict[str, dict[int, Cell]]] = {}
    for cell in cells:
        if cell not in stopped:
            runs.setdefault((cell.data, cell.backbone), {}).setdefault(cell.method, {})[cell.seed] = cell
    measured_rows = functools.cache(lambda path: _measured_rows(path, split))
    errors: dict[tuple[str, str, str, str], float] = {}
    for place, methods in runs.items():
        compared_with = methods.pop(baseline, {})
        for method, treated in methods.items():
            pairs = [(treated[seed], compared_with[seed]) for seed in sorted(treated.keys() & compared_with.keys())]
            paths = {dataset_paths[cell] for pair in pairs for cell in pair}
            # All pairs or none: the error must be that of the difference it stands beside.
            is_kept = all(cell.predictions(study_dir).exists() for pair in pairs for cell in pair)
            if len(pairs) > 1 and len(paths) == 1 and is_kept:
                scores = [np.stack([_ctr(cell, study_dir) for cell in side]) for side in zip(*pairs, strict=True)]
                found = difference_errors(measured_rows(*paths), *scores)
                errors |= {(*place, method, metric): error for metric, error in found.items()}
    return errors


def _measured_rows(dataset_path: str, split: str) -> dict[str, np.ndarray]:
    dataset = DatasetDir(dataset_path)
    names = ["label", "intensity_label", "sample_weight", "user_hash"]
    columns = input_pipeline.read_columns(dataset, split, names)
    counted = columns["sample_weight"] > 0
    if dataset.spec.intensity_label is None:
        del columns["intensity_label"]
    return {name: values[counted] for name, values in columns.items()}


def _ctr(cell: Cell, study_dir: pathlib.Path) -> np.ndarray:
    with np.load(cell.predictions(study_dir), allow_pickle=False) as stored:
        return stored["ctr" if "ctr" in stored.files else "pctr"]  # As version 0.1 called it.


def run_seconds(cells: Sequence[Cell], study_dir: pathlib.Path) -> float:
    """Adds up the seconds that the runs took, one after the other, without teachers; also those of earlier sessions.

    Args:
      cells: all of them finished.
      study_dir: that holds them.

    Returns:
      Seconds.
    """
    return sum(read_json(cell.result(study_dir)).get("seconds", 0.0) for cell in cells)


def stopped_cells(cells: Sequence[Cell], study_dir: pathlib.Path) -> dict[Cell, str]:
    """Finds the cells that a guard stopped.

    Args:
      cells: all of them finished.
      study_dir: that holds them.

    Returns:
      Cell -> the guard's message.
    """
    found = {cell: read_json(cell.result(study_dir))["stopped"] for cell in cells}
    return {cell: message for cell, message in found.items() if message}
