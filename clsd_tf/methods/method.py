"""The contract of a method: all that training, evaluation, studies and export know of it.

A method is one folder: its settings, its model and an instance of a ``Method``, which the registry ``METHODS`` names.
Nothing here needs TensorFlow, so that configs can be read without it; ``build`` imports the model when it is called.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from clsd_tf.spec.model_inputs import ModelInputs
from clsd_tf.spec.validation import StrictModel

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

    from clsd_tf.methods.method_model import MethodModel

RecordKind = Literal["row", "sequence"]


class MethodWarning(UserWarning):
    """A method's settings and the run do not go well together."""


class MethodGuardError(RuntimeError):
    """A guard of a method ended training, instead of leaving a model that looks finished: a finding of a study."""


class MethodConfig(StrictModel):
    """Settings of a method: what stands under ``method`` in a config. ``name`` says which."""

    name: str


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The validation metric that decides which epoch is the best, and when to stop.

    Attributes:
      metric: its name in ``validate``; an epoch's logs hold it as ``val_<metric>``.
      title: what it is called in progress lines.
      greater_is_better: False for losses.
      missing: what to tell a user whose validation split leaves it undefined.
    """

    metric: str
    title: str
    greater_is_better: bool = True
    missing: str = ""

    @property
    def log_name(self) -> str:
        return f"val_{self.metric}"

    @property
    def worst(self) -> float:
        """A value that every epoch improves on."""
        return float("-inf") if self.greater_is_better else float("inf")

    def is_better(self, value: float, than: float) -> bool:
        """Compares two values.

        Args:
          value: of the metric.
          than: likewise.

        Returns:
          Whether ``value`` is strictly better.
        """
        return value > than if self.greater_is_better else value < than


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """Scores that each training row needs before the fit begins: who gives them, as data.

    Attributes:
      teacher: a name in ``clsd_tf.methods.teachers.TEACHERS``.
      settings: the teacher's own, ready for JSON; stored scores are found again by them.
      student: the method that the teacher's models are trained with; None where it trains none.
      feature: the name under which the scores join the rows.
      files: paths that the teacher reads beside the dataset; a run that goes on must find them as they were.
    """

    teacher: str
    settings: Mapping[str, Any]
    student: MethodConfig | None = None
    feature: str = "teacher_score"
    files: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RowFilter:
    """Rows of the training split that training looks at.

    Attributes:
      fields: record fields that decide it.
      keep: maps them, each [num_rows], to bool [num_rows].
    """

    fields: tuple[str, ...]
    keep: Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Output:
    """A value that the model answers for each row or query.

    Attributes:
      name: in signatures and reports.
      kind: ``probability`` of ``label``, a ``score`` to rank by, or an ``embedding``.
      label: the record field that it predicts; None for embeddings.
      is_calibrated: whether a calibration is fitted on the validation split.
    """

    name: str
    kind: Literal["probability", "score", "embedding"]
    label: str | None = None
    is_calibrated: bool = False


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """The parts that training hands a method to make its model of.

    Attributes:
      inputs: what the transform gives.
      new_backbone: makes a backbone of the run's config, with all its variables; a call each.
      example: a batch of one row of zeros, with every feature that training rows will have.
    """

    inputs: ModelInputs
    new_backbone: Callable[[], tf.keras.Model]
    example: Mapping[str, tf.Tensor]


class Method(abc.ABC, Generic[ConfigT]):
    """A way to learn from clicks. Instances hold no state; each question is answered from the method's settings.

    Attributes:
      Config: its settings; ``Config().name`` is the method's name.
      record_kind: what it trains on: rows, or one sequence for each user.
      objective: what decides between epochs.
      validation_fields: record fields of the validation split that ``validate`` reads.
      metrics: names of what judges its scores in reports, in this order; None for all that the rows allow.
      study_rows: name of a row in studies -> what it changes in the config of a run.
    """

    Config: ClassVar[type[MethodConfig]]
    record_kind: ClassVar[RecordKind] = "row"
    objective: ClassVar[Objective]
    validation_fields: ClassVar[tuple[str, ...]] = ("label", "sample_weight")
    metrics: ClassVar[tuple[str, ...] | None] = None
    study_rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abc.abstractmethod
    def build(self, config: ConfigT, parts: ModelParts) -> MethodModel:
        """Makes the model of a run, with all its variables.

        The same seed must give the same backbone for every method: make it first.

        Args:
          config: the method's settings.
          parts: what training has for it.

        Returns:
          A model that is not compiled yet.
        """

    @abc.abstractmethod
    def outputs(self, config: ConfigT) -> tuple[Output, ...]:
        """The model's answers under the settings ``config``.

        Returns:
          The one that rows are ranked by first.
        """

    @abc.abstractmethod
    def signatures(self, config: ConfigT) -> tuple[str, ...]:
        """The serving signatures that models with the settings ``config`` can have.

        Returns:
          Names, see ``export.servable.signatures``.
        """

    @abc.abstractmethod
    def describe(self, config: ConfigT) -> str:
        """Says for the model card how clicks counted in training with the settings ``config``.

        Returns:
          A sentence.
        """

    def limits(self, config: ConfigT) -> tuple[str, ...]:
        """Says for the model card what a model is not for, because it was trained with the settings ``config``.

        Returns:
          Sentences.
        """
        return ()

    @abc.abstractmethod
    def validate(self, fields: Mapping[str, np.ndarray], scores: np.ndarray) -> dict[str, float | None]:
        """Measures an epoch, the objective among others.

        Args:
          fields: ``validation_fields``, each [num_rows].
          scores: of the first output, [num_rows].

        Returns:
          Name -> value, None where it is not defined.
        """

    def labels(self, config: ConfigT) -> tuple[str, ...]:
        """The labels that training with the settings ``config`` reads.

        Returns:
          Record fields, the main one first. Of several, batches hold a dict by name.
        """
        return ("label",)

    def teacher_runs(self, config: ConfigT) -> tuple[TeacherRun, ...]:
        """The scores that must be there before a fit with the settings ``config`` begins.

        Returns:
          A run for each feature that they join the rows as.
        """
        return ()

    def row_filter(self, config: ConfigT) -> RowFilter | None:
        """The training rows that the settings ``config`` look at.

        Returns:
          A filter; None for all rows.
        """
        return None

    def check_dataset(self, config: ConfigT, has_intensity_label: bool) -> None:
        """Refuses a dataset that lacks what the settings need.

        Args:
          config: the method's settings.
          has_intensity_label: whether the dataset's rows have one.

        Raises:
          ValueError: names what is missing.
        """

    def check_steps(self, config: ConfigT, last_step: int) -> None:
        """Refuses settings that make no sense for a run of that length.

        Args:
          config: the method's settings.
          last_step: optimizer step with which the run ends.

        Raises:
          ValueError: names the setting and what is allowed.
        """

    def warning(self, config: ConfigT, max_epochs: int) -> str | None:
        """Cautions the user before a run begins.

        Args:
          config: the method's settings.
          max_epochs: of the run.

        Returns:
          A sentence, or None.
        """
        return None

    def architecture(self, config: ConfigT) -> dict[str, Any]:
        """The settings in ``config`` that give weights and moving means their meaning: a warm start keeps them.

        Returns:
          Setting -> value.
        """
        return {}

    def placebos(self, config: ConfigT) -> dict[str, Mapping[str, Any]]:
        """Controls for studies: the treatment ``config`` without what it claims to use.

        Returns:
          Name -> what it changes in the method's settings.
        """
        return {}
