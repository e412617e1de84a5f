"""The fit loop of a training run: batches, callbacks, and going on where a killed run was."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.commands.interruption import Sigterm
from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import RowValues, Shard
from clsd_tf.distributed.strategies import distributed, in_turn, is_chief, scope, wait_for_all
from clsd_tf.methods.clsd import ClsdModel, OverconfidentTeacherWarning
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import EVALUATION_BATCH_SIZE, build_model
from clsd_tf.training.callbacks import ProgressBar, Scalars, StopOnNonFiniteLoss, ValidationAuc
from clsd_tf.training.checkpoints import CheckpointAndStop, read_best_weights
from clsd_tf.training.config import TrainConfig
from clsd_tf.training.lineage import TrainedOn, lineage
from clsd_tf.training.warm_start import warm_start


def fit(
    dataset: DatasetDir,
    config: TrainConfig,
    work_dir: WorkDir,
    *,
    title: str | None,
    init_from: WorkDir | None = None,
    row_weights: RowValues | None = None,
    teacher_scores: Callable[[], RowValues | None] = lambda: None,
    strategy: tf.distribute.Strategy | None = None,
) -> tuple[ClsdModel, list[dict[str, Any]]]:
    """Fits a model, or goes on with the fit that ``work_dir`` holds, from the batch behind its newest checkpoint.

    Without a strategy, a resumed fit ends with the same bits as one that was never killed, on the same machine, if all
    that is random in the backbone is in Keras layers or in a ``tf.random.Generator``. With replicas in lockstep it ends
    with the same up to rounding: a checkpoint holds the sums over replicas, each of which goes on with an equal part.
    With parameter servers no two fits are the same.

    Args:
      dataset: what to train on.
      config: the run.
      work_dir: gets config, checkpoints, history, best weights and TensorBoard events.
      title: what progress lines call the run; None for no progress lines.
      init_from: a finished run to go on from, see ``warm_start``; needed until the first checkpoint is there, and
        checked against the lineage where it is given.
      row_weights: weight per training row, multiplied with its sample weight.
      teacher_scores: gives the scores of every training row, or None where the teacher scores in the training step.
        Called once everything else is known to be in order: a teacher may train for hours.
      strategy: of ``distribution.create_strategy``. Every worker calls this, with a work directory that they share;
        only the chief writes to it.

    Returns:
      The model with its best weights, and the history: one dict per epoch.

    Raises:
      ArtifactError: the work directory belongs to another config, dataset or lineage; its checkpoints cannot be read;
        or ``init_from`` does not fit.
      CheckpointError: a checkpoint could not be written.
      TrainingDivergedError, ConfidenceGuardError: the run went wrong.
      TrainingInterruptedError: SIGTERM came while steps were running; they are saved.
      ValueError: loss warm-up would never end, or the learning rate has fallen to 0 before the first step.
    """
    _check_penalty(config, strategy)
    with scope(strategy):
        model = build_model(config, dataset.inputs)
    if not work_dir.has_checkpoint:
        if init_from is not None:
            warm_start(model, config, dataset, init_from)
        first_step = int(model.optimizer.iterations.numpy())
        _require_loss_warmup_to_end(config, dataset, first_step)
        _require_learning_rate(config, first_step)
    # Only now, or what cannot run would occupy it.
    in_turn(strategy, lambda: claim(work_dir, config, dataset, init_from))
    steps, sigterm = steps_per_epoch(dataset, config), Sigterm()
    keeper = CheckpointAndStop(
        work_dir,
        config,
        steps_per_epoch=steps,
        first_counted_step=_loss_warmup_steps(config),
        sigterm=sigterm,
        is_chief=is_chief(strategy),
    )
    with scope(strategy):
        keeper.resume(model)
    if _is_unfinished(keeper, config):
        batches_from = functools.partial(_training_batches, dataset, config, row_weights, teacher_scores())
        tf.keras.utils.set_random_seed(config.seed)  # Fold models may have used the random state meanwhile.
        with sigterm, _callbacks(keeper, dataset, config, work_dir, title, strategy) as callbacks:
            _fit_epochs(model, keeper, config, steps, batches_from, callbacks, strategy)
    wait_for_all(strategy)  # The chief may still be writing.
    read_best_weights(model, work_dir)
    return model, keeper.state.history


def _is_unfinished(keeper: CheckpointAndStop, config: TrainConfig) -> bool:
    return keeper.state.epoch < config.max_epochs and not keeper.is_exhausted


def _fit_epochs(
    model: ClsdModel,
    keeper: CheckpointAndStop,
    config: TrainConfig,
    steps: int,
    batches_from: Callable[[int, int], tf.data.Dataset],
    callbacks: list[tf.keras.callbacks.Callback],
    strategy: tf.distribute.Strategy | None,
) -> None:
    while _is_unfinished(keeper, config):
        epoch, steps_done = keeper.state.epoch, keeper.state.steps_done
        # All epochs of a Keras fit have the same number of steps: the rest of an interrupted one is a fit of its own.
        end = epoch + 1 if steps_done else config.max_epochs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OverconfidentTeacherWarning)  # Commands say it once, before all runs.
            model.fit(
                distributed(strategy, functools.partial(batches_from, epoch, steps_done)),
                initial_epoch=epoch,
                epochs=end,
                steps_per_epoch=steps - steps_done,
                verbose=0,
                callbacks=callbacks,
            )


@contextlib.contextmanager
def _callbacks(
    keeper: CheckpointAndStop,
    dataset: DatasetDir,
    config: TrainConfig,
    work_dir: WorkDir,
    title: str | None,
    strategy: tf.distribute.Strategy | None,
) -> Iterator[list[tf.keras.callbacks.Callback]]:
    """In the order in which they act; the bar ends with the context, since Keras does not tell callbacks of errors."""
    callbacks = [StopOnNonFiniteLoss(), _validation_auc(dataset, strategy)]
    if is_chief(strategy):
        callbacks.append(Scalars(work_dir, batch_size=config.batch_size))
    callbacks.append(keeper)
    with contextlib.ExitStack() as stack:
        if title is not None and is_chief(strategy):
            steps = steps_per_epoch(dataset, config)
            bar = ProgressBar(title, steps_per_epoch=steps, batch_size=config.batch_size)
            callbacks.append(stack.enter_context(contextlib.closing(bar)))
        yield callbacks


def steps_per_epoch(dataset: DatasetDir, config: TrainConfig) -> int:
    return -(-dataset.num_rows("train") // config.batch_size)


def claim(work_dir: WorkDir, config: TrainConfig, dataset: DatasetDir, init_from: WorkDir | None = None) -> None:
    """Writes resolved config, lineage and what ids mean, or checks that those there give the same result.

    Without ``init_from``, a run that has a checkpoint goes on whatever it began with.

    Raises:
      ArtifactError: the directory belongs to another config, dataset or lineage.
    """
    resolved = {"train": config.to_dict(), "dataset_fingerprint": dataset.fingerprint}
    if not work_dir.config.exists():
        work_dir.path.mkdir(parents=True, exist_ok=True)
        write_json(work_dir.trained_on, TrainedOn.of(dataset).to_dict())
        write_json(work_dir.lineage, lineage(dataset, init_from))
        write_json(work_dir.config, resolved)
        return
    work_dir.require_same_dataset(dataset)
    there = work_dir.resolved_config["train"]
    changed = {key: value for key, value in config.result_settings.items() if there.get(key) != value}
    if changed:
        allowed = {key: there.get(key) for key in changed}
        raise ArtifactError(
            f"{work_dir.path} belongs to a run with another config. Received: {changed}. Allowed: {allowed}. "
            "Choose another --work_dir"
        )
    if init_from is None and (work_dir.has_checkpoint or work_dir.is_complete):
        return  # All that it needs of an earlier run is here.
    ancestors, allowed = lineage(dataset, init_from)["ancestors"], read_json(work_dir.lineage)["ancestors"]
    if ancestors != allowed:
        raise ArtifactError(
            f"{work_dir.path} belongs to a run that goes on from another. Received: --init_from with fingerprint "
            f"{_last_fingerprint(ancestors)}. Allowed: {_last_fingerprint(allowed)}. Give that --init_from again, or "
            "choose another --work_dir"
        )


def _check_penalty(config: TrainConfig, strategy: tf.distribute.Strategy | None) -> None:
    if strategy is None or strategy.num_replicas_in_sync == 1 or not config.embedding_l2:
        return
    if config.embedding_l2_rows == "touched":
        raise ValueError(
            "a penalty on touched rows would depend on how replicas divide the batch. Received: "
            f"embedding_l2_rows=touched, {strategy.num_replicas_in_sync} replicas. Use embedding_l2_rows=all or "
            "embedding_l2=0"
        )


def _last_fingerprint(ancestors: Sequence[Mapping[str, Any]]) -> str | None:
    return ancestors[-1]["work_fingerprint"] if ancestors else None


def _loss_warmup_steps(config: TrainConfig) -> int:
    return 0 if config.method == "bce" else config.clsd.resolved_loss_warmup_steps


def _require_loss_warmup_to_end(config: TrainConfig, dataset: DatasetDir, first_step: int) -> None:
    last_step = first_step + config.max_epochs * steps_per_epoch(dataset, config)
    if _loss_warmup_steps(config) >= last_step:
        raise ValueError(
            "clsd.loss_warmup_steps must be below the run's number of steps, or confidence never enters the loss. "
            f"Received: {config.clsd.resolved_loss_warmup_steps}. Allowed: less than {last_step}"
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
    dataset: DatasetDir,
    config: TrainConfig,
    row_weights: RowValues | None,
    teacher_scores: RowValues | None,
    first_epoch: int,
    first_step: int,
    shard: Shard,
    joined: int,
) -> tf.data.Dataset:
    batches = input_pipeline.training_epochs(
        dataset,
        batch_size=joined * config.batch_size,
        seed=config.seed,
        first_epoch=first_epoch,
        num_epochs=config.max_epochs,
        first_step=first_step // joined,
        shard=shard,
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


def _validation_auc(dataset: DatasetDir, strategy: tf.distribute.Strategy | None) -> ValidationAuc:
    batches = input_pipeline.batches(dataset, "validation", batch_size=EVALUATION_BATCH_SIZE)
    columns = input_pipeline.read_columns(dataset, "validation", ["label", "sample_weight"])
    return ValidationAuc(batches.cache(), columns["label"], columns["sample_weight"], strategy)
