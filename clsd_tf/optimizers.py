"""The optimizer of a CTR model: row-sparse rules for embedding tables, Adam or AdamW for everything else.

A batch looks up a small part of a table. Keras' Adam still moves every row in every step, so that a step takes as long
as the table is large. Here a step reads and writes the rows that the batch looked up, and no others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import pydantic
import tensorflow as tf

from clsd_tf.embeddings import FieldEmbeddings
from clsd_tf.validation import StrictModel

TableRuleName = Literal["lazy_adam", "adagrad", "rowwise_adagrad", "ftrl", "adam"]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7
_ADAMW_DECAY = 0.01
# Of rules that divide by the root of summed squares. Keras starts them at .1, which suits losses that are sums: the
# gradient of a row in a mean over a batch is some .0001, and rows would hardly move.
_INITIAL_ACCUMULATOR = 1e-8
_SUMMING_RATE = 0.02
_Positive = Annotated[float, pydantic.Field(gt=0)]
_NotNegative = Annotated[float, pydantic.Field(ge=0)]


class TableOptimizerConfig(StrictModel):
    """How embedding tables learn.

    Attributes:
      kind: the rule, see the functions of this module: ``adagrad``, ``rowwise_adagrad`` (one number per row),
        ``lazy_adam``, ``ftrl`` (with schedule constant); or ``adam``, the one that moves every row in every step, to
        compare with.
      learning_rate: null takes that of the run for ``lazy_adam``, and .02 for rules that sum squares: their steps
        become shorter by themselves.
      initial_accumulator: of rules that sum squares, where the sums start; by default 1e-8.
      l1: of ``ftrl``: rows whose gradients stay small become exactly 0.
      l2: of ``ftrl``.
    """

    kind: TableRuleName = "adagrad"
    learning_rate: _Positive | None = None
    initial_accumulator: _Positive | None = None
    l1: _NotNegative = 0.0
    l2: _NotNegative = 0.0

    @pydantic.model_validator(mode="after")
    def _check(self) -> TableOptimizerConfig:
        if self.kind != "ftrl" and (self.l1 or self.l2):
            raise ValueError(
                f"l1 and l2 are for kind ftrl. Received: kind={self.kind}. Choose it, or take embedding_l2 of the run"
            )
        if not self._sums_squares and self.initial_accumulator is not None:
            raise ValueError(
                "initial_accumulator is for kinds adagrad, rowwise_adagrad and ftrl. "
                f"Received: kind={self.kind}. Choose one of them, or leave it out"
            )
        if self.kind == "adam" and self.learning_rate is not None:
            raise ValueError(
                "kind adam moves tables with everything else, at the learning rate of the run. "
                f"Received: learning_rate={self.learning_rate:g}. Leave it out, or choose lazy_adam"
            )
        return self

    @property
    def _sums_squares(self) -> bool:
        return self.kind in ("adagrad", "rowwise_adagrad", "ftrl")

    @property
    def resolved_initial_accumulator(self) -> float:
        return _INITIAL_ACCUMULATOR if self.initial_accumulator is None else self.initial_accumulator

    def resolved_learning_rate(self, of_run: float) -> float:
        """``learning_rate``, or what it is by default in a run whose own is ``of_run``."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _SUMMING_RATE if self._sums_squares else of_run


class DenseOptimizerConfig(StrictModel):
    """How everything but the tables learns.

    Attributes:
      kind: ``adam``, or ``adamw`` with decoupled weight decay.
      weight_decay: of ``adamw``, by default .01: each step takes learning_rate * weight_decay of a variable away.
    """

    kind: Literal["adam", "adamw"] = "adam"
    weight_decay: _NotNegative | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> DenseOptimizerConfig:
        if self.kind != "adamw" and self.weight_decay is not None:
            raise ValueError(
                f"weight_decay is for kind adamw. Received: kind={self.kind}. Choose it, or leave weight_decay out"
            )
        return self

    @property
    def resolved_weight_decay(self) -> float | None:
        """``weight_decay``, or what it is by default; None where nothing decays."""
        if self.kind == "adam":
            return None
        return _ADAMW_DECAY if self.weight_decay is None else self.weight_decay


class OptimizerConfig(StrictModel):
    """The optimizer of a run's backbone; ``learning_rate`` stands in the run's own settings. AdGate has its own.

    Attributes:
      embeddings: the embedding tables.
      dense: everything else.
      schedule: of both learning rates after their warm-up: ``constant``, or falling to 0 at ``lr_decay_steps`` on a
        straight line (``linear``) or half a cosine (``cosine``).
      lr_warmup_steps: optimizer steps over which both learning rates rise on a straight line.
      lr_decay_steps: optimizer step at which the learning rates reach 0; needed unless ``constant``. A run that goes on
        from earlier ones goes on counting.
      global_clip_norm: gradients are scaled down together where the norm over all of them is larger; null: never.
    """

    embeddings: TableOptimizerConfig = TableOptimizerConfig()
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = pydantic.Field(0, ge=0)
    lr_decay_steps: int | None = pydantic.Field(None, ge=1)
    global_clip_norm: _Positive | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if (self.schedule == "constant") != (self.lr_decay_steps is None):
            raise ValueError(
                "lr_decay_steps goes with schedule linear or cosine. "
                f"Received: schedule={self.schedule}, lr_decay_steps={self.lr_decay_steps}. Give both or neither"
            )
        if self.lr_decay_steps is not None and self.lr_decay_steps <= self.lr_warmup_steps:
            raise ValueError(
                "lr_decay_steps must be greater than lr_warmup_steps. "
                f"Received: {self.lr_decay_steps} after {self.lr_warmup_steps}. Count both from step 0"
            )
        if self.embeddings.kind == "ftrl" and (self.schedule != "constant" or self.lr_warmup_steps):
            raise ValueError(
                "rows of kind ftrl are a function of the learning rate, which must stay the same. "
                f"Received: schedule={self.schedule}, lr_warmup_steps={self.lr_warmup_steps}. Allowed: constant, 0"
            )
        return self


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
        if config.schedule == "constant":
            return rate
        num_steps = config.lr_decay_steps - config.lr_warmup_steps
        progress = tf.clip_by_value((step - config.lr_warmup_steps) / num_steps, 0.0, 1.0)
        return rate * (1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + tf.cos(math.pi * progress)))

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self._learning_rate, "config": self._config.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WarmupSchedule:
        return cls(config["learning_rate"], OptimizerConfig.model_validate(config["config"]))


