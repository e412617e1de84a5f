"""Throughput while training: what steps wait for, whatever Keras makes of them, and what is shown of it."""

import io
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console
import tensorflow as tf
from runs import fitted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clsd_tf.commands.console import console
from clsd_tf.methods.clsd.config import ClsdConfig
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.methods.input_wait import InputWait
from clsd_tf.methods.pointwise.method import BCE
from clsd_tf.storage.files import read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training import callbacks
from clsd_tf.training.throughput import Throughput

BATCH, STEPS = 8, 6


class Mean(tf.keras.Model):
    """Logits of one weight."""

    def __init__(self):
        super().__init__()
        self.dense = tf.keras.layers.Dense(1)

    def call(self, features, training=False):
        return tf.squeeze(self.dense(features["number"]), axis=1)


def batches(seconds=0.0, steps=STEPS):
    """``steps`` batches, each after a pause."""

    def pause(index):
        time.sleep(seconds)
        return index

    def batch(index):
        index = tf.ensure_shape(tf.numpy_function(pause, [index], tf.int64), [])
        numbers = tf.cast(tf.range(BATCH), tf.float32) + tf.cast(index, tf.float32)
        return {"number": numbers[:, tf.newaxis]}, tf.cast(numbers % 2 == 0, tf.float32), tf.ones([BATCH])

    options = tf.data.Options()
    options.autotune.enabled = False  # It would prefetch, and the pauses would overlap with steps.
    return tf.data.Dataset.range(steps).map(batch).with_options(options)


def compiled(**arguments):
    model = ClsdModel(Mean(), config=ClsdConfig(teacher="self", **{"lambda": 0.0, "mu": 0.0}))
    model.compile(tf.keras.optimizers.SGD(0.1), **arguments)
    return model


KINDS = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "three steps an execution": {"steps_per_execution": 3},
    "xla": {"jit_compile": True},
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_the_wait_for_input_is_that_of_all_steps(arguments):
    model = compiled(**arguments)
    model.fit(batches(0.03), epochs=1, verbose=0)
    waited = model.input_wait_seconds
    assert waited >= STEPS * 0.03
    start = time.monotonic()
    model.fit(batches(0.03), epochs=2, verbose=0)
    assert 2 * STEPS * 0.03 <= model.input_wait_seconds - waited <= time.monotonic() - start


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_a_slow_step_is_no_wait_for_input(arguments):
    model = compiled(**arguments)
    plain_step = model.train_step

    def slow_step(data):
        logs = plain_step(data)
        with tf.control_dependencies([logs["loss"]]):
            paused = tf.numpy_function(lambda: time.sleep(0.05) or np.float32(0.0), [], tf.float32)
        return {**logs, "paused": tf.ensure_shape(paused, [])}

    if not arguments.get("jit_compile"):  # XLA knows no pauses.
        model.train_step = slow_step
    ready = list(batches())
    held = tf.data.Dataset.from_tensors(ready[0]).repeat(STEPS)
    start = time.monotonic()
    model.fit(held, epochs=1, verbose=0)
    assert model.input_wait_seconds < 0.5 * (time.monotonic() - start)


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_measuring_changes_no_weight(arguments):
    weights = []
    for kind in (ClsdModel, tf.keras.Model):
        tf.keras.utils.set_random_seed(1)
        model = compiled(**arguments)
        if kind is tf.keras.Model:  # Keras' own steps, without a measurement.
            tf.keras.Model.make_train_function(model)
        model.fit(batches(), epochs=2, verbose=0)
        weights.append(model.get_weights())
        assert (model.input_wait_seconds > 0) == (kind is ClsdModel)
    for measured, plain in zip(*weights, strict=True):
        np.testing.assert_array_equal(measured, plain)


_TWO_REPLICAS = """
import sys
import clsd_tf
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, sys.argv[1])
from test_throughput import batches, compiled
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = compiled(steps_per_execution=int(sys.argv[2]))
model.fit(batches(0.1), verbose=0)
print(model.input_wait_seconds)
"""


@pytest.mark.long
@pytest.mark.parametrize("steps_per_execution", ["1", "3"])
def test_two_replicas_wait_for_their_batch_once(steps_per_execution):
    # In a process of its own: logical devices are made before TensorFlow begins.
    here = pathlib.Path(__file__).parent
    command = [sys.executable, "-c", _TWO_REPLICAS, str(here), steps_per_execution]
    done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A slow step hides some of the next one's wait; counted by each replica it would be twice as long.
    assert 0.5 < float(done.stdout.split()[-1]) / (STEPS * 0.1) < 1.5


