"""TFRecord shards -> tf.data of (features, labels, sample_weight).

Rows move in blocks of a file, never one by one, and are parsed last, a whole batch at once: what is shuffled, skipped
or left to another worker is never parsed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from clsd_tf.data.examples import parse_records, parsed_bytes_per_row, record_tensors, unpacked
from clsd_tf.spec.record_fields import TEACHER_SCORE, names_of
from clsd_tf.storage.dataset_dir import DatasetDir

# Mixes as well as a shuffle buffer of 200,000 rows does: a row moves by 2^19 / sqrt(6) = 214,000 places (standard
# deviation). Some five windows of serialized rows are held at a time, and each row takes 40 bytes beyond its own: with
# windows of 80 MiB that is some 500 MiB, however large rows are. Windows of rows beyond 160 bytes mix less.
_WINDOW_ROWS = 2**19
_WINDOW_BYTES = 80 * 2**20
_BLOCK_ROWS = 1024
_FILES_AT_ONCE = 4
_PARALLEL = {"num_parallel_calls": 2, "deterministic": True}


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of each batch that a worker parses: rows [index * n // count, (index + 1) * n // count) of n.

    Attributes:
      index: of the worker, in [0, count); an int64 tensor where one graph serves all workers.
      count: of the workers.

    Raises:
      ValueError: the index is out of range.
    """

    index: int | tf.Tensor
    count: int

    def __post_init__(self):
        # A parameter server's worker learns its index when the pipeline runs.
        if not tf.is_tensor(self.index) and not 0 <= self.index < self.count:
            raise ValueError(
                f"a shard's index must be in [0, count). Received: index={self.index}, count={self.count}. "
                "A single worker is Shard(0, 1)"
            )

    def of(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns this part of ``rows``, [batch, ...] -> [about batch / count, ...]."""
        num_rows = tf.shape(rows, tf.int64)[0]
        return rows[self.index * num_rows // self.count : (self.index + 1) * num_rows // self.count]


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
        """Creates the table row id -> value; NaN for other rows."""
        initializer = tf.lookup.KeyValueTensorInitializer(
            tf.constant(self.row_ids, tf.int64), tf.constant(self.values, tf.float32)
        )
        return tf.lookup.StaticHashTable(initializer, default_value=float("nan"))


def batches(dataset: DatasetDir, split: str, *, batch_size: int, shuffle_seed: int | None = None) -> tf.data.Dataset:
    """Reads a split once, for ``model.fit`` and ``model.evaluate``.

    Args:
      dataset: a complete dataset directory.
      split: train, validation or test.
      batch_size: rows per batch; the last batch may be smaller.
      shuffle_seed: shuffles rows, differently in each pass; None keeps the file order, shards side by side.

    Returns:
      (features, labels, sample_weight): labels and weights are float32 [batch]. Features hold the model inputs, the
      user groups and ``row_id``.
    """
    _require_at_least("batch_size", batch_size, 1)
    source = _files(dataset, split)
    if shuffle_seed is None:
        rows = _blocks(source, source.parts).rebatch(batch_size)
    else:
        seeds = tf.data.Dataset.random(shuffle_seed, rerandomize_each_iteration=True).take(1)
        rows = seeds.flat_map(lambda seed: _shuffled(source, seed, 0, 1).rebatch(batch_size))
    return _prepared(rows.map(lambda batch: _as_training_batch(source.records(batch)), **_PARALLEL))


def training_epochs(
    dataset: DatasetDir,
    *,
    batch_size: int,
    seed: int,
    first_epoch: int,
    num_epochs: int,
    first_step: int = 0,
    shard: Shard = Shard(0, 1),
    labels: Sequence[str] = ("label",),
    max_cache_bytes: int = 0,
) -> tf.data.Dataset:
    """Reads the training split in epochs ``first_epoch`` to ``num_epochs``, one after the other.

    The order of rows is a function of (dataset, seed, epoch) alone, the same on every machine: a run that resumes sees
    what it would have seen. An epoch takes the shards in random order, four side by side, and permutes windows of
    524,288 rows, or of fewer that take 80 MiB; memory does not grow with the rows.

    Args:
      dataset: a complete dataset directory.
      batch_size: rows per batch over all workers; the last batch of an epoch may be smaller.
      seed: of the order.
      first_epoch: from 0, below ``num_epochs``.
      num_epochs: the last epoch is ``num_epochs`` - 1.
      first_step: batch with which the first epoch begins. Those before it are read, not parsed.
      shard: the part of each batch to yield; it may be empty in a last batch of fewer rows than workers.
      labels: record fields that are the labels; of several, batches hold a dict of them by name.
      max_cache_bytes: a split that takes at most this once parsed is read only once and held in memory; 0 reads the
        files in each epoch. Changes nothing of what is yielded.

    Returns:
      As ``batches``.

    Raises:
      ValueError: a size, an epoch or a step out of range.
    """
    num_rows = dataset.num_rows("train")
    _require_at_least("batch_size", batch_size, 1)
    if not 0 <= first_epoch < num_epochs:
        raise ValueError(
            f"first_epoch must be in [0, num_epochs). Received: first_epoch={first_epoch}, num_epochs={num_epochs}"
        )
    batch_sizes = _sizes(num_rows, batch_size)
    if not 0 <= first_step < len(batch_sizes):
        raise ValueError(
            f"first_step must be a batch of its epoch. Received: {first_step}. Allowed: 0 to {len(batch_sizes) - 1}; "
            "after the last one comes first_step=0 of the next epoch"
        )
    fits = num_rows * parsed_bytes_per_row(dataset.inputs) <= max_cache_bytes
    source = _memory(dataset, "train") if fits else _files(dataset, "train")
    rows = _shuffled(source, seed, first_epoch, num_epochs).rebatch(batch_sizes).skip(first_step)
    return _prepared(rows.map(lambda batch: _as_training_batch(source.records(shard.of(batch)), labels), **_PARALLEL))


class _Source(NamedTuple):
    """Rows that are told apart by handles, which are cheap to move: serialized records, or places in memory.

    Attributes:
      window_sizes: rows of an epoch that are permuted together.
      parts: a file each, [num_files, ...].
      handles: part -> handles of its rows, one by one in their order.
      records: handles [batch] -> records as ``parse_records`` gives them.
    """

    window_sizes: list[int]
    parts: tf.Tensor
    handles: Callable[[tf.Tensor], tf.data.Dataset]
    records: Callable[[tf.Tensor], dict[str, tf.Tensor]]


def _files(dataset: DatasetDir, split: str) -> _Source:
    paths = dataset.record_files(split)
    compression = "GZIP" if paths[0].endswith(".gz") else ""
    inputs, layout = dataset.inputs, dataset.spec.record_layout
    return _Source(
        _window_sizes(dataset.num_rows(split), paths),
        tf.constant(paths),
        lambda path: tf.data.TFRecordDataset(path, compression_type=compression, buffer_size=2**20),
        lambda serialized: parse_records(serialized, inputs, layout),
    )


def _memory(dataset: DatasetDir, split: str) -> _Source:
    """The same rows, parsed once: small models spent most of their time parsing the same rows in each epoch."""
    with tf.init_scope():
        files = _files(dataset, split)

    def blocks(file: tf.Tensor, path: tf.Tensor) -> tf.data.Dataset:
        return files.handles(path).batch(4 * _BLOCK_ROWS).map(lambda rows: (tf.fill(tf.shape(rows), file), rows))

    def packed_block(file: tf.Tensor, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"file": file, **record_tensors(files.records(rows), dataset.inputs, "packed")}

    with tf.init_scope():  # Read now, also where the pipeline is part of a graph that is sent to workers.
        in_order = tf.data.Dataset.from_tensor_slices(files.parts).enumerate().flat_map(blocks)
        found = _concatenated(in_order.map(packed_block, **_PARALLEL))
        packed = {name: tf.constant(found[name]) for name in ("ids", "numbers")}
    ends = np.cumsum(np.bincount(found["file"], minlength=len(files.parts)))
    return _Source(
        files.window_sizes,
        tf.constant(np.stack([np.append(0, ends[:-1]), ends], axis=1), tf.int64),
        lambda bounds: tf.data.Dataset.range(bounds[0], bounds[1]),
        lambda rows: unpacked({name: tf.gather(values, rows) for name, values in packed.items()}, dataset.inputs),
    )


def _window_sizes(num_rows: int, paths: list[str]) -> list[int]:
    bytes_per_row = sum(map(_uncompressed_bytes, paths)) / max(num_rows, 1)
    return _sizes(num_rows, max(1, min(_WINDOW_ROWS, int(_WINDOW_BYTES / max(bytes_per_row, 1)))))


def _uncompressed_bytes(path: str) -> int:
    size = os.path.getsize(path)
    if not path.endswith(".gz"):
        return size
    with open(path, "rb") as file:
        file.seek(-min(4, size), os.SEEK_END)  # A gzip file ends with the size of what it holds, modulo 2^32.
        return max(size, int.from_bytes(file.read(), "little"))


def _concatenated(batched: tf.data.Dataset) -> dict[str, np.ndarray]:
    parts = list(_prepared(batched).as_numpy_iterator())
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _blocks(source: _Source, parts: tf.Tensor) -> tf.data.Dataset:
    """Reads the handles of these parts, [at most 1024]; a block from each of four parts in turn."""
    return tf.data.Dataset.from_tensor_slices(parts).interleave(
        lambda part: source.handles(part).batch(_BLOCK_ROWS),
        cycle_length=_FILES_AT_ONCE,
        block_length=1,
        **_PARALLEL,
    )


def _shuffled(source: _Source, seed: int | tf.Tensor, first_epoch: int, num_epochs: int) -> tf.data.Dataset:
    """Handles of epoch after epoch in the order of ``training_epochs``, a window at a time.

    One stream over all epochs, so that the next epoch is read while this one ends.
    """
    window_sizes = source.window_sizes

    def blocks(epoch: tf.Tensor) -> tf.data.Dataset:
        return _blocks(source, _permuted(source.parts, seed, epoch, 0))

    def permuted(index: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
        epoch, place = first_epoch + index // len(window_sizes), index % len(window_sizes)
        return _permuted(window, seed, epoch, 1 + place)

    windows = tf.data.Dataset.range(first_epoch, num_epochs).flat_map(blocks).rebatch(window_sizes)
    return windows.enumerate().map(permuted, num_parallel_calls=1, deterministic=True)


def _permuted(values: tf.Tensor, seed: int | tf.Tensor, epoch: tf.Tensor, place: tf.Tensor | int) -> tf.Tensor:
    """Values in an order that (seed, epoch, place) decide; place is below 2^32."""
    pair = tf.stack([tf.cast(seed, tf.int64), tf.cast(epoch, tf.int64) * 2**32 + tf.cast(place, tf.int64)])
    # The algorithm is named: by default it would depend on the device.
    order = tf.random.experimental.stateless_shuffle(tf.range(tf.shape(values)[0]), pair, alg="philox")
    return tf.gather(values, order)


def _sizes(num_rows: int, size: int) -> list[int]:
    """``num_rows`` in parts of ``size`` and a smaller last one."""
    full, rest = divmod(num_rows, size)
    return [size] * full + [rest] * bool(rest)


def with_teacher_scores(batched: tf.data.Dataset, scores: RowValues, feature: str = TEACHER_SCORE) -> tf.data.Dataset:
    """Adds teacher scores to batches.

    Args:
      batched: as ``batches`` gives them.
      scores: of the rows.
      feature: the name that they get.

    Returns:
      The batches, with ``feature`` among the features: float32 [batch], NaN for rows without a score.
    """
    table = scores.lookup_table()

    def add(features, labels, sample_weight):
        return {**features, feature: table.lookup(features["row_id"])}, labels, sample_weight

    return _prepared(batched.map(add))


def with_row_weights(batched: tf.data.Dataset, weights: RowValues) -> tf.data.Dataset:
    """Multiplies the sample weights by a weight per row.

    Args:
      batched: as ``batches`` gives them.
      weights: of all rows; 0 leaves a row out of the loss.

    Returns:
      The batches with other sample weights.
    """
    table = weights.lookup_table()

    def weigh(features, labels, sample_weight):
        return features, labels, sample_weight * table.lookup(features["row_id"])

    return _prepared(batched.map(weigh))


def read_columns(dataset: DatasetDir, split: str, names: list[str]) -> dict[str, np.ndarray]:
    """Reads whole columns of a split into memory.

    Args:
      dataset: a complete dataset directory.
      split: train, validation or test.
      names: record fields, user groups or model inputs.

    Returns:
      Name -> [num_rows] or [num_rows, num_ids], in file order, shards side by side.
    """
    source = _files(dataset, split)
    blocks = _blocks(source, source.parts).rebatch(4 * _BLOCK_ROWS)

    def selected(rows: tf.Tensor) -> dict[str, tf.Tensor]:
        records = source.records(rows)
        return {name: records[name] for name in names}

    return _concatenated(blocks.map(selected, **_PARALLEL))


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}. Received: {value}")


def _as_training_batch(record: Mapping[str, tf.Tensor], labels: Sequence[str] = ("label",)) -> tuple:
    withheld = names_of("label", "weight", "held_out")
    features = {name: values for name, values in record.items() if name not in withheld}
    found = {name: record[name] for name in labels}
    (weight,) = names_of("weight")
    return features, found if len(found) > 1 else found[labels[0]], record[weight]


def _prepared(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    # Autotune's optimization thread can hold up the end of each epoch for seconds (TF 2.21); parallelism is explicit.
    options.autotune.enabled = False
    return dataset.prefetch(4).with_options(options)
