"""The configuration of a training run: read, checked, and kept as it was resolved. No TensorFlow."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

from clsd_tf.layers.calibration_config import CalibrationConfig
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.methods import DEFAULT_METHOD, METHODS, method_of
from clsd_tf.methods.method import MethodConfig, TeacherRun
from clsd_tf.optimizers.config import OptimizerConfig
from clsd_tf.spec.validation import SpecError, StrictModel, explain_validation_error, parse_yaml, parse_yaml_mapping
from clsd_tf.training.config_of_0_1 import converted

_WITHOUT_INFLUENCE = (
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "checkpoints_to_keep",
    "max_cache_bytes",
)


class TrainConfig(StrictModel):
    """A training run, complete: written to the work directory as it was resolved.

    Attributes:
      method: its ``name`` (``clsd`` weights clicks by confidence, ``bce`` counts every click the same) and its own
        settings; a name alone takes the method's defaults.
      backbone: a name in ``clsd_tf.backbones.BACKBONES``.
      backbone_arguments: the backbone's own arguments, by name.
      embeddings: size, initial values and penalty of embedding tables.
      hidden_units: units of the backbone's hidden layers.
      dropout: rate after each hidden layer, in [0, 1).
      batch_size: examples per optimizer step.
      learning_rate: for the backbone.
      optimizer: its rules, schedule and clipping.
      precision: what the backbone's layers compute in, in training and serving. ``bfloat16`` is faster where the CPU
        has instructions for it. Variables, optimizer state, logits and loss stay float32.
      max_epochs: passes over the training split at most.
      patience_epochs: stop after this many epochs without a better value of the method's objective (validation AUC for
        methods of rows), and keep the best epoch's weights; null trains max_epochs whatever the validation says and
        keeps the last.
      seed: of initial weights, row order and folds.
      checkpoint_every_steps: optimizer steps between two checkpoints; null for none but the others.
      checkpoint_every_minutes: minutes between two checkpoints, > 0; null for none but the others. Each epoch ends with
        one in any case; with ``--strategy=parameter_server`` there are no others, whatever these two say.
      checkpoints_to_keep: how many of the newest checkpoints stay, >= 1.
      max_cache_bytes: a training split of at most this size, 8 bytes an id and 4 a number, is parsed once and held in
        memory; 0 reads its files in each epoch. Results are the same.
      calibration: fitted on the validation split after training; part of the model from then on.
    """

    method: pydantic.SerializeAsAny[MethodConfig] = pydantic.Field(default_factory=lambda: parse_method(DEFAULT_METHOD))
    backbone: str = "deepfm"
    backbone_arguments: dict[str, Any] = pydantic.Field(default_factory=dict)
    embeddings: EmbeddingConfig = EmbeddingConfig()
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
    max_cache_bytes: int = pydantic.Field(2**28, ge=0)
    calibration: CalibrationConfig = CalibrationConfig()

    @pydantic.field_validator("method", mode="before")
    @classmethod
    def _settings_of_the_named_method(cls, method: Any) -> MethodConfig:
        return method if isinstance(method, MethodConfig) else parse_method(method)

    def to_dict(self) -> dict[str, Any]:
        """Every setting, ready for JSON."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def result_settings(self) -> dict[str, Any]:
        """``to_dict`` without the settings that do not change the result: how often it is saved, what is cached."""
        return {name: value for name, value in self.to_dict().items() if name not in _WITHOUT_INFLUENCE}

    @property
    def teacher_runs(self) -> tuple[TeacherRun, ...]:
        """The scores that must be there before the fit begins."""
        return method_of(self.method).teacher_runs(self.method)

    @property
    def warning(self) -> str | None:
        """A caution for the user before the run begins, or None."""
        return method_of(self.method).warning(self.method, self.max_epochs)


def parse_method(content: str | Mapping[str, Any], source: str = "method") -> MethodConfig:
    """Checks what stands under ``method``.

    Args:
      content: a method's name, or its settings with a ``name`` among them; without a name they are those of ``clsd``.
      source: what errors call it.

    Returns:
      The settings, with defaults.

    Raises:
      SpecError: an unknown method or key, or a value out of range; says what is allowed.
    """
    settings = {"name": content} if isinstance(content, str) else {"name": DEFAULT_METHOD, **content}
    if settings["name"] not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise SpecError(
            f"{source}: method.name: unknown method. Received: {settings['name']!r}. Allowed: {known}; those of your "
            "own module with --plugin=<module>"
        )
    config_type = METHODS[settings["name"]].Config
    try:
        return config_type.model_validate_json(json.dumps(settings))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, config_type, source, at=("method",))) from error


def differences(settings: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compares settings, of nested ones each by itself.

    Args:
      settings: as ``TrainConfig.to_dict`` gives them.
      others: likewise.

    Returns:
      (those of ``settings`` that differ, by dotted name; what ``others`` has in their place, None for nothing).
    """
    mine, theirs = dict(_flattened(settings)), dict(_flattened(others))
    changed = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return {name: mine.get(name) for name in changed}, {name: theirs.get(name) for name in changed}


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def load_config(path: str | None, assignments: Sequence[str]) -> TrainConfig:
    """Reads a config.

    Args:
      path: of a YAML file; None for defaults.
      assignments: ``key=value``, ``method.mu=0.3`` for nested keys; they win over the file.

    Returns:
      The config.

    Raises:
      SpecError: unknown key or value out of range; says what is allowed.
    """
    content = parse_yaml_mapping(pathlib.Path(path).read_text(encoding="utf-8"), path) if path is not None else {}
    for assignment in assignments:
        _assign(content, assignment)
    return parse_config(content, path or "--set")


def _assign(content: dict[str, Any], assignment: str) -> None:
    """Applies ``a.b=value`` to nested mappings; ``method=name`` is short for ``method.name=name``."""
    key, separator, text = assignment.partition("=")
    if not separator:
        raise SpecError(f"--set takes key=value. Received: {assignment!r}. For example: --set method.mu=0.3")
    value = parse_yaml(text, f"--set {assignment}")
    if isinstance(content.get("method"), str):
        content["method"] = {"name": content["method"]}
    *parents, leaf = ["method", "name"] if key == "method" and isinstance(value, str) else key.split(".")
    node = content
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SpecError(f"--set {assignment}: {parent} is a single value. Received: {key!r}")
    node[leaf] = value


def parse_config(content: Mapping[str, Any], source: str) -> TrainConfig:
    """Checks a config; those of version 0.1 are converted.

    Args:
      content: as from JSON or YAML.
      source: what errors call it.

    Returns:
      The config, with defaults.

    Raises:
      SpecError: as ``load_config``.
    """
    content = dict(converted(content))
    # On its own first, so that an error names the keys of the method that is meant.
    method = parse_method(content.get("method", DEFAULT_METHOD), source)
    content["method"] = method.model_dump(mode="json", by_alias=True)
    try:
        return TrainConfig.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, TrainConfig, source)) from error
