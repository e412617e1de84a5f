"""Assembly of a training run: config -> model -> work directory."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import tensorflow as tf

from clsd_tf import input_pipeline
from clsd_tf.artifacts import ArtifactError, DatasetDir, WorkDir, write_json
from clsd_tf.backbones import build_backbone
from clsd_tf.callbacks import (
    CheckpointAndStop,
    EpochScalars,
    ProgressBar,
    StopOnNonFiniteLoss,
    ValidationAuc,
    best_weights,
)
from clsd_tf.clsd import AdGate, ClsdConfig, ClsdModel
from clsd_tf.hashing import mix_row_ids
from clsd_tf.input_pipeline import RowValues
from clsd_tf.model_inputs import ModelInputs
from clsd_tf.validation import SpecError, StrictModel, explain_validation_error, parse_yaml, parse_yaml_mapping

_EVALUATION_BATCH_SIZE = 4096
_FOLD_SEED_STEP = 1000  # Fold models must not share the seed of the model they teach, nor of other seeds' folds.


class TrainConfig(StrictModel):
    """A training run, complete: written to the work directory as it was resolved.

    Attributes:
      method: ``clsd`` weights clicks as ``clsd`` says; ``bce`` trains the same model with plain BCE.
      backbone: a name in ``clsd_tf.backbones.BACKBONES``.
      embedding_dim: size of each field's embedding.
      hidden_units: units of the backbone's hidden layers.
      dropout: rate after each hidden layer, in [0, 1).
      batch_size: examples per optimizer step.
      learning_rate: of Adam, for the backbone.
      ad_gate_learning_rate: of Adam, for AdGate.
      max_epochs: passes over the training split at most.
      patience_epochs: stop after this many epochs without a better validation AUC.
      seed: of initial weights, row order and folds.
      clsd: how clicks are weighted.
    """

    method: Literal["bce", "clsd"] = "clsd"
    backbone: str = "deepfm"
    embedding_dim: int = pydantic.Field(10, ge=1)
    hidden_units: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = (128, 64)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    batch_size: int = pydantic.Field(512, ge=1)
    learning_rate: float = pydantic.Field(2e-3, gt=0)
    ad_gate_learning_rate: float = pydantic.Field(1e-3, gt=0)
    max_epochs: int = pydantic.Field(10, ge=1)
    patience_epochs: int = pydantic.Field(2, ge=1)
    seed: int = pydantic.Field(1, ge=0)
    clsd: ClsdConfig = ClsdConfig()

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @property
    def uses_cross_fit(self) -> bool:
        return self.method == "clsd" and self.clsd.teacher == "cross_fit"


def load_config(path: str | None, assignments: Sequence[str]) -> TrainConfig:
    """Reads a YAML config (defaults if None) and applies ``key=value`` assignments, ``clsd.mu=0.3`` for nested keys.

    Raises:
      SpecError: unknown key or value out of range; says what is allowed.
    """
    content = parse_yaml_mapping(pathlib.Path(path).read_text(encoding="utf-8"), path) if path is not None else {}
    for assignment in assignments:
        _assign(content, assignment)
    return parse_config(content, path or "--set")


def _assign(content: dict[str, Any], assignment: str) -> None:
    """Applies ``a.b=value`` to nested mappings."""
    key, separator, value = assignment.partition("=")
    if not separator:
        raise SpecError(f"--set takes key=value. Received: {assignment!r}. For example: --set clsd.mu=0.3")
    *parents, leaf = key.split(".")
    node = content
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SpecError(f"--set {assignment}: {parent} is a single value. Received: {key!r}")
    node[leaf] = parse_yaml(value, f"--set {assignment}")


def parse_config(content: dict[str, Any], source: str) -> TrainConfig:
    """Checks a config; errors as ``load_config``."""
    try:
        return TrainConfig.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, TrainConfig, source)) from error


def make_deterministic() -> None:
    """Makes TensorFlow's ops give the same bits on every run of this process; call it before anything is built."""
    tf.config.experimental.enable_op_determinism()


