"""The settings of a run's optimizer: rules of tables and of the rest, schedule, clipping."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clsd_tf.spec.validation import StrictModel

TableRuleName = Literal["lazy_adam", "adagrad", "rowwise_adagrad", "ftrl", "adam"]

_ADAMW_DECAY = 0.01
# Of rules that divide by the root of summed squares. Keras starts them at .1: far above what they
# reach where losses are means over a batch and the gradient of a row is some .0001; rows would hardly move.
_INITIAL_ACCUMULATOR = 1e-8
_SUMMING_RATE = 0.02
_Positive = Annotated[float, pydantic.Field(gt=0)]
_NotNegative = Annotated[float, pydantic.Field(ge=0)]


class TableOptimizerConfig(StrictModel):
    """Settings of the embedding tables' optimizer.

    Attributes:
      kind: the rule, see ``clsd_tf.optimizers.table_rules``: ``adagrad``, ``rowwise_adagrad`` (one number per row),
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
                f"l1 and l2 are for kind ftrl. Received: kind={self.kind}. Choose it, or take embeddings.l2 of the run"
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
        """``initial_accumulator``, or what it is by default."""
        return _INITIAL_ACCUMULATOR if self.initial_accumulator is None else self.initial_accumulator

    def resolved_learning_rate(self, of_run: float) -> float:
        """Returns ``learning_rate``, or what it is by default in a run whose own is ``of_run``."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _SUMMING_RATE if self._sums_squares else of_run


class DenseOptimizerConfig(StrictModel):
    """Settings of the optimizer of everything but the tables.

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
    """The optimizer of a run's backbone; ``learning_rate`` stands in the run's own settings.

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
