"""The fit loop of a training run: batches, callbacks, and going on where a killed run was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.commands.interruption import Sigterm
from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import RowValues, Shard
from clsd_tf.distributed.strategies import distributed, in_turn, is_chief, scope, wait_for_all
from clsd_tf.methods import method_of
from clsd_tf.methods.method import Method, MethodWarning
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import EVALUATION_BATCH_SIZE, build_model
from clsd_tf.training.best_epoch import read_best_weights
from clsd_tf.training.callbacks import ProgressBar, Scalars, StopOnNonFiniteLoss, ValidationMetrics
from clsd_tf.training.claim import claim
from clsd_tf.training.config import TrainConfig
from clsd_tf.training.save_and_stop import SaveAndStop
from clsd_tf.training.warm_start import warm_start


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run that may begin: checked, its work directory claimed, its model built or restored.

    Attributes:
      method: of the config.
      is_chief: whether this process writes: False for workers beside the chief.
      steps_per_epoch: optimizer steps of an epoch.
      keeper: saves the run, and knows how far it is.
    """

    dataset: DatasetDir
    config: TrainConfig
    work_dir: WorkDir
    strategy: tf.distribute.Strategy | None
    method: Method[Any]
    model: MethodModel
    is_chief: bool
    steps_per_epoch: int
    keeper: SaveAndStop
    sigterm: Sigterm


def prepare(
    dataset: DatasetDir,
    config: TrainConfig,
    work_dir: WorkDir,
    *,
    init_from: WorkDir | None = None,
    strategy: tf.distribute.Strategy | None = None,
) -> PreparedRun:
    """Checks all that can be checked before hours of training, and builds the model or restores it.

    Args:
      dataset: what to train on.
      config: the run.
      work_dir: gets config, checkpoints, history, best weights and TensorBoard events.
      init_from: a finished run to go on from, see ``warm_start``; needed until the first checkpoint is there, and
        checked against the lineage where it is given.
      strategy: of ``strategies.create_strategy``. Every worker calls this, with a work directory that they share; only
        the chief writes to it.

    Returns:
      All that ``fit`` needs, with the model as the newest checkpoint left it.

    Raises:
      ArtifactError: the work directory belongs to another config, dataset or lineage; its checkpoints cannot be read;
        or ``init_from`` does not fit.
      ValueError: the config does not fit the dataset, loss warm-up would never end, or the learning rate has fallen to
        0 before the first step.
    """
    method = method_of(config.method)
    _check_records(method, config, dataset)
    method.check_dataset(config.method, dataset.spec.intensity_label is not None)
    _check_penalty(config, strategy)
    steps = steps_per_epoch(dataset, config)
    with scope(strategy):
        model = build_model(config, dataset.inputs)
    if not work_dir.has_checkpoint:
        if init_from is not None:
            warm_start(model, config, dataset, init_from)
        first_step = int(model.optimizer.iterations.numpy())
        method.check_steps(config.method, first_step + config.max_epochs * steps)
        _require_learning_rate(config, first_step)
    # Only now, or what cannot run would occupy it.
    in_turn(strategy, lambda: claim(work_dir, config, dataset, init_from))
    sigterm, writes = Sigterm(), is_chief(strategy)
    keeper = SaveAndStop(work_dir, config, steps_per_epoch=steps, sigterm=sigterm, is_chief=writes)
    with scope(strategy):
        keeper.resume(model)
    return PreparedRun(dataset, config, work_dir, strategy, method, model, writes, steps, keeper, sigterm)


def fit(
    run: PreparedRun,
    *,
    title: str | None,
    row_weights: RowValues | None = None,
    teacher_scores: Mapping[str, RowValues] | None = None,
) -> list[dict[str, Any]]:
    """Fits a prepared run from the batch behind its newest checkpoint; its model then has the best weights.

    Without a strategy, a resumed fit ends with the same bits as one that was never killed, on the same machine, if all
    that is random in the backbone is in Keras layers or in a ``tf.random.Generator``. With replicas in lockstep it ends
    with the same up to rounding: a checkpoint holds the sums over replicas, each of which goes on with an equal part.
    With parameter servers no two fits are the same.

    Args:
      run: from ``prepare``.
      title: what progress lines call the run; None for no progress lines.
      row_weights: weight per training row, multiplied with its sample weight; rows that the method leaves out get 0 as
        well.
      teacher_scores: feature name -> the scores of every training row.

    Returns:
      The history: one dict per epoch.

    Raises:
      ArtifactError: a training row has no score.
      CheckpointError: a checkpoint could not be written.
      TrainingDivergedError, MethodGuardError: the run went wrong.
      TrainingInterruptedError: SIGTERM came while steps were running; they are saved.
    """
    for scores in (teacher_scores or {}).values():
        _check_scores(scores, run.dataset)
    if not run.keeper.is_finished:
        weights = [found for found in (row_weights, _weights_of_kept_rows(run)) if found is not None]
        batches_from = functools.partial(_training_batches, run, weights, teacher_scores or {})
        with run.sigterm, _callbacks(run, title) as callbacks:
            _fit_epochs(run, batches_from, callbacks)
    wait_for_all(run.strategy)  # The chief may still be writing.
    read_best_weights(run.model, run.work_dir)
    return run.keeper.state.history


