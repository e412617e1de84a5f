"""Teachers that score every training row before training begins.

Their one contract: a score for each training row, by a model that was not trained on that row. The scores are kept in
the dataset directory under a key of all they depend on, so that later runs on the same dataset take them from there.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import zipfile
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from clsd_tf.commands.console import console
from clsd_tf.commands.interruption import Sigterm, TrainingInterruptedError
from clsd_tf.data import input_pipeline
from clsd_tf.data.hashing import mix_row_ids
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.layers.calibration import CalibrationConfig
from clsd_tf.methods.clsd import ClsdConfig
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import EVALUATION_BATCH_SIZE, build_model, predict
from clsd_tf.training.checkpoints import Checkpoints, random_generators
from clsd_tf.training.config import TrainConfig, parse_config
from clsd_tf.training.fit import fit

_DAY_MICROSECONDS = 86_400_000_000
_FOLD_RULE = "rows of a user at the same time share a fold"  # Scores made by another rule must not be taken for these.
_FOLD_SEED_STEP = 1000  # Fold models must not share the seed of the model they teach, nor of other seeds' folds.


def teacher_scores(dataset: DatasetDir, config: TrainConfig, title: str | None = "train") -> RowValues | None:
    """Scores of the config's teacher for every training row; None if the teacher scores in the training step.

    Stored scores are taken where there are some; else the teacher is trained now, and its scores are stored.
    """
    if not config.uses_stored_scores:
        return None
    file = scores_file(dataset, config)
    if not file.exists():
        directory = file.parent
        with WorkDir(directory).exclusive(wait=True):
            if file.exists():  # Another process was at it, and has finished.
                return _read_scores(file)
            scores = _SCORERS[config.clsd.teacher](dataset, config, directory, title)
            write_json(directory / "teacher.json", _teacher_identity(dataset, config))
            temporary = file.with_suffix(".incomplete.npz")
            np.savez(temporary, row_ids=scores.row_ids, values=scores.values)
            temporary.rename(file)
            shutil.rmtree(directory / "models", ignore_errors=True)
    return _read_scores(file)


def stored_scores(work_dir: WorkDir, dataset: DatasetDir) -> RowValues | None:
    """The teacher scores that a run was trained with; None if its teacher had none to store."""
    config = parse_config(work_dir.resolved_config["train"], str(work_dir.config))
    if not config.uses_stored_scores:
        return None
    file = scores_file(dataset, config)
    return _read_scores(file) if file.exists() else None


def scores_file(dataset: DatasetDir, config: TrainConfig) -> pathlib.Path:
    """Where the scores of the config's teacher are kept, or will be."""
    text = json.dumps(_teacher_identity(dataset, config), sort_keys=True)
    key = f"{config.clsd.teacher}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return dataset.teacher_scores / key / "scores.npz"


