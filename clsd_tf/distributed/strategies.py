"""Training on several devices or processes: the strategy of TF_CONFIG, who is the chief, and who gets which rows.

``mirrored``: one process, a replica per GPU. ``multi_worker``: a process per machine, all in lockstep; each has a part
of every batch. ``parameter_server``: workers compute gradients of batches of their own, whenever they are done, and a
chief schedules them. The first two train as one process does with the same batches.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeGuard, TypeVar, get_args

import tensorflow as tf

from clsd_tf.commands.console import console
from clsd_tf.data.input_pipeline import Shard

StrategyName = Literal["none", "mirrored", "multi_worker", "parameter_server"]
STRATEGIES = get_args(StrategyName)
_SECONDS_BETWEEN_LOOKS = 2
_T = TypeVar("_T")
_TASKS = {"multi_worker": ("chief", "worker"), "parameter_server": ("chief", "worker", "ps")}
_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


class ClusterError(ValueError):
    """TF_CONFIG does not describe a cluster that the strategy can use."""


class WorkerLostError(RuntimeError):
    """Another process of the cluster has ended or cannot be reached."""


class Cluster:
    """The cluster that TF_CONFIG describes: the addresses of all tasks, and which of them this process is.

    Attributes:
      tasks: task type -> addresses.
      task_type: of this process.
      task_index: of this process, in the addresses of its type.
    """

    def __init__(self, tasks: dict[str, list[str]], task_type: str, task_index: int):
        self.tasks = tasks
        self.task_type = task_type
        self.task_index = task_index

    @classmethod
    def from_environment(cls, strategy: StrategyName) -> Cluster:
        """Reads and checks the environment variable TF_CONFIG.

        Args:
          strategy: ``multi_worker`` or ``parameter_server``, which need different tasks.

        Returns:
          A cluster that fits the strategy.

        Raises:
          ClusterError: it is missing, malformed, or not a cluster for this strategy.
        """
        text = os.environ.get("TF_CONFIG", "")
        if not text:
            raise ClusterError(
                f"--strategy={strategy} needs the environment variable TF_CONFIG in every process. Received: none. "
                f"For example: TF_CONFIG='{_EXAMPLE}'"
            )
        try:
            content = json.loads(text)
            tasks = {str(name): [str(address) for address in list(found)] for name, found in content["cluster"].items()}
            task_type, task_index = str(content["task"]["type"]), int(content["task"]["index"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClusterError(
                f"TF_CONFIG must be JSON with cluster, task.type and task.index. Received: {text!r}. "
                f"For example: {_EXAMPLE}"
            ) from error
        cluster = cls(tasks, task_type, task_index)
        cluster._check(strategy)
        return cluster

    def _check(self, strategy: StrategyName) -> None:
        allowed = _TASKS[strategy]
        unknown = sorted({self.task_type, *self.tasks} - set(allowed))
        if unknown:
            raise ClusterError(
                f"--strategy={strategy} has no tasks of this type. Received: {', '.join(unknown)}. "
                f"Allowed: {', '.join(allowed)}"
            )
        if not 0 <= self.task_index < len(self.tasks.get(self.task_type, [])):
            raise ClusterError(
                f"TF_CONFIG's task must be one of its cluster. Received: {self.task_type} {self.task_index} of a "
                f"cluster with {self.counts}. Count task.index from 0"
            )
        if strategy == "multi_worker" and self.num_workers < 2:
            raise ClusterError(
                "--strategy=multi_worker needs two workers or more. Received: 1. Use --strategy=none, or mirrored for "
                "several GPUs of one machine"
            )
        missing = [name for name in allowed if strategy == "parameter_server" and not self.tasks.get(name)]
        if missing or len(self.tasks.get("chief", [])) > 1:
            raise ClusterError(
                f"--strategy={strategy} needs {_needed(strategy)}. Received: {self.counts}. "
                f"Add to TF_CONFIG's cluster: {', '.join(missing) or 'nothing; leave one chief'}"
            )

    @property
    def counts(self) -> str:
        """Numbers of tasks of each type, in words."""
        return ", ".join(f"{len(addresses)} {name}" for name, addresses in self.tasks.items())

    @property
    def num_workers(self) -> int:
        """Number of processes that train, a chief among them."""
        return len(self.tasks.get("chief", [])) + len(self.tasks.get("worker", []))

    @property
    def resolver(self) -> tf.distribute.cluster_resolver.ClusterResolver:
        """The cluster in the form that strategies take."""
        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(self.tasks), task_type=self.task_type, task_id=self.task_index, rpc_layer="grpc"
        )


def _needed(strategy: StrategyName) -> str:
    return "one chief, and a worker and a ps or more" if strategy == "parameter_server" else "at most one chief"


def create_strategy(name: StrategyName) -> tf.distribute.Strategy | None:
    """Creates a strategy, before anything else of TensorFlow is used.

    Waits for the other processes of the cluster, for as long as it takes.

    Args:
      name: of the strategy.

    Returns:
      None for ``none``.

    Raises:
      ClusterError: TF_CONFIG does not fit.
    """
    if name == "none":
        return None
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    cluster = Cluster.from_environment(name)
    console.print(f"{name}: waiting for the processes of the cluster: {cluster.counts}", soft_wrap=True)
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy(cluster.resolver, _COMMUNICATION)
    return tf.distribute.ParameterServerStrategy(cluster.resolver)


# On CPUs; with GPUs TensorFlow turns to NCCL by itself.
_COMMUNICATION = tf.distribute.experimental.CommunicationOptions(
    implementation=tf.distribute.experimental.CommunicationImplementation.AUTO
)


def is_server(name: StrategyName) -> bool:
    """Returns True where this process only serves a chief: as ``worker`` or ``ps`` of strategy ``name``."""
    return name == "parameter_server" and Cluster.from_environment(name).task_type != "chief"


def serve(name: StrategyName, is_over: Callable[[], bool]) -> None:
    """Serves the chief until the run is over; a chief that comes back finds it there.

    Args:
      name: of the strategy.
      is_over: asked every 2 seconds.
    """
    cluster = Cluster.from_environment(name)
    server = tf.distribute.Server(
        tf.train.ClusterSpec(cluster.tasks),
        job_name=cluster.task_type,
        task_index=cluster.task_index,
        protocol="grpc",
    )
    threading.Thread(target=server.join, daemon=True).start()
    console.print(f"{cluster.task_type} {cluster.task_index} serves the chief until the run is complete")
    while not is_over():
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def is_chief(strategy: tf.distribute.Strategy | None) -> bool:
    """Returns True where this process writes what is written once.

    Args:
      strategy: with several workers, the first one is the chief if none is declared; without, every process is.
    """
    if not is_multi_worker(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().jobs:
        return resolver.task_type == "chief"
    return resolver.task_id == 0


def is_multi_worker(strategy: tf.distribute.Strategy | None) -> TypeGuard[tf.distribute.Strategy]:
    """Returns True for a ``strategy`` of several processes in lockstep."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def is_parameter_server(strategy: tf.distribute.Strategy | None) -> TypeGuard[tf.distribute.Strategy]:
    """Returns True for a ``strategy`` whose workers compute steps of their own, whenever they are done."""
    return isinstance(strategy, tf.distribute.ParameterServerStrategy)


