"""Scores of teachers, made once and kept in the dataset directory under a key of all they depend on."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import zipfile
from collections.abc import Mapping

import numpy as np

from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.layers.calibration_config import CalibrationConfig
from clsd_tf.methods.method import TeacherRun
from clsd_tf.methods.teachers import TEACHERS
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.claim import file_digests
from clsd_tf.training.config import TrainConfig, parse_config
from clsd_tf.training.teachers.job import TeacherJob

_FOLD_RULE = "rows of a user at the same time share a fold"  # Scores made by another rule must not be taken for these.


def scores_of(dataset: DatasetDir, config: TrainConfig, run: TeacherRun, title: str | None = "train") -> RowValues:
    """Gives the scores of a teacher for every training row: stored ones, or those of a teacher that is trained now.

    Args:
      dataset: whose training rows are scored; gets the scores.
      config: of the run that the teacher teaches.
      run: one of ``config.teacher_runs``.
      title: what progress lines call the run; None for no progress lines.

    Returns:
      A score for each training row.

    Raises:
      ArtifactError: stored scores, or a file of scores, cannot be read.
      As ``clsd_tf.training.fit.fit``, of a teacher that trains.
    """
    file = scores_path(dataset, config, run)
    if not file.exists():
        directory = file.parent
        with WorkDir(directory).exclusive(wait=True):
            if file.exists():  # Another process was at it, and has finished.
                return _read_scores(file)
            job = TeacherJob(dataset, _config_of(config, run), run.settings, run.files, directory, title)
            scores = TEACHERS[run.teacher](job)
            write_json(directory / "teacher.json", _identity(dataset, config, run))
            temporary = file.with_suffix(".incomplete.npz")
            np.savez(temporary, row_ids=scores.row_ids, values=scores.values)
            temporary.rename(file)
            shutil.rmtree(directory / "models", ignore_errors=True)
    return _read_scores(file)


def stored_scores(work_dir: WorkDir, dataset: DatasetDir) -> RowValues | None:
    """Reads the teacher scores that a run was trained with.

    Args:
      work_dir: of the run.
      dataset: that it was trained on.

    Returns:
      A score for each training row; None if its teacher had none to store.
    """
    resolved = work_dir.resolved_config
    config, digests = parse_config(resolved["train"], str(work_dir.config)), resolved.get("files")
    files = (scores_path(dataset, config, run, digests) for run in config.teacher_runs)
    return next((_read_scores(file) for file in files if file.exists()), None)


def scores_path(
    dataset: DatasetDir, config: TrainConfig, run: TeacherRun, digests: Mapping[str, str] | None = None
) -> pathlib.Path:
    """Names the file where a teacher's scores are kept, or will be.

    Args:
      dataset: as of ``scores_of``.
      config: likewise.
      run: likewise.
      digests: path -> SHA-256 of the files that the teacher has read; None for those that are there now.

    Returns:
      A path that depends on all that the scores depend on.
    """
    text = json.dumps(_identity(dataset, config, run, digests), sort_keys=True)
    key = f"{run.teacher}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return dataset.teacher_scores / key / "scores.npz"


def _read_scores(file: pathlib.Path) -> RowValues:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return RowValues(stored["row_ids"], stored["values"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"stored teacher scores cannot be read. Received: {file}: {error}. Remove {file.parent} to score again"
        ) from error


def _config_of(config: TrainConfig, run: TeacherRun) -> TrainConfig:
    """The config that a teacher's models are trained with: the run's settings, with the method that teaches it."""
    method = run.student or config.method
    return config.model_copy(update={"method": method, "calibration": CalibrationConfig(method="none")})


def _identity(
    dataset: DatasetDir, config: TrainConfig, run: TeacherRun, digests: Mapping[str, str] | None = None
) -> dict[str, object]:
    """Everything that the scores depend on."""
    identity: dict[str, object] = {"dataset_fingerprint": dataset.fingerprint, "teacher": run.teacher, **run.settings}
    if run.teacher == "cross_fit":
        identity["rule"] = _FOLD_RULE
    if run.student is not None:
        identity["train"] = _config_of(config, run).result_settings
    if run.files:
        digests = digests or file_digests(run.files)
        identity["files"] = [digests[path] for path in run.files]
    return identity