def _read_scores(file: pathlib.Path) -> RowValues:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return RowValues(stored["row_ids"], stored["values"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"stored teacher scores cannot be read. Received: {file}: {error}. Remove {file.parent} to score again"
        ) from error


def _teacher_config(config: TrainConfig) -> TrainConfig:
    """The run that a teacher's models share: the same model with plain BCE."""
    plain = {
        "method": "bce",
        "clsd": ClsdConfig(),
        "calibration": CalibrationConfig(method="none"),
    }
    losses = {
        name: TrainConfig.model_fields[name].default for name in ("loss", "label_smoothing", "focal_gamma", "clicks")
    }
    return config.model_copy(update=plain | losses)


def _teacher_identity(dataset: DatasetDir, config: TrainConfig) -> dict[str, object]:
    """Everything that the scores depend on."""
    clsd = config.clsd
    identity: dict[str, object] = {
        "dataset_fingerprint": dataset.fingerprint,
        "teacher": clsd.teacher,
        "train": _teacher_config(config).result_settings,
    }
    if clsd.teacher == "cross_fit":
        identity |= {"num_folds": clsd.num_folds, "fold_by": clsd.fold_by, "num_repeats": clsd.num_repeats}
        identity["rule"] = _FOLD_RULE
    return identity


def _cross_fit(dataset: DatasetDir, config: TrainConfig, directory: pathlib.Path, title: str | None) -> RowValues:
    """Mean over ``num_repeats`` of: each row scored by the model of the fold that it was left out of.

    Rows, or users, are assigned to ``num_folds`` folds by a seeded hash. The fold models are fits of their own, so a
    killed job goes on in the fold that it had reached.
    """
    columns = input_pipeline.read_columns(dataset, "train", ["row_id", "user_hash", "event_time"])
    keys = _fold_keys(columns, config.clsd.fold_by)
    scores = np.zeros(len(keys), np.float64)
    num_folds, num_repeats = config.clsd.num_folds, config.clsd.num_repeats
    for repeat in range(num_repeats):
        folds = mix_row_ids(keys, config.seed + repeat * _FOLD_SEED_STEP) % np.uint64(num_folds)
        for fold in range(num_folds):
            index = repeat * num_folds + fold
            seed = config.seed + (index + 1) * _FOLD_SEED_STEP
            held_out = folds == fold
            weights = RowValues(columns["row_id"], (~held_out).astype(np.float32))
            model, _ = fit(
                dataset,
                _teacher_config(config).model_copy(update={"seed": seed}),
                WorkDir(directory / "models" / f"fold_{index}"),
                title=title and f"{title}: teacher fold {index + 1}/{num_folds * num_repeats}",
                row_weights=weights,
            )
            scores[held_out] += predict(model, dataset, "train")[held_out]
    return RowValues(columns["row_id"], (scores / num_repeats).astype(np.float32))


def _fold_keys(columns: Mapping[str, np.ndarray], fold_by: str) -> np.ndarray:
    """uint64 [num_rows]: rows of equal keys share a fold.

    By row: what a user saw in the same moment stays together. Logs repeat events, and a model that was trained on the
    copy of a row has seen its label.
    """
    users = columns["user_hash"].astype(np.uint64)
    return users if fold_by == "user" else users ^ mix_row_ids(columns["event_time"], 0)


def _prequential(dataset: DatasetDir, config: TrainConfig, directory: pathlib.Path, title: str | None) -> RowValues:
    """Each row scored by one model that had trained, in one pass, on the days before it.

    Days are spans of 24 hours from the first event. No model precedes the first day: its scores are NaN, and its clicks
    count 1. A killed job keeps the days that are done. Holds the training split in memory.
    """
    inputs = dataset.inputs
    names = [entry.name for entry in (*inputs.categorical, *inputs.groups)] + list(inputs.numeric)
    columns = input_pipeline.read_columns(dataset, "train", [*names, "label", "sample_weight", "event_time", "row_id"])
    days = (columns["event_time"] - columns["event_time"].min()) // _DAY_MICROSECONDS
    if days.max() == 0:
        raise ValueError(
            "teacher=prequential needs a training split of two days or more. Received: one day. Use teacher=cross_fit"
        )
    model = build_model(_teacher_config(config), inputs)
    scores = tf.Variable(np.full(len(days), np.nan, np.float32))
    days_done = tf.Variable(0, dtype=tf.int64)
    checkpoints = Checkpoints(
        directory / "models" / "days",
        to_keep=1,
        model=model,
        random_generators=random_generators(model),
        scores=scores,
        days_done=days_done,
    )
    checkpoints.restore()
    with Sigterm() as sigterm:
        for day in np.unique(days)[int(days_done) :]:
            rows = np.random.default_rng((config.seed, day)).permutation(np.flatnonzero(days == day))
            features = {name: columns[name][rows] for name in names}
            if day > 0:
                pctr = model.predict(features, batch_size=EVALUATION_BATCH_SIZE, verbose=0)
                scores.scatter_nd_update(rows[:, np.newaxis], pctr)
            model.fit(
                features,
                columns["label"][rows],
                sample_weight=columns["sample_weight"][rows],
                batch_size=config.batch_size,
                shuffle=False,  # They are, in an order that a resumed job finds again.
                verbose=0,
                callbacks=[_StopOnSigterm(sigterm)],
            )
            checkpoints.save(int(days_done.assign_add(1)))
            if title is not None:
                console.print(f"{title}: teacher scored {len(rows):,} rows of day {int(day) + 1}", soft_wrap=True)
    return RowValues(columns["row_id"], scores.numpy())


class _StopOnSigterm(tf.keras.callbacks.Callback):
    _supports_tf_logs = True

    def __init__(self, sigterm: Sigterm):
        super().__init__()
        self._sigterm = sigterm

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        if self._sigterm.received:
            raise TrainingInterruptedError(
                "stopped by SIGTERM: the days that the teacher has scored are saved. "
                "Start the same command again to go on"
            )


_SCORERS = {"cross_fit": _cross_fit, "prequential": _prequential}