@dataclasses.dataclass(frozen=True)
class TableRule:
    """How rows of a table move, as a pure function of the rows that a batch touched.

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

    ``step`` counts all steps, not those of the row. Rows that the batch does not touch keep m and v, and do not move;
    in Adam they decay, and the row moves on.
    Source: Kingma and Ba (2015), "Adam: A Method for Stochastic Optimization", section 2, before its last paragraph.
    """
    m, v = slots
    m = _BETA_1 * m + (1.0 - _BETA_1) * gradient
    v = _BETA_2 * v + (1.0 - _BETA_2) * tf.square(gradient)
    rate = learning_rate * tf.sqrt(1.0 - tf.pow(_BETA_2, step)) / (1.0 - tf.pow(_BETA_1, step))
    return rows - rate * m / (tf.sqrt(v) + _EPSILON), (m, v)


def adagrad(rows, slots, gradient, learning_rate, step):
    """a = a + g^2, rows - learning_rate * g / sqrt(a); a starts at ``initial_accumulator``.

    Source: Duchi et al. (2011), "Adaptive Subgradient Methods", section 1.1.
    """
    accumulator = slots[0] + tf.square(gradient)
    return rows - learning_rate * gradient * tf.math.rsqrt(accumulator), (accumulator,)


def rowwise_adagrad(rows, slots, gradient, learning_rate, step):
    """a = a + mean over the row of g^2, rows - learning_rate * g / sqrt(a); a starts at ``initial_accumulator``.

    One number per row: the least memory of these rules.
    Source: Gupta et al. (2014), "Training Highly Multiclass Classifiers", section 5.
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
    """
    accumulator, linear = slots
    agreeing = -rows * (tf.sqrt(accumulator) / learning_rate + 2.0 * l2) - l1 * tf.sign(rows)
    return accumulator, tf.where(tf.equal(rows, 0.0), tf.clip_by_value(linear, -l1, l1), agreeing)


def table_rule(config: TableOptimizerConfig) -> TableRule | None:
    """The rule of a config; None for ``adam``, which is that of the dense part."""
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


def embedding_tables(model: tf.keras.Model) -> list[tf.Variable]:
    """The tables of a built model: those of ``FieldEmbeddings`` and of Keras' own embedding layers."""
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
            beta_1=_BETA_1,
            beta_2=_BETA_2,
            epsilon=_EPSILON,
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
        tables = [variable for variable in var_list if self._follows_rule(variable)]
        super().build([variable for variable in var_list if not self._follows_rule(variable)])
        for index, table in enumerate(tables):
            self._index_dict[self._var_key(table)] = index
            self._table_slots.append([self._add_slot(table, name, value) for name, value in self._rule.slots.items()])
        self.adjust_slots(tables)

    def _is_table(self, variable: tf.Variable) -> bool:
        return self._var_key(variable) in self._table_keys

    def _follows_rule(self, variable: tf.Variable) -> bool:
        return self._rule is not None and self._is_table(variable)

    def _add_slot(self, table: tf.Variable, name: str, value: float) -> tf.Variable:
        shape = table.shape[:1] if self._rule.is_rowwise else table.shape
        return self.add_variable_from_reference(table, name, shape, initial_value=tf.fill(shape, value))

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        if not self._follows_rule(variable):
            super().update_step(gradient, variable)
            return
        slots, rate = self._slots_of(variable), self._table_learning_rate
        step = tf.cast(self.iterations + 1, tf.float32)
        moved = (variable, *slots)
        if not isinstance(gradient, tf.IndexedSlices):
            rows, *before = (tf.convert_to_tensor(values) for values in moved)
            after, slots_after = self._rule.update(rows, before, gradient, rate, step)
            for values, new in zip(moved, (after, *slots_after), strict=True):
                values.assign(new)
            return
        rows, *before = (tf.gather(values, gradient.indices) for values in moved)
        after, slots_after = self._rule.update(rows, before, gradient.values, rate, step)
        # Not scatter_sub: it takes several times as long as reading rows and putting others in their place.
        for values, new in zip(moved, (after, *slots_after), strict=True):
            values.scatter_update(tf.IndexedSlices(new, gradient.indices))

    def adjust_slots(self, tables: Sequence[tf.Variable]) -> None:
        """Makes slots agree with tables that were set from elsewhere, where the rule needs it."""
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
    """The optimizer of a built model.

    Args:
      config: rules, schedule and clipping.
      learning_rate: of the dense part, and of tables as ``TableOptimizerConfig`` says.
      model: a backbone with all its variables.
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