def test_the_wait_is_no_part_of_a_checkpoint():
    model = compiled()
    model.fit(batches(), verbose=0)
    names = [variable.name for variable in model.variables]
    assert names
    assert not [name for name in names if "wait" in name]


def test_a_batch_of_train_on_batch_is_measured_too():
    model = compiled()
    features, labels, weights = next(iter(batches()))
    model.train_on_batch(features, labels, weights)
    assert model.input_wait_seconds > 0


def test_an_iterator_that_ends_ends_as_it_does_without_a_measurement():
    wait = InputWait()
    timed = wait.timed(iter(batches(steps=2)))
    assert len(list(timed)) == 2
    with pytest.raises(StopIteration):
        next(timed)


# --- Rates -----------------------------------------------------------------------------------------------------------


def test_rates_are_those_since_the_epoch_began_up_to_its_last_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    model = compiled()
    model.optimizer.iterations.assign(40)
    model._input_wait.seconds = 7.0
    throughput = Throughput(512)
    throughput.begin(model)
    now[0] = 104.0
    model.optimizer.iterations.assign(50)
    model._input_wait.seconds = 8.0
    throughput.step()
    now[0] = 200.0  # Validation.
    # 10 steps of 512 rows in 4 seconds, of which 1 second was waiting.
    assert throughput.read() == {"examples_per_second": 1280.0, "input_wait_share": 0.25}


def test_another_keras_model_has_a_rate_and_no_wait_share():
    model = Mean()
    model.compile(tf.keras.optimizers.SGD(0.1), tf.keras.losses.BinaryCrossentropy(from_logits=True))
    throughput = Throughput(BATCH)
    throughput.begin(model)
    model.fit(batches().map(lambda features, labels, weights: (features, labels)), verbose=0)
    throughput.step()
    [(name, rate)] = throughput.read().items()
    assert name == "examples_per_second"
    assert rate > 0


# --- What is shown ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(feed_dataset, tiny, tmp_path_factory):
    """A fit of two epochs from files: its work directory and what it printed."""
    work_dir = WorkDir(tmp_path_factory.mktemp("runs") / "run")
    with console.capture() as captured:
        fitted(feed_dataset, tiny("method=bce", "backbone=lr", "max_cache_bytes=0"), work_dir, title="run")
    return work_dir, captured.get()


def test_the_line_of_an_epoch_names_rate_and_wait(shown):
    lines = shown[1].splitlines()
    assert len(lines) == 2
    for line in lines:
        rate, share = re.search(r", ([\d,]+) examples/s, (\d+)% waiting for input$", line).groups()
        assert int(rate.replace(",", "")) > 0
        assert 0 <= int(share) <= 100


def test_tensorboard_shows_rate_and_wait(shown):
    events = EventAccumulator(str(shown[0].tensorboard)).Reload()
    values = {}
    for name in ("examples_per_second", "input_wait_share"):
        values[name] = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(name)]
        assert [event.step for event in events.Tensors(name)] == [13, 26]
    assert min(values["examples_per_second"]) > 0
    assert all(0 < share <= 1 for share in values["input_wait_share"])


def test_the_history_holds_nothing_that_differs_between_runs(shown):
    names = {name for entry in read_json(shown[0].history) for name in entry}
    assert {"epoch", "loss", "val_auc"} <= names
    assert not names & {"examples_per_second", "input_wait_share"}


@pytest.mark.parametrize("steps_of_earlier_runs", [0, 3])  # Those of a run that goes on from others.
def test_the_bar_begins_at_the_step_where_the_epoch_does(monkeypatch, steps_of_earlier_runs):
    # Step 3 of 6 of the second epoch: as after a restart from a checkpoint.
    model = compiled()
    model.optimizer.iterations.assign(steps_of_earlier_runs + STEPS + 2)
    terminal = rich.console.Console(force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(callbacks, "console", terminal)
    monkeypatch.setattr(callbacks, "_BAR_UPDATE_SECONDS", 0.0)
    bar = callbacks.ProgressBar("run", BCE.objective, steps_per_epoch=STEPS, batch_size=BATCH)
    seen = []

    class Watch(tf.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(bar._bar.tasks[0].completed)

        def on_train_batch_end(self, batch, logs=None):
            seen.append(bar._bar.tasks[0].completed)

    validation = tf.keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(val_auc=0.5))
    model.fit(batches(steps=4), verbose=0, callbacks=[validation, bar, Watch()])
    assert seen == [2, 3, 4, 5, 6]
