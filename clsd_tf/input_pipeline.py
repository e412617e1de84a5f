"""TFRecord shards -> tf.data of (features, labels, sample_weight)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from clsd_tf.artifacts import DatasetDir
from clsd_tf.examples import packed_columns, parse_records

_SHUFFLE_BUFFER_ROWS = 200_000
_READ_PARALLELISM = 4


@dataclasses.dataclass(frozen=True)
class RowValues:
    """A number for each row, found by row id: teacher scores, fold masks.

    Attributes:
      row_ids: int64 [num_rows], unique.
      values: float32 [num_rows].
    """

    row_ids: np.ndarray
    values: np.ndarray

    def lookup_table(self) -> tf.lookup.StaticHashTable:
        initializer = tf.lookup.KeyValueTensorInitializer(
            tf.constant(self.row_ids, tf.int64), tf.constant(self.values, tf.float32)
        )
        return tf.lookup.StaticHashTable(initializer, default_value=float("nan"))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which of ``count`` contiguous slices of every batch, from 0."""

    index: int
    count: int


def batches(dataset: DatasetDir, split: str, *, batch_size: int, shuffle_seed: int | None = None) -> tf.data.Dataset:
    """One pass over a split, for ``model.fit`` and ``model.evaluate``.

    Args:
      dataset: a complete dataset directory.
      split: train, validation or test.
      batch_size: rows per batch; the last batch may be smaller.
      shuffle_seed: shuffles rows, differently in each pass; None keeps the file order.

    Returns:
      (features, labels, sample_weight): labels and weights are float32 [batch]. Features hold the model inputs, the
      user groups and ``row_id``.
    """
    serialized = _serialized(dataset.record_files(split))
    if shuffle_seed is not None:
        serialized = serialized.shuffle(_buffer_rows(dataset, split), seed=shuffle_seed)
    return _prepared(_parsed(serialized, dataset, batch_size).map(_as_training_batch, **_PARALLEL))


def training_epochs(
    dataset: DatasetDir,
    *,
    batch_size: int,
    seed: int,
    first_epoch: int,
    num_epochs: int,
    first_step: int = 0,
    shard: Shard = Shard(0, 1),
) -> tf.data.Dataset:
    """Epochs ``first_epoch`` to ``num_epochs`` of the training split, the first from batch ``first_step`` on.

    The order of rows is a function of (seed, epoch) alone, so a run that resumes at an epoch sees what it would have
    seen. Yields as ``batches``.
    """
    parsed_batches = _from_memory if dataset.num_rows("train") <= _SHUFFLE_BUFFER_ROWS else _from_files
    shuffled_batches = parsed_batches(dataset, batch_size)

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        # The pair (seed, epoch): the function's graph would otherwise bring in the seed of the whole process.
        # Plus 1, since TensorFlow gives the pair (0, 0) a meaning of its own.
        tf.compat.v1.get_default_graph().seed = seed + 1
        return shuffled_batches(epoch)

    epochs = tf.data.Dataset.range(first_epoch, num_epochs).flat_map(one_epoch)
    return _prepared(epochs.skip(first_step).map(lambda r: _as_training_batch(_slice(r, shard)), **_PARALLEL))


def _slice(record, shard):
    if shard.count == 1:
        return record
    n = tf.shape(record["label"])[0]
    start, stop = shard.index * n // shard.count, (shard.index + 1) * n // shard.count
    return {name: values[start:stop] for name, values in record.items()}


def _from_memory(dataset: DatasetDir, batch_size: int) -> Callable[[tf.Tensor], tf.data.Dataset]:
    """Epoch -> batches of records, of a training split that the shuffle buffer would hold as a whole.

    Parsed once: small models spent most of their time parsing the same rows in each epoch. In the order of
    ``_from_files``.
    """
    _require_batch_size(batch_size)
    ids, numbers = packed_columns(dataset.inputs)
    columns = read_columns(dataset, "train", [*ids, *numbers])
    columns = {name: tf.constant(values) for name, values in columns.items()}
    num_rows = dataset.num_rows("train")

    def records(rows: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: tf.gather(values, rows) for name, values in columns.items()}

    def shuffled_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        rows = tf.data.Dataset.range(num_rows).shuffle(num_rows, seed=epoch, reshuffle_each_iteration=False)
        return rows.batch(batch_size).map(records, **_PARALLEL)

    return shuffled_batches


def _from_files(dataset: DatasetDir, batch_size: int) -> Callable[[tf.Tensor], tf.data.Dataset]:
    """Epoch -> batches of records, read from the files in each epoch."""
    files = dataset.record_files("train")

    def shuffled_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        rows = _serialized(files).shuffle(_SHUFFLE_BUFFER_ROWS, seed=epoch, reshuffle_each_iteration=False)
        return _parsed(rows, dataset, batch_size)

    return shuffled_batches


def with_teacher_scores(batched: tf.data.Dataset, scores: RowValues) -> tf.data.Dataset:
    """Adds ``teacher_score`` [batch] to the features."""
    table = scores.lookup_table()

    def add(features, labels, sample_weight):
        return {**features, "teacher_score": table.lookup(features["row_id"])}, labels, sample_weight

    return batched.map(add)


def with_row_weights(batched: tf.data.Dataset, weights: RowValues) -> tf.data.Dataset:
    """Multiplies the sample weights by a weight per row; weight 0 leaves a row out of the loss."""
    table = weights.lookup_table()
    return batched.map(lambda features, labels, weight: (features, labels, weight * table.lookup(features["row_id"])))


def read_columns(dataset: DatasetDir, split: str, names: list[str]) -> dict[str, np.ndarray]:
    """Whole columns of a split in file order: record fields or model inputs, by name."""
    parsed = _parsed(_serialized(dataset.record_files(split)), dataset, 4096)
    selected = _prepared(parsed.map(lambda record: {name: record[name] for name in names}))
    parts = list(selected.as_numpy_iterator())
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


_PARALLEL = {"num_parallel_calls": 2, "deterministic": True}


def _buffer_rows(dataset: DatasetDir, split: str) -> int:
    return min(dataset.num_rows(split), _SHUFFLE_BUFFER_ROWS)


def _serialized(files: list[str]) -> tf.data.Dataset:
    compression = "GZIP" if files[0].endswith(".gz") else ""
    return tf.data.Dataset.from_tensor_slices(files).interleave(
        lambda path: tf.data.TFRecordDataset(path, compression_type=compression),
        cycle_length=min(len(files), _READ_PARALLELISM),
        block_length=64,
        num_parallel_calls=min(len(files), _READ_PARALLELISM),
        deterministic=True,
    )


def _parsed(serialized: tf.data.Dataset, dataset: DatasetDir, batch_size: int) -> tf.data.Dataset:
    _require_batch_size(batch_size)
    # Batch first: parsing whole batches is more than ten times as fast as parsing examples.
    inputs, layout = dataset.inputs, dataset.spec.record_layout
    return serialized.batch(batch_size).map(lambda batch: parse_records(batch, inputs, layout), **_PARALLEL)


def _require_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1. Received: {batch_size}")


def _as_training_batch(record):
    features = dict(record)
    label, weight = features.pop("label"), features.pop("sample_weight")
    for held_out in ("intensity_label", "intensity_value", "user_hash", "event_time"):
        del features[held_out]
    return features, label, weight


def _prepared(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    # Autotune's optimisation thread can hold up the end of each epoch for seconds (TF 2.21); parallelism is explicit.
    options.autotune.enabled = False
    return dataset.prefetch(4).with_options(options)
