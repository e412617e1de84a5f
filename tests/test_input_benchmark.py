"""The benchmark of the input pipeline measures what it says."""

import time

import pytest
import tensorflow as tf

from benchmarks import input_rates
from benchmarks.generated_dataset import generated_dataset


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


def test_floors_are_above_zero(generated):
    assert input_rates.records_per_second(generated, batch_size=100, repeats=1) > 0
    assert input_rates.copied_rows_per_second(generated, repeats=1) > 0


def test_what_comes_after_the_last_batch_is_overhead():
    clock = input_rates._EpochClock()
    for _ in range(2):
        clock.on_epoch_begin(0)
        time.sleep(0.1)
        clock.on_train_batch_end(0)
        time.sleep(0.05)
    clock.on_train_end()
    assert clock.overheads == pytest.approx([0.5, 0.5], abs=0.25)


def test_the_overhead_of_a_fit_is_measured(generated):
    assert input_rates.epoch_end_overhead(generated, batch_size=100, epochs=1) >= 0
