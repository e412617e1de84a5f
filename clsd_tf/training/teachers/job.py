"""The job that a teacher is given."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class TeacherJob:
    """A teacher is a function of this that gives a score in [0, 1], or NaN for none, to every training row.

    Its one contract: no score comes from a model that was trained on the row. One of your own is registered under a
    name, by which configs call it: ``TEACHERS.register("mine")(my_teacher)``, of ``clsd_tf.methods.teachers``.

    Attributes:
      dataset: whose training rows are scored.
      config: what the teacher's models are trained with: the run's, with the method that teaches it.
      settings: the teacher's own.
      files: paths that it reads.
      directory: for models; kept until the scores are there, so that a killed job goes on.
      title: what progress lines call the run; None for no progress lines.
    """

    dataset: DatasetDir
    config: TrainConfig
    settings: Mapping[str, Any]
    files: tuple[str, ...]
    directory: pathlib.Path
    title: str | None
