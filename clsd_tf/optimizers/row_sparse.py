"""The optimizer of a CTR model: row-sparse rules for embedding tables, Adam or AdamW for everything else.

A batch looks up a small part of a table. Keras' Adam still moves every row in every step, so that a step takes as long
as the table is large. Here a step reads and writes the rows that the batch looked up, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from clsd_tf.layers.embeddings import FieldEmbeddings
from clsd_tf.optimizers.config import OptimizerConfig
from clsd_tf.optimizers.table_rules import BETA_1, BETA_2, EPSILON, TableRule, table_rule


class WarmupSchedule(tf.keras.optimizers.schedules.LearningRateSchedule):
    """learning_rate * min(1, (step + 1) / lr_warmup_steps) * decay(step).

    decay is 1, or with progress = (step - lr_warmup_steps) / (lr_decay_steps - lr_warmup_steps), held within [0, 1]:
    1 - progress (``linear``), (1 + cos(pi * progress)) / 2 (``cosine``).

    Args:
      learning_rate: the highest one.
      config: shape and steps.
    """

    def __init__(self, learning_rate: float, config: OptimizerConfig):
        self._learning_rate = learning_rate
        self._config = config

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        config, step = self._config, tf.cast(step, tf.float32)
        rate = tf.constant(self._learning_rate, tf.float32)
        if config.lr_warmup_steps:
            rate *= tf.minimum(1.0, (step + 1.0) / config.lr_warmup_steps)
        if config.lr_decay_steps is None:  # Schedule constant.
            return rate
        num_steps = config.lr_decay_steps - config.lr_warmup_steps
        progress = tf.clip_by_value((step - config.lr_warmup_steps) / num_steps, 0.0, 1.0)
        return rate * (1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + tf.cos(math.pi * progress)))

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self._learning_rate, "config": self._config.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WarmupSchedule:
        return cls(config["learning_rate"], OptimizerConfig.model_validate(config["config"]))


def embedding_tables(model: tf.keras.Model) -> list[tf.Variable]:
    """Returns the tables of a built ``model``: those of ``FieldEmbeddings`` and of Keras' own embedding layers."""
    layers = model.submodules
    tables = [layer.tables for layer in layers if isinstance(layer, FieldEmbeddings) and layer.has_tables]
    return tables + [layer.embeddings for layer in layers if isinstance(layer, tf.keras.layers.Embedding)]