def _fit_epochs(
    run: PreparedRun,
    batches_from: Callable[[int, int, Shard, int], tf.data.Dataset],
    callbacks: list[tf.keras.callbacks.Callback],
) -> None:
    while not run.keeper.is_finished:
        epoch, steps_done = run.keeper.state.epoch, run.keeper.state.steps_done
        # All epochs of a Keras fit have the same number of steps: the rest of an interrupted one is a fit of its own.
        end = epoch + 1 if steps_done else run.config.max_epochs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MethodWarning)  # Commands say it once, before all runs.
            run.model.fit(
                distributed(run.strategy, functools.partial(batches_from, epoch, steps_done)),
                initial_epoch=epoch,
                epochs=end,
                steps_per_epoch=run.steps_per_epoch - steps_done,
                verbose=0,
                callbacks=callbacks,
            )


@contextlib.contextmanager
def _callbacks(run: PreparedRun, title: str | None) -> Iterator[list[tf.keras.callbacks.Callback]]:
    """In the order in which they act; the bar ends with the context, since Keras does not tell callbacks of errors."""
    config, objective = run.config, run.method.objective
    callbacks = [StopOnNonFiniteLoss(), _validation(run)]
    if run.is_chief:
        callbacks.append(Scalars(run.work_dir, batch_size=config.batch_size))
    callbacks.append(run.keeper)
    with contextlib.ExitStack() as stack:
        if title is not None and run.is_chief:
            bar = ProgressBar(title, objective, steps_per_epoch=run.steps_per_epoch, batch_size=config.batch_size)
            callbacks.append(stack.enter_context(contextlib.closing(bar)))
        yield callbacks


def _validation(run: PreparedRun) -> ValidationMetrics:
    batches = input_pipeline.batches(run.dataset, "validation", batch_size=EVALUATION_BATCH_SIZE)
    fields = input_pipeline.read_columns(run.dataset, "validation", list(run.method.validation_fields))
    return ValidationMetrics(batches.cache(), fields, run.method.validate, run.strategy)


def steps_per_epoch(dataset: DatasetDir, config: TrainConfig) -> int:
    """Counts the optimizer steps of an epoch; the last batch may be smaller.

    Args:
      dataset: to train on.
      config: of the run.

    Returns:
      >= 1 where the training split has rows.
    """
    return -(-dataset.num_rows("train") // config.batch_size)


def _check_records(method: Method[Any], config: TrainConfig, dataset: DatasetDir) -> None:
    if method.record_kind not in dataset.record_kinds:
        raise ValueError(
            f"a dataset must hold what the method trains on. Received: method {config.method.name}, which trains on "
            f"records of the kind {method.record_kind}. Allowed for {dataset.path}: {', '.join(dataset.record_kinds)}"
        )


def _check_penalty(config: TrainConfig, strategy: tf.distribute.Strategy | None) -> None:
    if strategy is None or strategy.num_replicas_in_sync == 1 or not config.embeddings.l2:
        return
    if config.embeddings.l2_rows == "touched":
        raise ValueError(
            "a penalty on touched rows would depend on how replicas divide the batch. Received: "
            f"embeddings.l2_rows=touched, {strategy.num_replicas_in_sync} replicas. Use embeddings.l2_rows=all or "
            "embeddings.l2=0"
        )


def _require_learning_rate(config: TrainConfig, first_step: int) -> None:
    decay_steps = config.optimizer.lr_decay_steps
    if decay_steps is not None and decay_steps <= first_step:
        raise ValueError(
            "optimizer.lr_decay_steps counts the steps of earlier runs too; the learning rate would be 0 throughout. "
            f"Received: {decay_steps}, for a run that goes on from step {first_step}. Allowed: more than {first_step}. "
            "Raise it, or set optimizer.schedule=constant and optimizer.lr_decay_steps=null"
        )


def _training_batches(
    run: PreparedRun,
    row_weights: Sequence[RowValues],
    teacher_scores: Mapping[str, RowValues],
    first_epoch: int,
    first_step: int,
    shard: Shard,
    joined: int,
) -> tf.data.Dataset:
    batches = input_pipeline.training_epochs(
        run.dataset,
        batch_size=joined * run.config.batch_size,
        seed=run.config.seed,
        first_epoch=first_epoch,
        num_epochs=run.config.max_epochs,
        first_step=first_step // joined,
        shard=shard,
        labels=run.method.labels(run.config.method),
        max_cache_bytes=run.config.max_cache_bytes,
    )
    for weights in row_weights:
        batches = input_pipeline.with_row_weights(batches, weights)
    for feature, scores in teacher_scores.items():
        batches = input_pipeline.with_teacher_scores(batches, scores, feature)
    return batches


def _weights_of_kept_rows(run: PreparedRun) -> RowValues | None:
    """Weight 0 for the rows that the method leaves out, 1 for all others; None where it takes all."""
    rows = run.method.row_filter(run.config.method)
    if rows is None:
        return None
    columns = input_pipeline.read_columns(run.dataset, "train", ["row_id", *rows.fields])
    return RowValues(columns["row_id"], rows.keep(columns).astype(np.float32))


def _check_scores(scores: RowValues, dataset: DatasetDir) -> None:
    if len(scores.row_ids) != dataset.num_rows("train"):
        raise ArtifactError(
            f"a teacher scores every training row. Received: {len(scores.row_ids):,} scores. "
            f"Allowed: {dataset.num_rows('train'):,}. Remove {dataset.teacher_scores} to score them again"
        )
