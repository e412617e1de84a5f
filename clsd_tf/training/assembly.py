"""Config -> model: built anew, or loaded from a finished run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from clsd_tf.backbones import build_backbone
from clsd_tf.data import input_pipeline
from clsd_tf.layers.calibration import Calibration, CalibrationLayer
from clsd_tf.layers.losses import bce_from_logits, focal_loss, label_smoothed_bce
from clsd_tf.methods.clsd import AdGate, ClsdModel
from clsd_tf.optimizers.row_sparse import build_optimizer
from clsd_tf.spec.model_inputs import ModelInputs
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.checkpoints import read_best_weights
from clsd_tf.training.config import TrainConfig, parse_config

EVALUATION_BATCH_SIZE = 4096
_EMBEDDING_SETTINGS = (
    "embedding_l2", "embedding_l2_rows", "embedding_initializer", "embedding_init_scale", "unified_buckets",
)  # fmt: skip
_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # Keras' names.


def make_deterministic() -> None:
    """Makes TensorFlow's ops give the same bits on every run of this process; call it before anything is built."""
    tf.config.experimental.enable_op_determinism()


def build_model(config: TrainConfig, inputs: ModelInputs) -> ClsdModel:
    """A compiled model with all its variables; the same seed gives the same initial weights for every method."""
    # A generator per random layer, which checkpoints can hold: before any layer is made.
    tf.keras.backend.experimental.enable_tf_random_generator()
    tf.keras.utils.set_random_seed(config.seed)
    clsd, features = config.effective_clsd, _example_features(inputs)
    with _precision(config.precision):
        backbone = _build_backbone(config, inputs)
        teacher_backbone = _build_backbone(config, inputs) if clsd.teacher == "ema" else None
        for model in (backbone, teacher_backbone):
            if model is not None:
                model(features)  # Within: layers may make others when they are first called.
    model = ClsdModel(
        backbone,
        AdGate(inputs, clsd.ad_gate) if clsd.mu > 0 else None,
        clsd,
        loss_function=_loss_function(config),
        teacher_backbone=teacher_backbone,
    )
    model.debug_outputs(features)
    # A checkpoint can only be restored into slots that exist.
    model.compile(build_optimizer(config.optimizer, config.learning_rate, backbone))
    model.optimizer.build(backbone.trainable_variables)
    if model.ad_gate is not None:
        model.ad_gate_optimizer.build(model.ad_gate.trainable_variables)
    return model


@contextlib.contextmanager
def _precision(precision: str) -> Iterator[None]:
    """Layers made within compute in that precision; their variables are float32 in any case."""
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(_POLICIES[precision])
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)


def _build_backbone(config: TrainConfig, inputs: ModelInputs) -> tf.keras.Model:
    # A user's own factory need not know of these settings until they are asked for.
    defaults = TrainConfig.model_fields
    asked_for = {name: getattr(config, name) for name in _EMBEDDING_SETTINGS}
    asked_for = {name: value for name, value in asked_for.items() if value != defaults[name].default}
    return build_backbone(
        config.backbone,
        inputs,
        embedding_dim=config.embedding_dim,
        hidden_units=config.hidden_units,
        dropout=config.dropout,
        **asked_for,
        **config.backbone_arguments,
    )


def _loss_function(config: TrainConfig) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    if config.loss == "label_smoothing":
        return functools.partial(label_smoothed_bce, smoothing=config.label_smoothing)
    if config.loss == "focal":
        return functools.partial(focal_loss, gamma=config.focal_gamma)
    return bce_from_logits


def _example_features(inputs: ModelInputs) -> dict[str, tf.Tensor]:
    """One row of zeros: a model that has seen it has all its variables."""
    features: dict[str, tf.Tensor] = {"teacher_score": tf.zeros([1])}
    for entry in inputs.categorical:
        features[entry.name] = tf.zeros([1] if entry.num_ids is None else [1, entry.num_ids], tf.int64)
    features |= {name: tf.zeros([1]) for name in inputs.numeric}
    return features | {group.name: tf.zeros([1], tf.int64) for group in inputs.groups}


def load_model(work_dir: WorkDir, dataset: DatasetDir) -> ClsdModel:
    """The model of a finished run with its best weights and its calibration.

    Raises:
      ArtifactError: the run is not complete or damaged, or was trained on another dataset.
    """
    work_dir.require_complete(dataset)
    return restored_model(work_dir, dataset.inputs)


def restored_model(work_dir: WorkDir, inputs: ModelInputs) -> ClsdModel:
    """As ``load_model``, for a run that has finished, given the inputs that it was trained on."""
    config = parse_config(work_dir.resolved_config["train"], str(work_dir.config))
    model = build_model(config, inputs)
    read_best_weights(model, work_dir)
    if config.calibration.method != "none":
        if not work_dir.calibration.is_file():
            raise ArtifactError(f"{work_dir.path} has lost its calibration. Missing: {work_dir.calibration.name}")
        model.calibration = CalibrationLayer(Calibration.from_dict(read_json(work_dir.calibration)))
    return model


def predict(model: ClsdModel, dataset: DatasetDir, split: str) -> np.ndarray:
    """pctr of every row of a split, in file order, float32 [num_rows]."""
    batches = input_pipeline.batches(dataset, split, batch_size=EVALUATION_BATCH_SIZE)
    return model.predict(batches, verbose=0)


def predict_logits(model: ClsdModel, dataset: DatasetDir, split: str) -> np.ndarray:
    """Logits of every row of a split before calibration, in file order, float32 [num_rows]."""
    batches = input_pipeline.batches(dataset, split, batch_size=EVALUATION_BATCH_SIZE)
    # Not traced: for a pass over large batches, tracing would take longer than it saves.
    return np.concatenate([model.logits(features).numpy() for features, _, _ in batches])
