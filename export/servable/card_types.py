"""The model card's types: what model_card.json holds."""

from __future__ import annotations

import pathlib
from typing import Any

import pydantic

CARD_MARKDOWN = pathlib.PurePosixPath("assets.extra") / "model_card.md"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Measured(_Part):
    """A metric, None where it is not defined, and its 95 % interval over users, None where there is none."""

    value: float | None
    interval: tuple[float, float] | None


class Slice(_Part):
    """Measures of some rows; ``metrics`` are those of an evaluation that have a heading and no field of their own."""

    rows: int
    users: int
    clicks: int
    ece: float
    metrics: dict[str, Measured]


class SplitFacts(_Part):
    """A split of the dataset; times are ISO, UTC."""

    rows: int
    clicks: int
    click_rate: float
    first_event: str
    last_event: str


class InputFile(_Part):
    """A raw file that the dataset was built from; ``file`` is its name without directories."""

    table: str
    file: str
    bytes: int
    sha256: str


class Data(_Part):
    """The dataset that the model was trained and measured on."""

    feature_spec: str
    description: str
    spec_fingerprint: str
    dataset_fingerprint: str
    built_at: str
    label: str
    intensity_label: str | None
    splits: dict[str, SplitFacts]
    inputs: list[InputFile]


class Calibration(_Part):
    """The calibration of ``ctr``, and what the measured split says of it: metric -> value, without it and with it."""

    method: str
    user_group: str | None
    before: dict[str, float | None]
    after: dict[str, float | None]


class EarlierRun(_Part):
    """A run that this one was warm-started from: fingerprints, training rows, span of events it has seen, ISO, UTC."""

    work_fingerprint: str
    dataset_fingerprint: str
    rows: int
    first_event: str
    last_event: str


class Training(_Part):
    """The way to train the model again: a command with placeholders for directories, and the whole config.

    ``earlier_runs``, oldest first, are those that the run was warm-started from.
    """

    command: str
    config: dict[str, Any]
    earlier_runs: list[EarlierRun]


class Export(_Part):
    """The making of the version: profile, what quantization cost (None without it), what verification found."""

    profile: dict[str, Any]
    quantisation: dict[str, Any] | None
    verification: dict[str, Any]


class ModelCard(_Part):
    """The content of model_card.json.

    Attributes:
      split: that ``overall``, ``groups`` and ``calibration`` were measured on, with the model as it is served.
      groups: user group -> label -> slice; labels of fewer than 20 users are part of "other".
      libraries: name -> version, at the time of export.
    """

    model_name: str
    version: int
    data: Data
    split: str
    overall: Slice
    groups: dict[str, dict[str, Slice]]
    calibration: Calibration
    training: Training
    export: Export
    libraries: dict[str, str | None]
