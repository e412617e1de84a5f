"""Fits on a parameter server and a worker, all in this process: run as a command, since TensorFlow leaves no cluster.

Prints what came of a fit without callbacks, and of one with a single callback and a loss that is NaN.
"""

# isort: off
import clsd_tf  # noqa: F401

# isort: on
import tensorflow as tf
from clusters import free_ports

from clsd_tf.distributed.strategies import scope
from clsd_tf.methods.clsd.config import ClsdConfig
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.training.callbacks import StopOnNonFiniteLoss, TrainingDivergedError

PLAIN = ClsdConfig.model_validate({"teacher": "self", "lambda": 0.0, "mu": 0.0})


def asynchronous_strategy():
    ps, worker = (f"localhost:{port}" for port in free_ports(2))
    cluster = tf.train.ClusterSpec({"ps": [ps], "worker": [worker]})
    for name in cluster.jobs:
        tf.distribute.Server(cluster, job_name=name, task_index=0, protocol="grpc")
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    return tf.distribute.ParameterServerStrategy(resolver)


def fitted(strategy, number, callbacks):
    with scope(strategy):
        model = ClsdModel(tf.keras.Sequential([tf.keras.layers.Dense(1)]), config=PLAIN)
        model.compile("sgd")
    batch = tf.fill([8, 1], number), tf.ones([8]), tf.ones([8])
    rows = tf.keras.utils.experimental.DatasetCreator(lambda _: tf.data.Dataset.from_tensors(batch).repeat())
    return model.fit(rows, steps_per_epoch=3, epochs=2, verbose=0, callbacks=callbacks).history


def main():
    strategy = asynchronous_strategy()
    print("epochs without callbacks:", len(fitted(strategy, 1.0, None)["loss"]))
    try:
        fitted(strategy, float("nan"), StopOnNonFiniteLoss())
    except TrainingDivergedError as error:
        print("diverged:", error)


if __name__ == "__main__":
    main()
