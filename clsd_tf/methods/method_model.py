"""The model that every method trains: it measures its input, can be saved and stopped, and names its parts."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from clsd_tf.distributed.replicas import AgreedFlags
from clsd_tf.distributed.strategies import at_epoch_ends, is_parameter_server
from clsd_tf.methods.input_wait import InputWait
from clsd_tf.methods.method import MethodConfig

RowRanges = Mapping[str, range]


class MethodModel(tfrs.Model):
    """A Keras model with what training, checkpoints and export ask of any method's.

    A method's ``train_step`` passes what it sums over replicas through ``requests.exchanged_with`` once, so that
    several processes save and stop after the same step.
    """

    config: MethodConfig
    train_function: Callable | None

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.requests = AgreedFlags(2)  # To save, and to stop: callbacks ask.
        self._input_wait = InputWait()

    @property
    def first_competing_step(self) -> int:
        """The optimizer step before which, as in loss warm-up, epochs do not compete for the best weights."""
        return 0

    @property
    @abc.abstractmethod
    def parts(self) -> dict[str, tf.Module]:
        """Parts that are kept of the best epoch and served, by name; the model's optimizer trains ``backbone``."""

    @property
    @abc.abstractmethod
    def training_state(self) -> dict[str, Sequence[tf.Variable]]:
        """State that training resumes from, by part: weights, slots and step counts of optimizers, moving means."""

    @property
    def epoch_variables(self) -> list[tf.Variable]:
        """Variables that start anew in each epoch: the state of the metrics."""
        return [variable for metric in self.metrics for variable in metric.variables]

    @property
    def row_ranges(self) -> Iterator[RowRanges]:
        """Vocabulary -> its rows, of each variable that holds the tables of several."""
        for part in self.parts.values():
            yield from (module.row_ranges for module in part.submodules if hasattr(module, "row_ranges"))
            if hasattr(part, "row_ranges"):
                yield part.row_ranges

    def build_optimizers(self) -> None:
        """Makes the slots of all optimizers: a checkpoint can only be restored into slots that exist."""
        self.optimizer.build(self.parts["backbone"].trainable_variables)

    def begin_after(self, earlier: MethodModel, last_epoch: Mapping[str, Any]) -> None:
        """Sets what an earlier run of the same method has not kept, for a warm start.

        Args:
          earlier: the model of the run before, with the state of its last step.
          last_epoch: its last entry in the history.
        """

    def fit(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> tf.keras.callbacks.History:
        """As ``tf.keras.Model.fit``."""
        given = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
        if is_parameter_server(self.distribute_strategy):
            given = [at_epoch_ends(callback) for callback in given]
        return super().fit(*args, callbacks=list(given), **kwargs)

    @property
    def input_wait_seconds(self) -> float | None:
        """Seconds that training steps have waited for input here; None where a coordinator hands steps to workers."""
        return None if self._cluster_coordinator else self._input_wait.seconds

    def make_train_function(self, force: bool = False) -> Callable:
        """As ``tf.keras.Model.make_train_function``; the steps measure ``input_wait_seconds``."""
        if self.train_function is not None and not force:
            return self.train_function
        function = super().make_train_function(force)
        if self._cluster_coordinator:
            return function

        def train_function(iterator):
            return function(self._input_wait.timed(iterator))

        self.train_function = train_function
        if not self.run_eagerly:
            self.train_function = tf.function(train_function, reduce_retracing=True, autograph=False)
        return self.train_function
