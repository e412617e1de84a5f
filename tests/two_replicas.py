"""Fits a model with one replica, and with two that share each batch: run as a command, in a process of its own.

TensorFlow splits the CPU into two devices only before it is first used. Reads from standard input a dict of settings of
``ClsdConfig`` (clsd) and ``OptimizerConfig`` (optimizer) per fit, as a JSON list. Prints, as JSON in the last line, a
dict of what each left (fits), and for some numbers of steps per epoch what a run was told that SIGTERM stopped (stops).
"""

# isort: off
import clsd_tf  # noqa: F401

# isort: on
import json
import pathlib
import signal
import sys
import tempfile
import warnings

import numpy as np
import tensorflow as tf

from clsd_tf.commands.interruption import Sigterm, TrainingInterruptedError
from clsd_tf.distributed.strategies import create_strategy, distributed, scope
from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.config import ClsdConfig
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.optimizers.config import OptimizerConfig
from clsd_tf.optimizers.row_sparse import build_optimizer
from clsd_tf.spec.model_inputs import GroupInput, ModelInputs
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.config import load_config
from clsd_tf.training.save_and_stop import SaveAndStop

INPUTS = ModelInputs(categorical=(), numeric=("x",), groups=(GroupInput("tier", ("unknown", "low", "high")),))
BATCH, ROWS, EPOCHS = 16, 65, 2  # The last batch has one row: none for the first replica.
PLAIN = ClsdConfig.model_validate({"teacher": "self", "lambda": 0.0, "mu": 0.0})


class Backbone(tf.keras.Model):
    """A table with sparse gradients, dense layers and a penalty."""

    def __init__(self):
        super().__init__()
        penalty = tf.keras.regularizers.L2(0.01)
        self._table = tf.keras.layers.Embedding(3, 2)
        self._hidden = tf.keras.layers.Dense(4, activation="tanh", kernel_regularizer=penalty)
        self._logits = tf.keras.layers.Dense(1)

    def call(self, features, training=False):
        return self._logits(tf.concat([self._table(features["tier"]), self._hidden(features["x"])], axis=1))


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=[ROWS, 3]).astype(np.float32)
    tier = random.integers(0, 3, ROWS)
    labels = (random.random(ROWS) < 0.4).astype(np.float32)
    labels[32:40] = 0.0  # No click for the first replica in the third batch,
    labels[48:64] = 0.0  # and for none in the fourth.
    scores = random.uniform(0.05, 0.95, ROWS).astype(np.float32)
    scores[::7] = np.nan  # As of a prequential teacher's first day.
    return {"x": x, "tier": tier, "teacher_score": scores}, labels, random.uniform(0.5, 2, ROWS).astype(np.float32)


def batches(shard, joined):
    assert (shard.index, shard.count, joined) == (
        0,
        1,
        1,
    )  # One process: the strategy divides its batches among the replicas.
    return tf.data.Dataset.from_tensor_slices(data()).batch(BATCH).repeat(EPOCHS)


def new_model(config, optimizer):
    tf.keras.utils.set_random_seed(7)
    gate = AdGate(INPUTS, config.ad_gate) if config.mu else None
    teacher = Backbone() if config.teacher == "ema" else None
    model = ClsdModel(Backbone(), gate, config, teacher_backbone=teacher)
    features = {"x": tf.zeros([1, 3]), "tier": tf.zeros([1], tf.int64)}
    model.debug_outputs(features)
    model.compile(build_optimizer(optimizer, 0.02, model.backbone))
    if teacher:
        teacher(features)
    model.optimizer.build(model.backbone.trainable_variables)
    return model


def fitted(strategy, config, optimizer):
    with scope(strategy):
        model = new_model(config, optimizer)
    history = model.fit(
        distributed(strategy, batches), epochs=EPOCHS, steps_per_epoch=-(-ROWS // BATCH), verbose=0
    ).history
    with scope(strategy):
        evaluated = model.evaluate(tf.data.Dataset.from_tensor_slices(data()).batch(BATCH), verbose=0, return_dict=True)
    teacher = model._teacher_backbone.variables if model._teacher_backbone else []
    gate = model.ad_gate.variables if model.ad_gate else []
    weights = [*model.backbone.variables, *gate, *teacher]
    guards = [variable.numpy().tolist() for variable in model.guard_state.variables]
    return {
        "history": history,
        "evaluated": evaluated,
        "weights": [variable.numpy().tolist() for variable in weights],
        "guards": guards,
    }


def stopped(strategy, steps_per_epoch):
    """What a run says that SIGTERM stops, which comes as its third epoch begins; one that goes on dies of it."""
    sigterm = Sigterm()

    class Timed(tf.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                signal.raise_signal(signal.SIGTERM)

        def on_epoch_end(self, epoch, logs=None):
            logs["val_auc"] = 0.5

    with tempfile.TemporaryDirectory() as directory:
        keeper = SaveAndStop(
            WorkDir(pathlib.Path(directory)),
            load_config(None, ["patience_epochs=null"]),
            steps_per_epoch=steps_per_epoch,
            sigterm=sigterm,
        )
        with scope(strategy):
            model = new_model(PLAIN, OptimizerConfig())
            keeper.resume(model)
        rows = distributed(strategy, lambda shard, joined: batches(shard, joined).repeat())
        try:
            with sigterm:
                model.fit(rows, epochs=6, steps_per_epoch=steps_per_epoch, verbose=0, callbacks=[Timed(), keeper])
        except TrainingInterruptedError as error:
            return str(error)


def main():
    warnings.simplefilter("ignore")
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    mirrored = create_strategy("mirrored")  # One for all fits: TensorFlow mixes up the collectives of two.
    assert mirrored.num_replicas_in_sync == 2
    fits = []
    for settings in json.load(sys.stdin):
        configs = ClsdConfig.model_validate(settings["clsd"]), OptimizerConfig.model_validate(settings["optimizer"])
        fits.append({"one": fitted(None, *configs), "two": fitted(mirrored, *configs)})
    print(json.dumps({"fits": fits, "stops": {steps: stopped(mirrored, steps) for steps in (1, 2)}}))


if __name__ == "__main__":
    main()
