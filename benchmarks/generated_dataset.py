"""A dataset directory of generated records, written without a build: as many rows and ids as a benchmark asks for."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf

from clsd_tf.data.examples import encode_examples, record_tensors
from clsd_tf.spec.feature_spec import FeatureSpec, parse_spec
from clsd_tf.spec.model_inputs import NumericStatistics, RecordLayout, Statistics
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir, DatasetLayout
from clsd_tf.storage.files import staged_directory, write_json

NUM_CATEGORICAL = 26
_ROWS_PER_CHUNK = 32_768
_ROWS_PER_USER = 20
_START_MICROSECONDS = 1_704_067_200_000_000  # 2024-01-01, UTC
_CLICK_LOGIT = -2.0  # Of a row whose ids say nothing.
_EVALUATION_SHARE = 0.05  # Rows of validation and test each, over those of training.
_USER_HASH_FACTOR = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: neighbors get hashes far from each other.


def generated_dataset(
    directory: pathlib.Path,
    *,
    num_rows: int,
    vocabulary_size: int,
    num_categorical: int = NUM_CATEGORICAL,
    num_numeric: int = 0,
    num_shards: int = 8,
    layout: RecordLayout = "packed",
    compressed: bool = False,
) -> DatasetDir:
    """The dataset of these arguments below ``directory``; made if it is not there yet, the same each time.

    Each categorical feature has ids of its own, all equally frequent: the hardest case for caches. The log odds of a
    click are the sum of an effect per id and per number, with standard deviation about 1.

    Args:
      directory: where generated datasets are kept.
      num_rows: of the training split; validation and test have a twentieth of it each.
      vocabulary_size: ids of each feature, that of missing values included, at least 2.
      num_categorical: categorical features.
      num_numeric: float features, standard normal.
      num_shards: files of the training split.
      layout: of the records.
      compressed: whether files are gzipped.

    Raises:
      ValueError: fewer rows than shards, or fewer than 2 ids.
    """
    if num_rows < num_shards or vocabulary_size < 2:
        raise ValueError(
            "a generated dataset has at least a row per shard and 2 ids per feature. "
            f"Received: num_rows={num_rows}, num_shards={num_shards}, vocabulary_size={vocabulary_size}"
        )
    suffix = "-gz" if compressed else ""
    name = f"generated-{num_rows}x{num_categorical}+{num_numeric}-{vocabulary_size}-{num_shards}-{layout}{suffix}"
    path = directory / name
    if not path.exists():
        with staged_directory(path) as staging:
            spec = _spec(vocabulary_size, num_categorical, num_numeric, layout)
            _write(DatasetLayout(staging), spec, _rows_of_splits(num_rows), num_shards, compressed)
    return DatasetDir(path)


def _spec(vocabulary_size: int, num_categorical: int, num_numeric: int, layout: RecordLayout) -> FeatureSpec:
    categorical = [f"category_{index}" for index in range(num_categorical)]
    numeric = [f"number_{index}" for index in range(num_numeric)]
    types = {"user_id": "int64", "item_id": "int64", "time": "int64", "click": "int64"}
    types |= {f"{name}_column": "int64" for name in categorical} | {f"{name}_column": "float" for name in numeric}
    hashed = [
        {"name": name, "type": "categorical", "column": f"{name}_column", "hash_buckets": vocabulary_size - 1}
        for name in categorical
    ]
    content = {
        "name": "generated",
        "record_layout": layout,
        "tables": {
            "log": {
                "path": "log.csv",
                "format": "csv",
                "columns": [{"name": name, "type": type_} for name, type_ in types.items()],
            }
        },
        "user_key": "user_id",
        "item_key": "item_id",
        "event_time": {"column": "time", "unit": "seconds"},
        "label": "click == 1",
        "features": [*hashed, *({"name": name, "type": "numeric", "column": f"{name}_column"} for name in numeric)],
    }
    return parse_spec(content, "generated_dataset")


def _rows_of_splits(num_rows: int) -> dict[str, int]:
    evaluation = max(1, round(_EVALUATION_SHARE * num_rows))
    return dict(zip(SPLITS, (num_rows, evaluation, evaluation), strict=True))


def _write(
    layout: DatasetLayout, spec: FeatureSpec, rows_of: Mapping[str, int], num_shards: int, compressed: bool
) -> None:
    numeric = [feature.name for feature in spec.features if feature.type == "numeric"]
    inputs = spec.model_inputs({})
    encode = tf.function(lambda columns: encode_examples(record_tensors(columns, inputs, spec.record_layout)))
    options = tf.io.TFRecordOptions(compression_type="GZIP" if compressed else "")
    layout.records.mkdir()
    layout.spec.write_text(spec.to_json(), encoding="utf-8")
    statistics = Statistics({}, {name: NumericStatistics(rows_of["train"], 0.0, 1.0, -5.0, 5.0) for name in numeric})
    layout.statistics.write_text(statistics.to_json(), encoding="utf-8")
    splits, first_row = {}, 0
    for split, num_rows in rows_of.items():
        shards, clicks = num_shards if split == "train" else 1, 0
        bounds = np.linspace(first_row, first_row + num_rows, shards + 1).astype(int)
        for index in range(shards):
            path = layout.shard(split, index, shards, compressed)
            with tf.io.TFRecordWriter(str(path), options) as writer:
                for columns in _chunks(spec, int(bounds[index]), int(bounds[index + 1])):
                    clicks += int(columns["label"].sum())
                    for example in encode(columns).numpy():
                        writer.write(example)
        first_row += num_rows
        splits[split] = {"rows": num_rows, "clicks": clicks}
    write_json(layout.counts, {"splits": splits})
    layout.mark_complete(spec)


def _chunks(spec: FeatureSpec, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
    """Columns of the rows from ``start`` to ``stop``."""
    inputs = spec.model_inputs({})
    effects = _effects(tuple(entry.vocabulary_size for entry in inputs.categorical))
    for first in range(start, stop, _ROWS_PER_CHUNK):
        size = min(_ROWS_PER_CHUNK, stop - first)
        random = np.random.default_rng(first)
        row_ids = np.arange(first, first + size)
        columns: dict[str, np.ndarray] = {}
        logits = np.full(size, _CLICK_LOGIT)
        for entry, effect in zip(inputs.categorical, effects, strict=True):
            columns[entry.name] = random.integers(1, entry.vocabulary_size, size)
            logits += effect[columns[entry.name]]
        for name in inputs.numeric:
            columns[name] = random.standard_normal(size, np.float32)
            logits += columns[name] / np.sqrt(len(inputs.categorical))
        columns["label"] = (random.random(size) < 1.0 / (1.0 + np.exp(-logits))).astype(np.float32)
        columns["sample_weight"] = columns["intensity_label"] = np.ones(size, np.float32)
        columns["intensity_value"] = np.full(size, np.nan, np.float32)
        columns["row_id"] = row_ids
        users = (row_ids // _ROWS_PER_USER).astype(np.uint64)
        columns["user_hash"] = (users * np.uint64(_USER_HASH_FACTOR)).astype(np.int64)
        columns["event_time"] = _START_MICROSECONDS + row_ids * 1_000
        yield columns


def _effects(vocabulary_sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Draws what each id adds to the log odds of a click."""
    random = np.random.default_rng(0)
    scale = 1.0 / np.sqrt(len(vocabulary_sizes))
    return [random.normal(0.0, scale, size) for size in vocabulary_sizes]
