"""The model card of a version, as JSON and as Markdown: what it is, how good it is, and what it is not for."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

import clsd_tf
from clsd_tf.evaluation.scored_rows import rows_by_label, score_split
from clsd_tf.metrics.scored_rows import ScoredRows
from clsd_tf.metrics.table import headlines, measure
from clsd_tf.metrics.user_intervals import user_intervals
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import read_json, write_json, write_text
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.config import TrainConfig, parse_config
from export.publishing.versions import CARD_JSON
from export.servable.card_text import render_card
from export.servable.card_types import (
    CARD_MARKDOWN,
    Calibration,
    Data,
    Export,
    InputFile,
    Measured,
    ModelCard,
    Slice,
    Training,
)

_SPLIT = "test"
_LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "numpy")


def write_model_card(
    directory: pathlib.Path,
    model: tf.keras.Model,
    dataset: DatasetDir,
    work_dir: WorkDir,
    *,
    model_name: str,
    version: int,
    profile: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    verification: Mapping[str, Any],
) -> ModelCard:
    """Measures the model on the test split and writes both files; the same model and data give the same bytes.

    Args:
      directory: of the version that is being written.
      model: as it is served, so quantized and without calibration where the profile says so.
      dataset: of the run.
      work_dir: of the run.
      model_name: of the version.
      version: its number.
      profile: that it was exported by.
      quantization: what that cost, None without it.
      verification: what the check of the written version found.

    Returns:
      The card that was written.
    """
    rows = score_split(model, dataset, _SPLIT)
    config = parse_config(work_dir.resolved_config["train"], str(work_dir.config)).to_dict()
    card = ModelCard(
        model_name=model_name,
        version=version,
        data=_data(dataset),
        split=_SPLIT,
        overall=_slice(rows),
        groups={
            group.name: {label: _slice(part) for label, part in rows_by_label(rows, group)}
            for group in dataset.inputs.groups
        },
        calibration=_calibration(model, rows),
        training=_training(config, work_dir),
        export=Export(
            profile=dict(profile),
            quantisation=None if quantization is None else dict(quantization),
            verification=dict(verification),
        ),
        libraries=_versions(),
    )
    (directory / CARD_JSON).parent.mkdir(exist_ok=True)
    write_json(directory / CARD_JSON, card.model_dump(mode="json"))
    write_text(directory / CARD_MARKDOWN, render_card(card))
    return card


def _slice(rows: ScoredRows) -> Slice:
    measured: dict[str, Any] = {**measure(rows, "evaluation")}
    intervals = user_intervals(rows, measured)
    return Slice(
        rows=measured.pop("rows"),
        users=len(set(rows.user_hash.tolist())),
        clicks=measured.pop("clicks"),
        ece=measured.pop("ece"),
        metrics={
            metric.name: Measured(value=measured[metric.name], interval=intervals.get(metric.name))
            for metric in headlines(measured)
        },
    )


def _calibration(model: tf.keras.Model, rows: ScoredRows) -> Calibration:
    fitted = model.calibration.calibration if model.calibration is not None else None
    group = fitted.group if fitted else None
    return Calibration(
        method=fitted.method if fitted else "none",
        user_group=group and group.name,
        before=measure(rows.without_calibration(), "calibration"),
        after=measure(rows, "calibration"),
    )


def _data(dataset: DatasetDir) -> Data:
    built = read_json(dataset.layout.manifest)
    spec = dataset.spec
    return Data(
        feature_spec=spec.name,
        description=spec.description,
        spec_fingerprint=spec.fingerprint,
        dataset_fingerprint=dataset.fingerprint,
        built_at=built["built_at"],
        label=spec.label,
        intensity_label=spec.intensity_label,
        splits=built["splits"],
        inputs=[InputFile(**{**entry, "file": _file_name(entry["file"])}) for entry in built["inputs"]],
    )


def _file_name(path: str) -> str:
    """The last part of a local path, of POSIX or Windows, or of a URL."""
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def _training(config: Mapping[str, Any], work_dir: WorkDir) -> Training:
    earlier_runs = read_json(work_dir.lineage)["ancestors"]
    init_from = " --init_from=EARLIER_WORK_DIR" if earlier_runs else ""
    return Training(command=training_command(config) + init_from, config=dict(config), earlier_runs=earlier_runs)


def training_command(config: Mapping[str, Any]) -> str:
    """Writes the command that trains with a config.

    Args:
      config: resolved, as a run's work directory holds it.

    Returns:
      The command, with what differs from the defaults as --set. Directories stand as DATASET_DIR and WORK_DIR: where
      they were says nothing to others.
    """
    changes = [f"--set {shlex.quote(f'{key}={value}')}" for key, value in _changes(config, TrainConfig().to_dict())]
    return " ".join(["python -m pipelines.train --dataset_dir=DATASET_DIR --work_dir=WORK_DIR", *changes])


def _changes(config: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, JSON) of each setting that is not the default; JSON is YAML, which --set reads."""
    for key, value in config.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _changes(value, default, f"{prefix}{key}.")
        elif key not in defaults or value != default:
            yield f"{prefix}{key}", json.dumps(value)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "clsd_tf": clsd_tf.__version__}
    return {**versions, **{name: _library_version(name) for name in _LIBRARIES}}


def _library_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # Another build of it, say tensorflow-cpu.
        return None
