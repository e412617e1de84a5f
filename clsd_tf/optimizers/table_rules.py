"""Update rules for rows of embedding tables: pure functions of the rows that a batch touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from clsd_tf.optimizers.config import TableOptimizerConfig

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7  # Of Adam, lazy or not.


@dataclasses.dataclass(frozen=True)
class TableRule:
    """An update of a table's rows, as a pure function of the rows that a batch touched.

    Attributes:
      slots: name of each slot -> its value before the first step.
      update: (rows, slots, gradient, learning_rate, step) -> (rows, slots): rows and gradient float32
        [num_touched, embedding_dim], slots likewise, or [num_touched] of a row-wise rule; step the number of this step,
        from 1.
      is_rowwise: whether a slot has one number per row.
      slots_of: (rows, slots, learning_rate) -> slots from which ``update`` goes on where rows were set from elsewhere;
        None where any slots do.
    """

    slots: dict[str, float]
    update: Callable[..., tuple[tf.Tensor, Sequence[tf.Tensor]]]
    is_rowwise: bool = False
    slots_of: Callable[..., Sequence[tf.Tensor]] | None = None


def lazy_adam(rows, slots, gradient, learning_rate, step):
    """Adam of the touched rows: m = .9 m + .1 g, v = .999 v + .001 g^2,
    rows - learning_rate * sqrt(1 - .999^step) / (1 - .9^step) * m / (sqrt(v) + 1e-7).

    Rows that the batch does not touch keep m and v, and do not move; in Adam they decay, and the row moves on.
    Source: Kingma and Ba (2015), "Adam: A Method for Stochastic Optimization", section 2, before its last paragraph.

    Args:
      rows: touched rows, float32 [num_touched, embedding_dim].
      slots: (m, v), shaped like ``rows``.
      gradient: g, summed over the occurrences of each row; shaped like ``rows``.
      learning_rate: scalar.
      step: number of this step, from 1, float32; all steps count, not those of the row.

    Returns:
      (new rows, new slots).
    """
    m, v = slots
    m = BETA_1 * m + (1.0 - BETA_1) * gradient
    v = BETA_2 * v + (1.0 - BETA_2) * tf.square(gradient)
    rate = learning_rate * tf.sqrt(1.0 - tf.pow(BETA_2, step)) / (1.0 - tf.pow(BETA_1, step))
    return rows - rate * m / (tf.sqrt(v) + EPSILON), (m, v)


def adagrad(rows, slots, gradient, learning_rate, step):
    """a = a + g^2, rows - learning_rate * g / sqrt(a); a starts at ``initial_accumulator``.

    Source: Duchi et al. (2011), "Adaptive Subgradient Methods", section 1.1.

    Args:
      rows: touched rows, float32 [num_touched, embedding_dim].
      slots: (a,), shaped like ``rows``.
      gradient: g, shaped like ``rows``.
      learning_rate: scalar.
      step: not read.

    Returns:
      (new rows, new slots).
    """
    accumulator = slots[0] + tf.square(gradient)
    return rows - learning_rate * gradient * tf.math.rsqrt(accumulator), (accumulator,)


def rowwise_adagrad(rows, slots, gradient, learning_rate, step):
    """a = a + mean over the row of g^2, rows - learning_rate * g / sqrt(a); a starts at ``initial_accumulator``.

    One number per row: the least memory of these rules.
    Source: Gupta et al. (2014), "Training Highly Multiclass Classifiers", section 5.

    Args:
      rows: touched rows, float32 [num_touched, embedding_dim].
      slots: (a,), [num_touched].
      gradient: g, shaped like ``rows``.
      learning_rate: scalar.
      step: not read.

    Returns:
      (new rows, new slots).
    """
    accumulator = slots[0] + tf.reduce_mean(tf.square(gradient), axis=1)
    rate = learning_rate * tf.math.rsqrt(accumulator)
    return rows - rate[:, tf.newaxis] * gradient, (accumulator,)


def ftrl(rows, slots, gradient, learning_rate, step, *, l1: float, l2: float):
    """n' = n + g^2, z' = z + g - (sqrt(n') - sqrt(n)) / learning_rate * rows,
    (clip(z', -l1, l1) - z') / (sqrt(n') / learning_rate + 2 l2); n starts at ``initial_accumulator``, z where it
    gives the initial rows.

    Source: McMahan et al. (2013), "Ad Click Prediction: a View from the Trenches", algorithm 1, there with rows that
    start at 0, n that starts at 0, a constant beta beside sqrt(n'), and l2 for 2 l2.

    Args:
      rows: touched rows, float32 [num_touched, embedding_dim].
      slots: (n, z), shaped like ``rows``.
      gradient: g, shaped like ``rows``.
      learning_rate: scalar, the same in all steps.
      step: not read.
      l1: >= 0.
      l2: >= 0.

    Returns:
      (new rows, new slots).
    """
    accumulator, linear = slots
    new_accumulator = accumulator + tf.square(gradient)
    root = tf.sqrt(new_accumulator)
    linear = linear + gradient - (root - tf.sqrt(accumulator)) / learning_rate * rows
    rows = (tf.clip_by_value(linear, -l1, l1) - linear) / (root / learning_rate + 2.0 * l2)
    return rows, (new_accumulator, linear)


def ftrl_slots(rows, slots, learning_rate, *, l1: float, l2: float):
    """n and the z with which ``ftrl`` gives ``rows`` for a gradient of 0:
    z = -rows * (sqrt(n) / learning_rate + 2 l2) - l1 * sign(rows), or z held within [-l1, l1] where rows are 0.

    Args:
      rows: as they were set, float32 [num_rows, embedding_dim].
      slots: (n, z) as they are, shaped like ``rows``.
      learning_rate: scalar.
      l1: >= 0.
      l2: >= 0.

    Returns:
      (n, z).
    """
    accumulator, linear = slots
    agreeing = -rows * (tf.sqrt(accumulator) / learning_rate + 2.0 * l2) - l1 * tf.sign(rows)
    return accumulator, tf.where(tf.equal(rows, 0.0), tf.clip_by_value(linear, -l1, l1), agreeing)


def table_rule(config: TableOptimizerConfig) -> TableRule | None:
    """Returns the rule that ``config`` names; None for ``adam``, which is that of the dense part."""
    if config.kind == "adam":
        return None
    if config.kind == "lazy_adam":
        return TableRule({"m": 0.0, "v": 0.0}, lazy_adam)
    slots = {"accumulator": config.resolved_initial_accumulator}
    if config.kind == "adagrad":
        return TableRule(slots, adagrad)
    if config.kind == "rowwise_adagrad":
        return TableRule(slots, rowwise_adagrad, is_rowwise=True)

    def update(*arguments):
        return ftrl(*arguments, l1=config.l1, l2=config.l2)

    def slots_of(*arguments):
        return ftrl_slots(*arguments, l1=config.l1, l2=config.l2)

    return TableRule({**slots, "linear": 0.0}, update, slots_of=slots_of)
