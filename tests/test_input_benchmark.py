"""The benchmark of the input pipeline measures what it says."""

import itertools
import time
import types

import pytest
import tensorflow as tf

from benchmarks import input_rates
from benchmarks.generated_dataset import generated_dataset
from clsd_tf.methods.method_model import MethodModel


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return generated_dataset(tmp_path_factory.mktemp("generated"), num_rows=2000, vocabulary_size=5, num_categorical=2)


@pytest.mark.parametrize("max_cache_bytes", [0, 2**30])
def test_the_pipelines_rate_is_rows_of_an_epoch_over_its_time(generated, monkeypatch, max_cache_bytes):
    # An epoch of 20 batches that take 0.01 seconds each at least: 0.2 seconds for 2,000 rows.
    plain = input_rates.training_epochs

    def slow_epochs(*args, **kwargs):
        return plain(*args, **kwargs).map(slowly)

    def slowly(features, labels, weights):
        pause = tf.numpy_function(lambda: time.sleep(0.01) or 0.0, [], tf.float64)
        with tf.control_dependencies([pause]):
            return features, tf.identity(labels), weights

    monkeypatch.setattr(input_rates, "training_epochs", slow_epochs)
    rate = input_rates.pipeline_examples_per_second(
        generated, batch_size=100, repeats=2, max_cache_bytes=max_cache_bytes
    )
    assert 1000 < rate < 10_000


def test_floors_are_rows_over_the_median_time_of_the_passes_behind_the_first(generated, monkeypatch):
    def passes_of(*seconds):
        ends = itertools.accumulate(entry for second in seconds for entry in (0.0, second))
        monkeypatch.setattr(input_rates, "time", types.SimpleNamespace(perf_counter=lambda: next(ends)))

    passes_of(9.0, 1.0, 4.0, 2.0)
    assert input_rates.records_per_second(generated, batch_size=100, repeats=3) == 2000 / 2.0
    passes_of(9.0, 1.0, 4.0, 2.0)
    assert input_rates.copied_rows_per_second(generated, repeats=3) == 100_000 / 2.0


@pytest.mark.parametrize(
    ("method", "seconds", "low", "high"),
    [
        # 20 batches of .02 seconds or more: little comes after the last one.
        ("on_train_batch_begin", 0.02, -0.01, 0.5),
        # After the last batch a second, as autotune would take; batches of 2,000 rows take less than two.
        ("on_train_end", 1.0, 0.5, 1000.0),
    ],
)
def test_what_keeps_fit_after_its_last_batch_is_overhead(generated, monkeypatch, method, seconds, low, high):
    class Late(tf.keras.callbacks.Callback):
        pass

    setattr(Late, method, lambda self, *args: time.sleep(seconds))
    plain = MethodModel.fit

    def late_fit(self, *args, callbacks, **kwargs):
        return plain(self, *args, callbacks=[*callbacks, Late()], **kwargs)

    monkeypatch.setattr(MethodModel, "fit", late_fit)
    assert low < input_rates.epoch_end_overhead(generated, batch_size=100, epochs=1) < high