def teacher_warning(config: TrainConfig) -> str | None:
    """What to tell a user whose teacher is overconfident, or None."""
    if config.method != "clsd" or config.clsd.teacher != "self" or config.max_epochs == 1:
        return None
    return (
        "from the second epoch on, teacher=self judges clicks that it was trained on, and is overconfident. "
        f"Received: max_epochs={config.max_epochs}. Use clsd.teacher=cross_fit or max_epochs=1"
    )


def build_model(config: TrainConfig, inputs: ModelInputs) -> ClsdModel:
    """A compiled model with all its variables; the same seed gives the same initial weights for every method."""
    tf.keras.utils.set_random_seed(config.seed)
    backbone = build_backbone(
        config.backbone,
        inputs,
        embedding_dim=config.embedding_dim,
        hidden_units=config.hidden_units,
        dropout=config.dropout,
    )
    ad_gate = AdGate(inputs.groups) if inputs.groups else None
    model = ClsdModel(backbone, ad_gate, _effective_clsd(config))
    model.compile(
        tf.keras.optimizers.Adam(config.learning_rate),
        ad_gate_optimizer=tf.keras.optimizers.Adam(config.ad_gate_learning_rate),
    )
    _build_variables(model, inputs)
    return model


def _effective_clsd(config: TrainConfig) -> ClsdConfig:
    if config.method == "clsd":
        return config.clsd
    return config.clsd.model_copy(update={"lambda_": 0.0, "mu": 0.0, "teacher": "self"})


def _build_variables(model: ClsdModel, inputs: ModelInputs) -> None:
    """Creates weights and optimizer slots now, so that a checkpoint can be restored into them."""
    features: dict[str, tf.Tensor] = {}
    for entry in inputs.categorical:
        features[entry.name] = tf.zeros([1] if entry.max_values is None else [1, entry.max_values], tf.int64)
    features |= {name: tf.zeros([1]) for name in inputs.numeric}
    features |= {group.name: tf.zeros([1], tf.int64) for group in inputs.groups}
    model(features)
    model.debug_outputs(features)
    model.optimizer.build(model.backbone.trainable_variables)
    if model.ad_gate is not None:
        model.ad_gate_optimizer.build(model.ad_gate.trainable_variables)


def load_model(work_dir: WorkDir, dataset: DatasetDir) -> ClsdModel:
    """The model of a finished run with its best weights.

    Raises:
      ArtifactError: the run is not complete, or was trained on another dataset.
    """
    work_dir.require_complete(dataset)
    config = parse_config(work_dir.resolved_config["train"], str(work_dir.config))
    model = build_model(config, dataset.inputs)
    best_weights(model).read(str(work_dir.best_weights)).assert_consumed()
    return model


def train(
    dataset: DatasetDir,
    config: TrainConfig,
    work_dir: WorkDir,
    *,
    title: str | None = "train",
    row_weights: RowValues | None = None,
) -> list[dict[str, Any]]:
    """Runs or resumes a training run; a finished one is left as it is.

    Args:
      dataset: what to train on.
      config: the run.
      work_dir: gets config, checkpoints, history, best weights, TensorBoard events and, last, ``_SUCCESS``.
      title: what progress lines call the run; None for no progress lines.
      row_weights: weight per training row, multiplied with its sample weight.

    Returns:
      The history: one dict per epoch.

    Raises:
      ArtifactError: the work directory belongs to another config or dataset.
      ValueError: loss warm-up would never end.
      TrainingDivergedError: the loss is not finite.
    """
    first_counted_step = _loss_warmup_steps(config, dataset)
    model = build_model(config, dataset.inputs)
    with work_dir.exclusive():
        _claim(work_dir, config, dataset)  # Only now: a config that cannot run must not occupy the directory.
        keeper = CheckpointAndStop(
            work_dir, patience_epochs=config.patience_epochs, first_counted_step=first_counted_step
        )
        first_epoch = keeper.resume(model)
        if work_dir.is_complete:
            return keeper.history
        if first_epoch < config.max_epochs and not keeper.is_exhausted:
            batches = _training_batches(dataset, config, work_dir, first_epoch, row_weights, title)
            steps = steps_per_epoch(dataset, config)
            callbacks = [StopOnNonFiniteLoss(), _validation_auc(dataset), EpochScalars(work_dir), keeper]
            if title is not None:
                callbacks.append(ProgressBar(title, steps_per_epoch=steps, batch_size=config.batch_size))
            tf.keras.utils.set_random_seed(config.seed)  # Fold models may have used the random state meanwhile.
            model.fit(
                batches,
                initial_epoch=first_epoch,
                epochs=config.max_epochs,
                steps_per_epoch=steps,
                verbose=0,
                callbacks=callbacks,
            )
        work_dir.mark_complete()
        return keeper.history


