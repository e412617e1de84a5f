"""Run -> servable: write, verify in a fresh process, publish by one rename."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf

from clsd_tf.data.examples import arrow_to_tensors, encode_raw_rows
from clsd_tf.data.transform import FeatureTransform
from clsd_tf.methods import method_of
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model
from export.publishing.manifest import write_manifest
from export.publishing.models_config import CONFIG_FILE, ModelsConfig, require_room_for
from export.publishing.versions import ModelVersions
from export.servable.batching_parameters import write_batching_parameters
from export.servable.model_card import write_model_card
from export.servable.profile import ExportProfile
from export.servable.quantization import quantize_tables
from export.servable.signatures import ServingModule, serving_signatures
from export.servable.verification_sample import verification_sample
from export.servable.warmup import write_warmup_requests


class ExportError(RuntimeError):
    """A servable that failed verification; nothing was published."""


@dataclasses.dataclass(frozen=True)
class Servable:
    """A published version and what its verification found."""

    path: pathlib.Path
    verification: dict[str, Any]


def export_servable(
    dataset: DatasetDir,
    work_dir: WorkDir,
    base_dir: pathlib.Path,
    name: str,
    *,
    version: int | None = None,
    serving_base_path: str | None = None,
    profile: ExportProfile | None = None,
) -> Servable:
    """Publishes ``base_dir/name/version`` and adds the model to ``base_dir/models.config``.

    Args:
      dataset: the dataset of the run; its serving sample is verified and warmed up with.
      work_dir: a finished run.
      base_dir: holds one directory per model.
      name: the model's name, one path component.
      version: a number that was never used; by default the time in seconds, or more than any number ever used.
      serving_base_path: where the server will see ``base_dir``; by default models.config keeps what it says, and a new
        model gets /models.
      profile: what the servable holds; the default profile if None.

    Raises:
      FileExistsError: the version's number was used already; a published version is never rewritten.
      ExportError: a signature does not agree with the training model.
      QuantizationError: quantization costs more AUC than the profile allows.
      ValueError: bad name or version, or a models.config to which the model cannot be added.
    """
    versions = ModelVersions(base_dir, name)
    require_room_for(base_dir / CONFIG_FILE, name, serving_base_path)
    model = load_model(work_dir, dataset)
    method = method_of(model.config)
    profile = (profile or ExportProfile()).resolved(method.signatures(model.config))
    quantization = _apply_profile(model, dataset, profile)
    transform = FeatureTransform(dataset.spec, dataset.statistics, dataset.layout.vocabularies)
    with versions.staged(version) as (number, staging), tempfile.TemporaryDirectory() as scratch:
        signatures = serving_signatures(dataset.spec, transform, model, profile)
        tf.saved_model.save(ServingModule(transform, signatures), str(staging), signatures=signatures)
        sample = verification_sample(dataset, transform, model, profile)
        _write_warmup(staging, name, sample, dataset.spec, profile)
        if profile.batching is not None:
            write_batching_parameters(staging, profile.batching)
        sample_path = pathlib.Path(scratch) / "verification.parquet"
        pyarrow.parquet.write_table(sample, sample_path)
        verification = _verify_in_fresh_process(staging, sample_path)
        facts: dict[str, Any] = {
            "model_name": name,
            "version": number,
            "verification": verification,
            "profile": profile.to_dict(),
            "quantization": quantization,
        }
        write_model_card(staging, model, dataset, work_dir, **facts)
        write_manifest(staging, dataset, work_dir, **facts)
    _add_to_models_config(versions, serving_base_path)
    return Servable(versions.path / str(number), verification)


def _apply_profile(model: MethodModel, dataset: DatasetDir, profile: ExportProfile) -> dict[str, Any] | None:
    """Makes the model what the profile asks for; returns what quantization cost, None without it."""
    if not profile.calibration:
        model.calibration = None
    if profile.quantisation.tables == "none":
        return None
    return quantize_tables(model, dataset, profile.quantisation)


def _write_warmup(
    staging: pathlib.Path, name: str, sample: pa.Table, spec: FeatureSpec, profile: ExportProfile
) -> None:
    """Of real rows, but whose they are stays here: a servable goes to places where a log may not."""
    first = sample.slice(0, max(profile.warmup_batch_sizes)).select([entry.name for entry in spec.raw_inputs])
    if spec.user_key in first.column_names:
        nobody = pa.nulls(first.num_rows, first.schema.field(spec.user_key).type)
        first = first.set_column(first.schema.get_field_index(spec.user_key), spec.user_key, nobody)
    assert profile.signatures is not None, "resolved"
    raw = {key: value.numpy() for key, value in arrow_to_tensors(first, spec.raw_inputs).items()}
    write_warmup_requests(
        staging,
        name,
        encode_raw_rows(first, spec.raw_inputs),
        raw,
        signatures=profile.signatures,
        batch_sizes=profile.warmup_batch_sizes,
        max_batch_size=profile.batching.max_batch_size if profile.batching else None,
    )


def _verify_in_fresh_process(servable: pathlib.Path, sample: pathlib.Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "export.verify", f"--servable={servable}", f"--sample={sample}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the servable was not published, since its check failed. Received: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _add_to_models_config(versions: ModelVersions, serving_base_path: str | None) -> None:
    """Adds the model, or changes its path, in the text proto that ``--model_config_file`` takes."""
    with versions.exclusive():
        config = ModelsConfig(versions.servable_dir / CONFIG_FILE)
        config.set_model(versions.name, serving_base_path)
        config.write()
