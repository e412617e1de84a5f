"""The fit loop of a training run: batches, callbacks, and going on where a killed run was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from clsd_tf import input_pipeline
from clsd_tf.artifacts import ArtifactError, DatasetDir, WorkDir, write_json
from clsd_tf.assembly import EVALUATION_BATCH_SIZE, build_model
from clsd_tf.callbacks import (
    CheckpointAndStop,
    ProgressBar,
    Scalars,
    StopOnNonFiniteLoss,
    ValidationAuc,
    best_weights,
)
from clsd_tf.clsd import ClsdModel, OverconfidentTeacherWarning
from clsd_tf.input_pipeline import RowValues
from clsd_tf.train_config import TrainConfig


def fit(
    dataset: DatasetDir,
    config: TrainConfig,
    work_dir: WorkDir,
    *,
    title: str | None,
    row_weights: RowValues | None = None,
    teacher_scores: Callable[[], RowValues | None] = lambda: None,
) -> tuple[ClsdModel, list[dict[str, Any]]]:
    """Fits a model, or goes on with the fit that ``work_dir`` holds.

    Args:
      dataset: what to train on.
      config: the run.
      work_dir: gets config, checkpoints, history, best weights and TensorBoard events.
      title: what progress lines call the run; None for no progress lines.
      row_weights: weight per training row, multiplied with its sample weight.
      teacher_scores: gives the scores of every training row, or None where the teacher scores in the training step.
        Called once everything else is known to be in order: a teacher may train for hours.

    Returns:
      The model with its best weights, and the history: one dict per epoch.

    Raises:
      ArtifactError: the work directory belongs to another config or dataset.
      TrainingDivergedError, ConfidenceGuardError: the run went wrong.
      ValueError: loss warm-up would never end.
    """
    first_counted_step = _loss_warmup_steps(config, dataset)
    model = build_model(config, dataset.inputs)
    claim(work_dir, config, dataset)  # Only now: a config that cannot run must not occupy the directory.
    keeper = CheckpointAndStop(work_dir, patience_epochs=config.patience_epochs, first_counted_step=first_counted_step)
    first_epoch = keeper.resume(model)
    if first_epoch < config.max_epochs and not keeper.is_exhausted:
        batches = _training_batches(dataset, config, first_epoch, row_weights, teacher_scores())
        steps = steps_per_epoch(dataset, config)
        callbacks = [
            StopOnNonFiniteLoss(),
            _validation_auc(dataset),
            Scalars(work_dir, batch_size=config.batch_size),
            keeper,
        ]
        if title is not None:
            callbacks.append(ProgressBar(title, steps_per_epoch=steps, batch_size=config.batch_size))
        tf.keras.utils.set_random_seed(config.seed)  # Fold models may have used the random state meanwhile.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OverconfidentTeacherWarning)  # Commands say it once, before all runs.
            model.fit(
                batches,
                initial_epoch=first_epoch,
                epochs=config.max_epochs,
                steps_per_epoch=steps,
                verbose=0,
                callbacks=callbacks,
            )
    best_weights(model).read(str(work_dir.best_weights)).assert_consumed()
    return model, keeper.history


def steps_per_epoch(dataset: DatasetDir, config: TrainConfig) -> int:
    return -(-dataset.num_rows("train") // config.batch_size)


def claim(work_dir: WorkDir, config: TrainConfig, dataset: DatasetDir) -> None:
    """Writes the resolved config, or checks that the one there is the same.

    Raises:
      ArtifactError: the directory belongs to another config or dataset.
    """
    resolved = {"train": config.to_dict(), "dataset_fingerprint": dataset.fingerprint}
    if not work_dir.config.exists():
        work_dir.path.mkdir(parents=True, exist_ok=True)
        write_json(work_dir.config, resolved)
        return
    work_dir.require_same_dataset(dataset)
    there = work_dir.resolved_config["train"]
    changed = {key: value for key, value in resolved["train"].items() if there.get(key) != value}
    if changed:
        allowed = {key: there.get(key) for key in changed}
        raise ArtifactError(
            f"{work_dir.path} belongs to a run with another config. Received: {changed}. Allowed: {allowed}. "
            "Choose another --work_dir"
        )


def _loss_warmup_steps(config: TrainConfig, dataset: DatasetDir) -> int:
    if config.method == "bce":
        return 0
    last_step = config.max_epochs * steps_per_epoch(dataset, config)
    if config.clsd.resolved_loss_warmup_steps >= last_step:
        raise ValueError(
            "clsd.loss_warmup_steps must be below the run's number of steps, or confidence never enters the loss. "
            f"Received: {config.clsd.resolved_loss_warmup_steps}. Allowed: less than {last_step}"
        )
    return config.clsd.resolved_loss_warmup_steps


def _training_batches(
    dataset: DatasetDir,
    config: TrainConfig,
    first_epoch: int,
    row_weights: RowValues | None,
    teacher_scores: RowValues | None,
) -> tf.data.Dataset:
    batches = input_pipeline.training_epochs(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        first_epoch=first_epoch,
        num_epochs=config.max_epochs,
        max_cache_bytes=config.max_cache_bytes,
    )
    if row_weights is not None:
        batches = input_pipeline.with_row_weights(batches, row_weights)
    if teacher_scores is not None:
        _check_scores(teacher_scores, dataset)
        batches = input_pipeline.with_teacher_scores(batches, teacher_scores)
    return batches


def _check_scores(scores: RowValues, dataset: DatasetDir) -> None:
    if len(scores.row_ids) != dataset.num_rows("train"):
        raise ArtifactError(
            f"a teacher scores every training row. Received: {len(scores.row_ids):,} scores. "
            f"Allowed: {dataset.num_rows('train'):,}. Remove {dataset.teacher_scores} to score them again"
        )


def _validation_auc(dataset: DatasetDir) -> ValidationAuc:
    batches = input_pipeline.batches(dataset, "validation", batch_size=EVALUATION_BATCH_SIZE)
    columns = input_pipeline.read_columns(dataset, "validation", ["label", "sample_weight"])
    return ValidationAuc(batches.cache(), columns["label"], columns["sample_weight"])