def steps_per_epoch(dataset: DatasetDir, config: TrainConfig) -> int:
    return -(-dataset.num_rows("train") // config.batch_size)


def _claim(work_dir: WorkDir, config: TrainConfig, dataset: DatasetDir) -> None:
    """Writes the resolved config, or checks that the one there is the same."""
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
    if config.clsd.loss_warmup_steps >= last_step:
        raise ValueError(
            "clsd.loss_warmup_steps must be below the run's number of steps, or confidence never enters the loss. "
            f"Received: {config.clsd.loss_warmup_steps}. Allowed: less than {last_step}"
        )
    return config.clsd.loss_warmup_steps


def _training_batches(
    dataset: DatasetDir,
    config: TrainConfig,
    work_dir: WorkDir,
    first_epoch: int,
    row_weights: RowValues | None,
    title: str | None,
) -> tf.data.Dataset:
    batches = input_pipeline.training_epochs(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        first_epoch=first_epoch,
        num_epochs=config.max_epochs,
    )
    if row_weights is not None:
        batches = input_pipeline.with_row_weights(batches, row_weights)
    if config.uses_cross_fit:
        batches = input_pipeline.with_teacher_scores(batches, cross_fit_scores(dataset, config, work_dir, title))
    return batches


def _validation_auc(dataset: DatasetDir) -> ValidationAuc:
    batches = input_pipeline.batches(dataset, "validation", batch_size=_EVALUATION_BATCH_SIZE)
    columns = input_pipeline.read_columns(dataset, "validation", ["label", "sample_weight"])
    return ValidationAuc(batches.cache(), columns["label"], columns["sample_weight"])


def predict(model: ClsdModel, dataset: DatasetDir, split: str) -> np.ndarray:
    """pctr of every row of a split, in file order, float32 [num_rows]."""
    batches = input_pipeline.batches(dataset, split, batch_size=_EVALUATION_BATCH_SIZE)
    return model.predict(batches, verbose=0)


def cross_fit_scores(
    dataset: DatasetDir, config: TrainConfig, work_dir: WorkDir, title: str | None = "train"
) -> RowValues:
    """Out-of-fold scores: each training row is scored by a BCE model that never saw it.

    Rows are assigned to ``num_folds`` folds by a seeded hash of their id. The fold models are runs of their own in
    ``work_dir/cross_fit``, so a killed job keeps the folds that are done.
    """
    if work_dir.teacher_scores.exists():
        with np.load(work_dir.teacher_scores, allow_pickle=False) as stored:
            return RowValues(stored["row_ids"], stored["values"])
    row_ids = input_pipeline.read_columns(dataset, "train", ["row_id"])["row_id"]
    num_folds = config.clsd.num_folds
    folds = mix_row_ids(row_ids, config.seed) % np.uint64(num_folds)
    scores = np.zeros(len(row_ids), np.float32)
    for fold in range(num_folds):
        held_out = folds == fold
        fold_dir = WorkDir(work_dir.path / "cross_fit" / f"fold_{fold}")
        fold_config = config.model_copy(update={"method": "bce", "seed": config.seed + (fold + 1) * _FOLD_SEED_STEP})
        weights = RowValues(row_ids, (~held_out).astype(np.float32))
        fold_title = title and f"{title}: teacher fold {fold + 1}/{num_folds}"
        train(dataset, fold_config, fold_dir, title=fold_title, row_weights=weights)
        scores[held_out] = predict(load_model(fold_dir, dataset), dataset, "train")[held_out]
    temporary = work_dir.teacher_scores.with_suffix(".incomplete.npz")
    np.savez(temporary, row_ids=row_ids, values=scores)
    temporary.rename(work_dir.teacher_scores)
    return RowValues(row_ids, scores)
