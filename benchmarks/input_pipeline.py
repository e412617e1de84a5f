"""How fast the input pipeline is without a model, and what the end of an epoch costs ``fit``.

Example:
  python -m benchmarks.input_pipeline --directory=/tmp/generated

Writes a dataset of generated records (26 ids a row) to --directory, unless it is there, and walks its training split
shuffled, from files that the page cache holds and from memory. Two floors are measured in the same run: reading the
records without parsing them, and copying as many bytes as the parsed rows have.
"""

import pathlib
import statistics
import time

import numpy as np
import tensorflow as tf
from absl import flags

from benchmarks.generated_dataset import generated_dataset
from clsd_tf import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.artifacts import DatasetDir
from clsd_tf.assembly import build_model
from clsd_tf.examples import parsed_bytes_per_row
from clsd_tf.input_pipeline import training_epochs
from clsd_tf.train_config import load_config

_DIRECTORY = flags.DEFINE_string("directory", None, "Where generated datasets are kept.", required=True)
_ROWS = flags.DEFINE_integer("rows", 2_000_000, "Rows of the training split.", 1000)
_VOCABULARY_SIZE = flags.DEFINE_integer("vocabulary_size", 10_000, "Ids of each of the 26 features.", 2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4096, "Rows per batch.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements; medians are shown.", 1)


def pipeline_examples_per_second(
    dataset: DatasetDir, *, batch_size: int, repeats: int = 5, max_cache_bytes: int = 0
) -> float:
    """Median rate at which the shuffled training split comes without a model; what is held in memory is read before."""
    arguments = {"seed": 1, "batch_size": batch_size, "max_cache_bytes": max_cache_bytes}
    # An epoch ahead: it fills the page cache, and traces.
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


def epoch_end_overhead(dataset: DatasetDir, *, batch_size: int, epochs: int = 3) -> float:
    """Time of ``fit`` for an epoch over the time until the end of its last batch, - 1; the median of ``epochs``.

    TensorFlow's autotune adds seconds there. A logistic regression trains: what it computes counts least.
    """
    config = load_config(None, ["method=bce", "backbone=lr", f"batch_size={batch_size}"])
    model = build_model(config, dataset.inputs)
    clock = _EpochClock()
    steps = -(-dataset.num_rows("train") // batch_size)
    batches = training_epochs(
        dataset, batch_size=batch_size, seed=1, first_epoch=0, num_epochs=1 + epochs, max_cache_bytes=0
    )
    model.fit(batches, epochs=1 + epochs, steps_per_epoch=steps, verbose=0, callbacks=[clock])
    return statistics.median(clock.overheads[1:])


class _EpochClock(tf.keras.callbacks.Callback):
    """Measures each epoch from its begin to its last batch, and to where the next one could begin."""

    def __init__(self):
        super().__init__()
        self.overheads: list[float] = []

    def on_epoch_begin(self, epoch, logs=None):
        self._finish()
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._last_batch = time.perf_counter()

    def on_train_end(self, logs=None):
        self._finish()

    def _finish(self) -> None:
        if hasattr(self, "_last_batch"):
            self.overheads.append((time.perf_counter() - self._start) / (self._last_batch - self._start) - 1.0)


def _seconds_of_a_pass(batches: tf.data.Dataset) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def main(argv) -> None:
    dataset = generated_dataset(
        pathlib.Path(_DIRECTORY.value), num_rows=_ROWS.value, vocabulary_size=_VOCABULARY_SIZE.value
    )
    arguments = {"batch_size": _BATCH_SIZE.value, "repeats": _REPEATS.value}
    read = records_per_second(dataset, **arguments)
    copied = copied_rows_per_second(dataset, repeats=_REPEATS.value)
    rows = [("records read in order, not parsed", f"{read:,.0f}", "", "")]
    rows.append(("parsed rows copied", f"{copied:,.0f}", "", ""))
    for name, max_cache_bytes in (("pipeline from files", 0), ("pipeline from memory", 2**62)):
        rate = pipeline_examples_per_second(dataset, max_cache_bytes=max_cache_bytes, **arguments)
        rows.append((name, f"{rate:,.0f}", f"{rate / read:.2f}", f"{rate / copied:.3f}"))
    title = f"{_ROWS.value:,} rows, {len(dataset.inputs.categorical)} ids, batch {_BATCH_SIZE.value}"
    console.print_table(title, ["", "rows/s", "of reading", "of copying"], rows)
    overhead = epoch_end_overhead(dataset, batch_size=_BATCH_SIZE.value)
    console.console.print(f"fit's epoch over the time until its last batch: {1.0 + overhead:.4f}")


if __name__ == "__main__":
    console.run(main)
