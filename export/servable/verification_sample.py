"""Raw rows with the outputs that a servable must give for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf

from clsd_tf.data.examples import arrow_to_tensors, encode_raw_rows
from clsd_tf.data.input_pipeline import batches, read_columns
from clsd_tf.data.transform import FeatureTransform
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.storage.dataset_dir import DatasetDir
from export.servable.profile import ExportProfile
from export.servable.ranking import sides_of
from export.servable.signatures import debug_outputs

_BATCH_SIZE = 1000
_UNKNOWN = "a value that training never saw"
_UNKNOWN_INT64 = 987_654_321_987


def verification_sample(
    dataset: DatasetDir, transform: FeatureTransform, model: MethodModel, profile: ExportProfile
) -> pa.Table:
    """Raw rows with the outputs that the training model gives for them.

    The first rows are the dataset's serving sample, their expected outputs come from the *TFRecords*: equality proves
    that raw -> servable equals transformed -> model. The last rows are edge cases, expected from transform and model
    in this process: unknown ids, missing values, empty histories.

    Returns:
      The raw inputs, ``_example`` (serialized tf.Example) and ``_expected_*`` columns; no raw input starts with _. The
      schema's metadata says where ``rank`` reads them, and how many of the last rows are edge cases.
    """
    spec = dataset.spec
    names = [entry.name for entry in spec.raw_inputs]
    stored = pyarrow.parquet.read_table(dataset.layout.serving_sample)

    def outputs(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"ctr": model(features), **debug_outputs(model, features, spec, profile)}

    expected = _outputs_by_row(dataset, outputs, stored.column("row_id").to_numpy())
    edges = _edge_rows(stored.select(names), spec)
    features = transform(arrow_to_tensors(edges, spec.raw_inputs))
    edge_outputs = outputs(features)
    raw = pa.concat_tables([stored.select(names), edges, edges])
    # A missing value is an absent feature; the edge rows come a second time with features that are there but empty.
    examples = [
        _without_empty_features(example)
        for example in encode_raw_rows(raw.slice(0, len(raw) - len(edges)), spec.raw_inputs)
    ]
    examples += encode_raw_rows(edges, spec.raw_inputs)
    columns = {name: raw.column(name) for name in names}
    for name, values in expected.items():
        columns[f"_expected_{name}"] = pa.array(np.concatenate([values, *[edge_outputs[name].numpy()] * 2]))
    table = pa.table({**columns, "_example": pa.array(examples, pa.binary())})
    return table.replace_schema_metadata(
        {
            "item_inputs": json.dumps([entry.name for entry in sides_of(spec).item]),
            "item_key": spec.item_key,
            "num_edge_rows": str(2 * len(edges)),
        }
    )


def _outputs_by_row(
    dataset: DatasetDir, outputs: Callable[[Mapping[str, tf.Tensor]], dict[str, tf.Tensor]], row_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Outputs of the model on the test records, in the order of ``row_ids``."""
    step = tf.function(outputs)
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


def _without_empty_features(serialized: bytes) -> bytes:
    example = tf.train.Example.FromString(serialized)
    feature = example.features.feature
    for name in list(feature):
        kind = feature[name].WhichOneof("kind")
        if not getattr(feature[name], kind).value:
            del feature[name]
    return example.SerializeToString()
