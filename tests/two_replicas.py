"""Fits a model with one replica, and with two that share each batch: run as a command, in a process of its own.

TensorFlow splits the CPU into two devices only before it is first used. Reads from standard input one settings dict of
``ClsdConfig`` per fit, as a JSON list; prints a dict of what each left, as JSON in the last line.
"""

# isort: off
import clsd_tf  # noqa: F401

# isort: on
import json
import sys
import warnings

import numpy as np
import tensorflow as tf

from clsd_tf.clsd import AdGate, ClsdConfig, ClsdModel
from clsd_tf.distribution import create_strategy, distributed, scope
from clsd_tf.model_inputs import GroupInput, ModelInputs

INPUTS = ModelInputs(categorical=(), numeric=("x",), groups=(GroupInput("tier", ("unknown", "low", "high")),))
BATCH, ROWS, EPOCHS = 16, 65, 2  # The last batch has one row: none for the first replica.


class Backbone(tf.keras.Model):
    """A penalty, a table and dense layers."""

    def __init__(self):
        super().__init__()
        penalty = tf.keras.regularizers.L2(0.01)
        self._table = tf.keras.layers.Embedding(3, 2, embeddings_regularizer=penalty)
        self._hidden = tf.keras.layers.Dense(4, activation="tanh")
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


def new_model(config):
    tf.keras.utils.set_random_seed(7)
    gate = AdGate(INPUTS, config.ad_gate) if config.mu else None
    teacher = Backbone() if config.teacher == "ema" else None
    model = ClsdModel(Backbone(), gate, config, teacher_backbone=teacher)
    model.compile(tf.keras.optimizers.Adam(0.02))
    features = {"x": tf.zeros([1, 3]), "tier": tf.zeros([1], tf.int64)}
    model(features)
    model.debug_outputs(features)
    if teacher:
        teacher(features)
    return model


def fitted(strategy, config):
    with scope(strategy):
        model = new_model(config)
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


def main():
    warnings.simplefilter("ignore")
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    mirrored = create_strategy("mirrored")  # One for all fits: TensorFlow mixes up the collectives of two.
    assert mirrored.num_replicas_in_sync == 2
    results = []
    for settings in json.load(sys.stdin):
        config = ClsdConfig.model_validate(settings)
        results.append({"one": fitted(None, config), "two": fitted(mirrored, config)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
