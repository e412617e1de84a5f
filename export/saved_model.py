"""Run -> servable: write, verify in a fresh process, publish by one rename."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf

from clsd_tf.artifacts import DatasetDir, WorkDir
from clsd_tf.assembly import load_model
from clsd_tf.clsd import ClsdModel
from clsd_tf.examples import arrow_to_tensors, encode_examples
from clsd_tf.features import FeatureSpec
from clsd_tf.input_pipeline import batches, read_columns
from clsd_tf.transform import FeatureTransform
from export.manifest import write_manifest
from export.models_config import CONFIG_FILE, ModelsConfig, require_room_for
from export.signatures import ServingModule, serving_signatures
from export.versions import ModelVersions
from export.warmup import write_warmup_requests

_BATCH_SIZE = 1000
_UNKNOWN = "a value that training never saw"
_UNKNOWN_INT64 = 987_654_321_987


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
    serving_base_path: str = "/models",
) -> Servable:
    """Publishes ``base_dir/name/version`` and adds the model to ``base_dir/models.config``.

    Args:
      dataset: the dataset of the run; its serving sample is verified and warmed up with.
      work_dir: a finished run.
      base_dir: holds one directory per model.
      name: the model's name, one path component.
      version: a number that was never used; by default the time in seconds, or more than any number ever used.
      serving_base_path: where the server will see ``base_dir``, for models.config.

    Raises:
      FileExistsError: the version's number was used already; a published version is never rewritten.
      ExportError: a signature does not agree with the training model.
      ValueError: bad name or version, or a models.config to which the model cannot be added.
    """
    versions = ModelVersions(base_dir, name)
    require_room_for(base_dir / CONFIG_FILE, name, _base_path(serving_base_path, name))
    model = load_model(work_dir, dataset)
    transform = FeatureTransform(dataset.spec, dataset.statistics, dataset.layout.vocabularies)
    with versions.staged(version) as (number, staging), tempfile.TemporaryDirectory() as scratch:
        signatures = serving_signatures(dataset.spec, transform, model)
        tf.saved_model.save(ServingModule(transform, model), str(staging), signatures=signatures)
        sample = verification_sample(dataset, transform, model)
        _write_warmup(staging, name, sample, dataset.spec)
        sample_path = pathlib.Path(scratch) / "verification.parquet"
        pyarrow.parquet.write_table(sample, sample_path)
        verification = _verify_in_fresh_process(staging, sample_path)
        write_manifest(staging, dataset, work_dir, model_name=name, version=number, verification=verification)
    _add_to_models_config(versions, serving_base_path)
    return Servable(versions.path / str(number), verification)


def verification_sample(dataset: DatasetDir, transform: FeatureTransform, model: ClsdModel) -> pa.Table:
    """Raw rows with the outputs that the training model gives for them.

    The first rows are the dataset's serving sample, their expected outputs come from the *TFRecords*: equality proves
    that raw -> servable equals transformed -> model. The last rows are edge cases, expected from transform and model
    in this process: unknown ids, missing values, empty histories.

    Returns:
      The raw inputs, ``_example`` (serialized tf.Example) and ``_expected_*`` columns; no raw input starts with _.
    """
    spec = dataset.spec
    names = [entry.name for entry in spec.raw_inputs]
    stored = pyarrow.parquet.read_table(dataset.layout.serving_sample)
    expected = _outputs_by_row(dataset, model, stored.column("row_id").to_numpy())
    edges = _edge_rows(stored.select(names), spec)
    features = transform(arrow_to_tensors(edges, spec.raw_inputs))
    edge_outputs = {"ctr": model(features), **model.debug_outputs(features)}
    raw = pa.concat_tables([stored.select(names), edges, edges])
    # A missing value is an absent feature; the edge rows come a second time with features that are there but empty.
    examples = [
        _without_empty_features(example) for example in _raw_examples(raw.slice(0, len(raw) - len(edges)), spec)
    ]
    examples += _raw_examples(edges, spec)
    columns = {name: raw.column(name) for name in names}
    for name, values in expected.items():
        columns[f"_expected_{name}"] = pa.array(np.concatenate([values, *[edge_outputs[name].numpy()] * 2]))
    return pa.table({**columns, "_example": pa.array(examples, pa.binary())})


def _outputs_by_row(dataset: DatasetDir, model: ClsdModel, row_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of the model on the test records, in the order of ``row_ids``."""
    step = tf.function(lambda features: {"ctr": model(features), **model.debug_outputs(features)})
    parts = [step(features) for features, _, _ in batches(dataset, "test", batch_size=_BATCH_SIZE)]
    order = read_columns(dataset, "test", ["row_id"])["row_id"]
    sorter = np.argsort(order)
    places = sorter[np.searchsorted(order, row_ids, sorter=sorter)]
    return {name: np.concatenate([part[name].numpy() for part in parts])[places] for name in parts[0]}