class RowSparseOptimizer(tf.keras.optimizers.Adam):
    """A table rule for tables, Adam or AdamW for all other variables; one counter of steps, one norm for clipping.

    Gradients of rows that occur several times in a batch are summed first: a rule sees each row once. A table whose
    gradient is dense (as full-table L2 makes it) is updated as a whole, by the same rule.

    Args:
      tables: variables that the rule is for, and that never decay. The optimizer is built with them and all others.
      rule: how rows move; None leaves tables to Adam, which moves all their rows in every step.
      learning_rate: of the dense part; a number or a schedule.
      table_learning_rate_ratio: learning rate of tables / learning_rate, in every step.
      weight_decay: of the dense part; None for Adam.
      global_clip_norm: gradients are multiplied by min(1, global_clip_norm / norm over all of them), with each row's
        summed gradient counted once.
    """

    def __init__(
        self,
        tables: Sequence[tf.Variable],
        rule: TableRule | None,
        *,
        learning_rate: float | tf.keras.optimizers.schedules.LearningRateSchedule = 1e-3,
        table_learning_rate_ratio: float = 1.0,
        weight_decay: float | None = None,
        global_clip_norm: float | None = None,
        name: str = "RowSparseOptimizer",
    ):
        super().__init__(
            learning_rate,
            beta_1=BETA_1,
            beta_2=BETA_2,
            epsilon=EPSILON,
            weight_decay=weight_decay,
            global_clipnorm=global_clip_norm,
            jit_compile=False,
            name=name,
        )
        self._table_keys = [self._var_key(table) for table in tables]
        self._rule = rule
        self._table_learning_rate_ratio = table_learning_rate_ratio
        self._table_slots: list[list[tf.Variable]] = []

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        """Creates all slots; tables get those of their rule instead of Adam's."""
        if getattr(self, "_built", False):
            return
        super().build([variable for variable in var_list if self._rule_of(variable) is None])
        tables: list[tf.Variable] = []
        for variable in var_list:
            if (rule := self._rule_of(variable)) is not None:
                self._index_dict[self._var_key(variable)] = len(tables)
                self._table_slots.append(self._add_slots(variable, rule))
                tables.append(variable)
        self.adjust_slots(tables)

    def _is_table(self, variable: tf.Variable) -> bool:
        return self._var_key(variable) in self._table_keys

    def _rule_of(self, variable: tf.Variable) -> TableRule | None:
        return self._rule if self._is_table(variable) else None

    def _add_slots(self, table: tf.Variable, rule: TableRule) -> list[tf.Variable]:
        shape = table.shape[:1] if rule.is_rowwise else table.shape
        return [
            self.add_variable_from_reference(table, name, shape, initial_value=tf.fill(shape, value))
            for name, value in rule.slots.items()
        ]

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        rule = self._rule_of(variable)
        if rule is None:
            super().update_step(gradient, variable)
            return
        slots, rate = self._slots_of(variable), self._table_learning_rate
        step = tf.cast(self.iterations + 1, tf.float32)
        moved = (variable, *slots)
        if not isinstance(gradient, tf.IndexedSlices):
            rows, *before = (tf.convert_to_tensor(values) for values in moved)
            after, slots_after = rule.update(rows, before, gradient, rate, step)
            for values, new in zip(moved, (after, *slots_after), strict=True):
                values.assign(new)
            return
        rows, *before = (tf.gather(values, gradient.indices) for values in moved)
        after, slots_after = rule.update(rows, before, gradient.values, rate, step)
        # Not scatter_sub: it takes several times as long as reading rows and putting others in their place.
        for values, new in zip(moved, (after, *slots_after), strict=True):
            values.scatter_update(tf.IndexedSlices(new, gradient.indices))

    def adjust_slots(self, tables: Sequence[tf.Variable]) -> None:
        """Makes slots agree with ``tables`` that were set from elsewhere, where the rule needs it."""
        if self._rule is None or self._rule.slots_of is None:
            return
        self._compute_current_learning_rate()  # Of the step to come: Keras' is that of the last one.
        for table in tables:
            slots = self._slots_of(table)
            before = [tf.convert_to_tensor(slot) for slot in slots]
            after = self._rule.slots_of(tf.convert_to_tensor(table), before, self._table_learning_rate)
            for slot, values in zip(slots, after, strict=True):
                slot.assign(values)

    def _slots_of(self, table: tf.Variable) -> list[tf.Variable]:
        return self._table_slots[self._index_dict[self._var_key(table)]]

    @property
    def _table_learning_rate(self) -> tf.Tensor:
        return tf.cast(self.learning_rate, tf.float32) * self._table_learning_rate_ratio

    def _clip_gradients(self, gradients):
        # Keras clips before it sums the gradients of a row: its norm would not be that of the gradient.
        return super()._clip_gradients(super()._deduplicate_sparse_grad(gradients))

    def _deduplicate_sparse_grad(self, gradients):
        return gradients

    def _use_weight_decay(self, variable: tf.Variable) -> bool:
        return not self._is_table(variable) and super()._use_weight_decay(variable)


def build_optimizer(
    config: OptimizerConfig, learning_rate: float, model: tf.keras.Model
) -> tf.keras.optimizers.Optimizer:
    """Creates the optimizer of a built model.

    Args:
      config: rules, schedule and clipping.
      learning_rate: of the dense part, and of tables as ``TableOptimizerConfig`` says.
      model: a backbone with all its variables.

    Returns:
      An optimizer that is not built yet: building it creates its slots.
    """
    schedule = WarmupSchedule(learning_rate, config)
    rate = schedule if config.schedule != "constant" or config.lr_warmup_steps else learning_rate
    return RowSparseOptimizer(
        embedding_tables(model),
        table_rule(config.embeddings),
        learning_rate=rate,
        table_learning_rate_ratio=config.embeddings.resolved_learning_rate(learning_rate) / learning_rate,
        weight_decay=config.dense.resolved_weight_decay,
        global_clip_norm=config.global_clip_norm,
    )
