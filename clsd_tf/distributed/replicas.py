"""Sums over the replicas that share a global batch; without a distribution strategy there is one, and nothing to do."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# Variables that every replica assigns the same value: each keeps its own copy, and reading needs no communication.
SAME_EVERYWHERE = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA,
}
# Variables to which every replica adds its part: the parts are summed when the variable is read.
SUMMED_WHEN_READ = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}


def num_replicas() -> int:
    """Returns the number of replicas in lockstep: 1 without a strategy, and under a parameter server."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def sum_over_replicas(structure: Any) -> Any:
    """Sums all tensors of a structure over the replicas, in one collective: each costs a round trip.

    Args:
      structure: float32 tensors of static shapes in dicts, lists or tuples, or a single one.

    Returns:
      The same structure; the same tensors where there is one replica.
    """
    if num_replicas() == 1:
        return structure
    tensors = tf.nest.flatten(structure)
    packed = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, packed)
    parts = tf.split(total, [tensor.shape.num_elements() for tensor in tensors])
    sums = [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    return tf.nest.pack_sequence_as(structure, sums)


def in_own_row(values: tf.Tensor) -> tf.Tensor:
    """Puts values into the row of this replica, with 0 elsewhere: summed over replicas, it holds the values of each.

    Args:
      values: float32 [...], of static rank.

    Returns:
      [num_replicas, ...].
    """
    if num_replicas() == 1:
        return values[tf.newaxis]
    own = tf.distribute.get_replica_context().replica_id_in_sync_group
    is_own = tf.reshape(tf.equal(tf.range(num_replicas()), own), [-1, *[1] * values.shape.rank])
    return tf.where(is_own, values[tf.newaxis], 0.0)  # Not a product: values may be infinite.


class AgreedFlags:
    """Flags that any process raises, known to all of them after the same step: in lockstep they must act together.

    Not part of checkpoints: a run that was stopped would stop again.

    Args:
      num_kinds: number of flags.
    """

    def __init__(self, num_kinds: int):
        self.are_shared = tf.distribute.get_strategy().num_replicas_in_sync > 1
        if self.are_shared:
            self._own, self._of_all = (
                tf.Variable(tf.zeros([num_kinds]), trainable=False, name=name, **SAME_EVERYWHERE)
                for name in ("own_requests", "requests_of_all")
            )

    def exchanged_with(self, structure: Any) -> Any:
        """Sums a structure over the replicas, and their flags on the way: once in each training step.

        Args:
          structure: as ``sum_over_replicas`` takes it.

        Returns:
          The structure of sums.
        """
        if not self.are_shared:
            return structure
        structure, of_all = sum_over_replicas((structure, tf.identity(self._own)))
        self._of_all.assign(of_all)
        return structure

    def granted(self, *asked: bool) -> tuple[bool, ...]:
        """Raises flags, and learns which of them hold now.

        Args:
          *asked: whether this process raises each of the ``num_kinds`` flags.

        Returns:
          ``asked`` itself in a single process; in several, what any of them raised one step ago.
        """
        if not self.are_shared:
            return asked
        granted = tuple(self._of_all.numpy() > 0)
        # What is granted now was asked for once, and must not be done again in the next step.
        self._own.assign(tf.cast([wish and not any(granted) for wish in asked], tf.float32))
        return granted
