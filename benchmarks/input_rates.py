"""Rates of the input pipeline without a model, their floors, and what the end of an epoch costs ``fit``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from clsd_tf.data.examples import parsed_bytes_per_row
from clsd_tf.data.input_pipeline import training_epochs
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.training.assembly import build_model
from clsd_tf.training.config import load_config


def pipeline_examples_per_second(
    dataset: DatasetDir, *, batch_size: int, repeats: int = 5, max_cache_bytes: int = 0
) -> float:
    """Median rate at which the shuffled training split comes without a model; what is held in memory is read before."""
    arguments = {"seed": 1, "batch_size": batch_size, "max_cache_bytes": max_cache_bytes}
    # An epoch that does not count: it fills the page cache, and traces.
    batches = training_epochs(dataset, first_epoch=0, num_epochs=1 + repeats, **arguments)
    rows, start, seconds = 0, time.perf_counter(), []
    for _, labels, _ in batches:
        rows += len(labels)
        if rows % dataset.num_rows("train") == 0:
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return dataset.num_rows("train") / statistics.median(seconds[1:])


def records_per_second(dataset: DatasetDir, *, batch_size: int, repeats: int = 5) -> float:
    """Median rate at which TensorFlow reads the training records in their order, one file after the other."""
    options = tf.data.Options()
    options.autotune.enabled = False
    records = tf.data.TFRecordDataset(dataset.record_files("train"), buffer_size=2**20).batch(batch_size)
    seconds = [_seconds_of_a_pass(records.prefetch(4).with_options(options)) for _ in range(1 + repeats)]
    return dataset.num_rows("train") / statistics.median(seconds[1:])


def copied_rows_per_second(dataset: DatasetDir, *, repeats: int = 5) -> float:
    """Median rate at which one thread copies rows as large as the parsed ones from memory to memory."""
    source = np.ones([100_000, parsed_bytes_per_row(dataset.inputs)], np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return len(source) / statistics.median(seconds[1:])


def epoch_end_overhead(dataset: DatasetDir, *, batch_size: int, epochs: int = 5) -> float:
    """Time of ``epochs`` fits of one epoch, from call to return, over that until the ends of their last batches, - 1.

    TensorFlow's autotune adds seconds to some fits: no median may hide them. One fit before traces. A logistic
    regression trains: what it computes counts least.
    """
    config = load_config(None, ["method=bce", "backbone=lr", f"batch_size={batch_size}"])
    model = build_model(config, dataset.inputs)
    steps = -(-dataset.num_rows("train") // batch_size)

    def fit(epoch: int, clock: tf.keras.callbacks.Callback) -> None:
        batches = training_epochs(
            dataset, batch_size=batch_size, seed=1, first_epoch=epoch, num_epochs=epoch + 1, max_cache_bytes=0
        )
        model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=[clock])

    before, after = np.sum([_seconds_around_last_batch(fit, epoch) for epoch in range(1 + epochs)][1:], axis=0)
    return float(after / before)


def _seconds_around_last_batch(
    fit: Callable[[int, tf.keras.callbacks.Callback], object], epoch: int
) -> tuple[float, float]:
    """Seconds from the call of ``fit(epoch, callback)`` to the end of its last batch, and from there to its return."""
    clock = _LastBatch()
    start = time.perf_counter()
    fit(epoch, clock)
    return clock.moment - start, time.perf_counter() - clock.moment


class _LastBatch(tf.keras.callbacks.Callback):
    """When the newest batch ended."""

    def on_train_batch_end(self, batch, logs=None):
        self.moment = time.perf_counter()


def _seconds_of_a_pass(batches: tf.data.Dataset) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start