def _edge_rows(rows: pa.Table, spec: FeatureSpec) -> pa.Table:
    """A typical row with, in turn: every id unknown; each single value missing; all missing."""
    typical = rows.slice(0, 1).to_pylist()[0]
    unknown = {"string": _UNKNOWN, "int64": _UNKNOWN_INT64}
    ids = [entry for entry in spec.raw_inputs if entry.dtype in unknown]
    edges = [typical | {entry.name: [_UNKNOWN] if entry.is_list else unknown[entry.dtype] for entry in ids}]
    edges += [typical | {entry.name: [] if entry.is_list else None} for entry in spec.raw_inputs]
    edges.append({entry.name: [] if entry.is_list else None for entry in spec.raw_inputs})
    return pa.Table.from_pylist(edges, schema=rows.schema)


def _raw_examples(rows: pa.Table, spec: FeatureSpec) -> list[bytes]:
    """Serving requests; a missing value is a feature without a value."""
    serialized: list[bytes] = []
    for start in range(0, rows.num_rows, _BATCH_SIZE):
        batch = rows.slice(start, _BATCH_SIZE)
        tensors = arrow_to_tensors(batch, spec.raw_inputs)
        ragged = {}
        for entry in spec.raw_inputs:
            values = tensors[entry.name]
            if entry.is_list:
                ragged[entry.name] = tf.ragged.boolean_mask(values, values != "")
            else:
                present = tf.constant(batch.column(entry.name).is_valid().to_numpy())
                ragged[entry.name] = tf.ragged.boolean_mask(values[:, tf.newaxis], present[:, tf.newaxis])
        serialized += encode_examples(ragged).numpy().tolist()
    return serialized


def _without_empty_features(serialized: bytes) -> bytes:
    example = tf.train.Example.FromString(serialized)
    feature = example.features.feature
    for name in list(feature):
        kind = feature[name].WhichOneof("kind")
        if not getattr(feature[name], kind).value:
            del feature[name]
    return example.SerializeToString()


def _write_warmup(staging: pathlib.Path, name: str, sample: pa.Table, spec: FeatureSpec) -> None:
    first = sample.slice(0, 64)
    raw = {key: value.numpy() for key, value in arrow_to_tensors(first, spec.raw_inputs).items()}
    write_warmup_requests(staging, name, first.column("_example").to_pylist(), raw)


def _verify_in_fresh_process(servable: pathlib.Path, sample: pathlib.Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "export.verify", f"--servable={servable}", f"--sample={sample}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the servable was not published, since its check failed. Received: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _add_to_models_config(versions: ModelVersions, serving_base_path: str) -> None:
    """Adds the model, or changes its path, in the text proto that ``--model_config_file`` takes."""
    with versions.exclusive():
        config = ModelsConfig(versions.servable_dir / CONFIG_FILE)
        config.set_model(versions.name, _base_path(serving_base_path, versions.name))
        config.write()


def _base_path(serving_base_path: str, name: str) -> str:
    return f"{serving_base_path.rstrip('/')}/{name}"