def at_epoch_ends(callback: tf.keras.callbacks.Callback) -> tf.keras.callbacks.Callback:
    """Returns ``callback`` without its calls at batches: a chief that schedules steps does not know which are done."""
    return _AtEpochEnds(callback)


class _AtEpochEnds(tf.keras.callbacks.Callback):
    def __init__(self, callback: tf.keras.callbacks.Callback):
        super().__init__()
        self._callback = callback
        for name in ("set_params", "set_model", "on_epoch_begin", "on_epoch_end", "on_train_begin", "on_train_end"):
            setattr(self, name, getattr(callback, name))


def scope(strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which all that has variables is made; an empty one where ``strategy`` is None."""
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def distributed(
    strategy: tf.distribute.Strategy | None, batches: Callable[[Shard, int], tf.data.Dataset]
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Gives each replica its part of every global batch.

    Every process reads all records, and parses those of its part alone. A parameter server's workers take whole batches
    in turn, each in its own time: over an epoch a slow one leaves rows to the next, and a fast one is ahead.

    Args:
      strategy: None for one process with all rows.
      batches: (shard, joined) -> the shard's slices of the batches, ``joined`` of which are put together beforehand.

    Returns:
      What ``model.fit`` takes under the strategy.
    """
    if strategy is None:
        return batches(Shard(0, 1), 1)
    if is_parameter_server(strategy):
        return tf.keras.utils.experimental.DatasetCreator(lambda context: _of_asynchronous_worker(batches))

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        shard = Shard(context.input_pipeline_id, context.num_input_pipelines)
        own = _among_replicas(batches(shard, 1), context.num_replicas_in_sync // context.num_input_pipelines)
        # Keras counts the steps, and never asks beyond the last one. A dataset of known length would make the
        # processes ask each other before each step whether any of them has rows left.
        return own.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    return strategy.distribute_datasets_from_function(of_worker)


def _of_asynchronous_worker(batches: Callable[[Shard, int], tf.data.Dataset]) -> tf.data.Dataset:
    index = tf.distribute.coordinator.experimental_get_current_worker_index()
    num_workers = len(Cluster.from_environment("parameter_server").tasks["worker"])
    return batches(Shard(tf.cast(index, tf.int64), num_workers), num_workers).repeat()


def _among_replicas(batches: tf.data.Dataset, num_replicas: int) -> tf.data.Dataset:
    """Cuts every batch into a slice per replica, which take turns."""
    if num_replicas == 1:
        return batches

    def slices(*batch: Any) -> tf.data.Dataset:
        num_rows = tf.cast(tf.shape(batch[1])[0], tf.int64)

        def of_replica(index: tf.Tensor) -> Any:
            start, stop = (place * num_rows // num_replicas for place in (index, index + 1))
            return tf.nest.map_structure(lambda values: values[start:stop], batch)

        return tf.data.Dataset.range(num_replicas).map(of_replica)

    return batches.flat_map(slices)


def chiefs_value(strategy: tf.distribute.Strategy | None, value: float | None) -> float | None:
    """Sends the chief's value to every process; all must call it.

    Args:
      strategy: with several workers, or the value is returned as it is.
      value: that of a process which is not the chief is ignored. None is sent as NaN, and is None again there.

    Returns:
      The chief's value.
    """
    if not is_multi_worker(strategy):
        return value
    sent = float("nan") if value is None else value

    def from_first(context: tf.distribute.ValueContext) -> tf.Tensor:
        return tf.constant(0.0 if context.replica_id_in_sync_group else sent, tf.float64)

    values = strategy.experimental_distribute_values_from_function(from_first)
    number = float(strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None))
    return None if math.isnan(number) else number


def wait_for_all(strategy: tf.distribute.Strategy | None) -> None:
    """Returns when every process of ``strategy`` has called it."""
    chiefs_value(strategy, 0.0)


def in_turn(strategy: tf.distribute.Strategy | None, step: Callable[[], _T]) -> _T:
    """Takes a step in every process: first in the chief, which may write what the others then find.

    Args:
      strategy: with several workers, or the step is simply taken.
      step: must not wait for other processes.

    Returns:
      What the step returned in this process.
    """
    if not is_chief(strategy):
        wait_for_all(strategy)
        return step()
    result = step()
    wait_for_all(strategy)
    return result


@contextlib.contextmanager
def explaining_lost_workers(strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """Turns TensorFlow's many words for a process that is gone into one error that says what to do.

    Args:
      strategy: nothing is changed without other processes.

    Yields:
      Nothing; the block runs under it.

    Raises:
      WorkerLostError: another process ended, or cannot be reached.
    """
    if not (is_multi_worker(strategy) or is_parameter_server(strategy)):
        yield
        return
    try:
        yield
    except _LOST as error:
        raise WorkerLostError(
            f"another process of the cluster has ended, or cannot be reached. Received: {_reason(error)}. "
            f"{_promise(strategy)}"
        ) from error


_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError, tf.errors.CancelledError)


def _promise(strategy: tf.distribute.Strategy) -> str:
    if is_multi_worker(strategy):
        return "multi_worker needs all of them: start all workers again, and the run goes on at its newest checkpoint"
    return (
        "parameter_server goes on without a worker, but not without a ps: start the ps and the chief again, and the "
        "run goes on at its newest checkpoint"
    )


def _reason(error: tf.errors.OpError) -> str:
    """The line of TensorFlow's message that is one: the first speaks of the graph only."""
    lines = [line for line in error.message.strip().split("\n") if line]
    return next((line for line in lines if "abort" in line or "peer" in line), lines[0])
