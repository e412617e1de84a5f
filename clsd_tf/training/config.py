"""The configuration of a training run: read, checked, and kept as it was resolved."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from clsd_tf.data.input_pipeline import MAX_CACHE_BYTES
from clsd_tf.layers.calibration import CalibrationConfig
from clsd_tf.layers.embeddings import Initializer, L2Rows
from clsd_tf.methods.clsd.config import ONLINE_TEACHERS, ClsdConfig
from clsd_tf.optimizers.config import OptimizerConfig
from clsd_tf.spec.validation import SpecError, StrictModel, explain_validation_error, parse_yaml, parse_yaml_mapping

_WITHOUT_INFLUENCE = (
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "checkpoints_to_keep",
    "max_cache_bytes",
)


class TrainConfig(StrictModel):
    """A training run, complete: written to the work directory as it was resolved.

    Attributes:
      method: ``clsd`` weights clicks as ``clsd`` says; ``bce`` counts every click the same.
      loss: of each row. ``bce``, or two of its variants that studies compare with.
      label_smoothing: of ``loss: label_smoothing``, in [0, 1).
      focal_gamma: of ``loss: focal``, >= 0.
      clicks: ``all``, or only ``intense`` ones: clicks without the intensity label are left out. Not for production,
        it is the oracle of a study.
      backbone: a name in ``clsd_tf.backbones.BACKBONES``.
      backbone_arguments: the backbone's own arguments, by name.
      embedding_dim: size of each field's embedding.
      embedding_l2: the loss gets embedding_l2 * the sum of squares of embedding tables, >= 0.
      embedding_l2_rows: ``all`` rows, which makes every step as slow as the tables are large; or those ``touched`` by
        the batch, each once: another objective, under which frequent rows decay more.
      embedding_initializer: of the tables, ``normal`` or ``uniform``.
      embedding_init_scale: standard deviation, or largest absolute value, > 0.
      unified_buckets: all vocabularies share one hashed table of that many rows; null: a row for each value.
      hidden_units: units of the backbone's hidden layers.
      dropout: rate after each hidden layer, in [0, 1).
      batch_size: examples per optimizer step.
      learning_rate: for the backbone.
      optimizer: its rules, schedule and clipping.
      precision: what the backbone's layers compute in, in training and serving. ``bfloat16`` is faster where the CPU
        has instructions for it. Variables, optimizer state, logits and loss stay float32.
      max_epochs: passes over the training split at most.
      patience_epochs: stop after this many epochs without a better validation AUC, and keep the best epoch's weights;
        null trains max_epochs whatever the validation says and keeps the last.
      seed: of initial weights, row order and folds.
      checkpoint_every_steps: optimizer steps between two checkpoints; null for none but the others.
      checkpoint_every_minutes: minutes between two checkpoints, > 0; null for none but the others. Each epoch ends with
        one in any case; with ``--strategy=parameter_server`` there are no others, whatever these two say.
      checkpoints_to_keep: how many of the newest checkpoints stay, >= 1.
      max_cache_bytes: a training split of at most this size, 8 bytes an id and 4 a number, is parsed once and held in
        memory; 0 reads its files in each epoch. Results are the same.
      clsd: how clicks are weighted.
      calibration: fitted on the validation split after training; part of the model from then on.
    """

    method: Literal["bce", "clsd"] = "clsd"
    loss: Literal["bce", "label_smoothing", "focal"] = "bce"
    label_smoothing: float = pydantic.Field(0.1, ge=0, lt=1)
    focal_gamma: float = pydantic.Field(1.0, ge=0)
    clicks: Literal["all", "intense"] = "all"
    backbone: str = "deepfm"
    backbone_arguments: dict[str, Any] = pydantic.Field(default_factory=dict)
    embedding_dim: int = pydantic.Field(10, ge=1)
    embedding_l2: float = pydantic.Field(0.0, ge=0)
    embedding_l2_rows: L2Rows = "all"
    embedding_initializer: Initializer = "normal"
    embedding_init_scale: float = pydantic.Field(0.01, gt=0)
    unified_buckets: int | None = pydantic.Field(None, ge=1)
    hidden_units: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = (128, 64)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    batch_size: int = pydantic.Field(512, ge=1)
    learning_rate: float = pydantic.Field(2e-3, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["float32", "bfloat16"] = "float32"
    max_epochs: int = pydantic.Field(10, ge=1)
    patience_epochs: int | None = pydantic.Field(2, ge=1)
    seed: int = pydantic.Field(1, ge=0)
    checkpoint_every_steps: int | None = pydantic.Field(None, ge=1)
    checkpoint_every_minutes: float | None = pydantic.Field(10.0, gt=0)
    checkpoints_to_keep: int = pydantic.Field(2, ge=1)
    max_cache_bytes: int = pydantic.Field(MAX_CACHE_BYTES, ge=0)
    clsd: ClsdConfig = ClsdConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @property
    def result_settings(self) -> dict[str, Any]:
        """``to_dict`` without the settings that do not change the result: how often it is saved, what is cached."""
        return {name: value for name, value in self.to_dict().items() if name not in _WITHOUT_INFLUENCE}

    @property
    def effective_clsd(self) -> ClsdConfig:
        """``clsd``, or nothing of it where the method is ``bce``."""
        if self.method == "clsd":
            return self.clsd
        return self.clsd.model_copy(update={"lambda_": 0.0, "mu": 0.0, "teacher": "self"})

    @property
    def uses_stored_scores(self) -> bool:
        """Whether the teacher scores all rows before training begins."""
        return self.method == "clsd" and self.clsd.teacher not in ONLINE_TEACHERS


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


def teacher_warning(config: TrainConfig) -> str | None:
    """What to tell a user whose teacher is overconfident, or None."""
    return config.effective_clsd.teacher_warning(config.max_epochs)
