"""Config -> model: built anew, or loaded from a finished run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from clsd_tf.backbones import build_backbone
from clsd_tf.backbones.base import declared_features, example_features
from clsd_tf.data import input_pipeline
from clsd_tf.layers.calibration import Calibration, CalibrationLayer
from clsd_tf.methods import method_of
from clsd_tf.methods.method import ModelParts
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.optimizers.row_sparse import build_optimizer
from clsd_tf.spec.model_inputs import ModelInputs
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.best_epoch import read_best_weights
from clsd_tf.training.config import TrainConfig, parse_config

EVALUATION_BATCH_SIZE = 4096
_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # Keras' names.


def make_deterministic() -> None:
    """Makes TensorFlow's ops give the same bits on every run of this process; call it before anything is built."""
    tf.config.experimental.enable_op_determinism()


def build_model(config: TrainConfig, inputs: ModelInputs) -> MethodModel:
    """Builds a compiled model with all its variables.

    The same seed gives the same initial weights for every method.

    Args:
      config: of the run.
      inputs: what the transform gives.

    Returns:
      The untrained model.

    Raises:
      ValueError: the backbone or the method refuses a setting.
    """
    # A generator per random layer, which checkpoints can hold: before any layer is made.
    tf.keras.backend.experimental.enable_tf_random_generator()
    tf.keras.utils.set_random_seed(config.seed)
    example = example_features(inputs) | {run.feature: tf.zeros([1]) for run in config.teacher_runs}

    def new_backbone() -> tf.keras.Model:
        with _precision(config.precision):
            backbone = _build_backbone(config, inputs)
            backbone(declared_features(backbone, example))  # Within: layers may make others when they are first called.
        return backbone

    model = method_of(config.method).build(config.method, ModelParts(inputs, new_backbone, example))
    model.compile(build_optimizer(config.optimizer, config.learning_rate, model.parts["backbone"]))
    model.build_optimizers()
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
    return build_backbone(
        config.backbone,
        inputs,
        embeddings=config.embeddings,
        hidden_units=config.hidden_units,
        dropout=config.dropout,
        **config.backbone_arguments,
    )


def load_model(work_dir: WorkDir, dataset: DatasetDir) -> MethodModel:
    """Loads the model of a finished run with its best weights and its calibration.

    Args:
      work_dir: of the run.
      dataset: that it was trained on.

    Returns:
      The model.

    Raises:
      ArtifactError: the run is not complete or damaged, or was trained on another dataset.
    """
    work_dir.require_complete(dataset)
    return restored_model(work_dir, dataset.inputs)


def restored_model(work_dir: WorkDir, inputs: ModelInputs) -> MethodModel:
    """Loads a model as ``load_model`` does, without its dataset.

    Args:
      work_dir: of a run that has finished.
      inputs: that it was trained on.

    Returns:
      The model.

    Raises:
      ArtifactError: the run is damaged.
    """
    config = parse_config(work_dir.resolved_config["train"], str(work_dir.config))
    model = build_model(config, inputs)
    read_best_weights(model, work_dir)
    if config.calibration.method != "none":
        if not work_dir.calibration.is_file():
            raise ArtifactError(f"{work_dir.path} has lost its calibration. Missing: {work_dir.calibration.name}")
        model.calibration = CalibrationLayer(Calibration.from_dict(read_json(work_dir.calibration)))
    return model


def predict(model: MethodModel, dataset: DatasetDir, split: str) -> np.ndarray:
    """Computes ctr of every row of a split.

    Args:
      model: of a run on the dataset.
      dataset: a complete one.
      split: its name.

    Returns:
      float32 [num_rows], in file order.
    """
    batches = input_pipeline.batches(dataset, split, batch_size=EVALUATION_BATCH_SIZE)
    return model.predict(batches, verbose=0)


def predict_logits(model: MethodModel, dataset: DatasetDir, split: str) -> np.ndarray:
    """Computes the logits of every row, before calibration, of a split.

    Args:
      model: of a run on the dataset.
      dataset: a complete one.
      split: its name.

    Returns:
      float32 [num_rows], in file order.
    """
    batches = input_pipeline.batches(dataset, split, batch_size=EVALUATION_BATCH_SIZE)
    # Not traced: for a pass over large batches, tracing would take longer than it saves.
    return np.concatenate([model.logits(features).numpy() for features, _, _ in batches])
