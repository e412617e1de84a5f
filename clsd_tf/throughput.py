"""How fast training goes, and how much of its time it waits for input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf


class InputWait:
    """Seconds that training steps have waited for their batch, measured around ``next(iterator)``."""

    def __init__(self):
        self.seconds = 0.0

    def timed(self, iterator: Iterator) -> Iterator:
        """The same batches; each adds the time that it took to come."""
        return _Timed(iterator, self)

    def add_since(self, start: np.ndarray) -> np.ndarray:
        self.seconds += time.monotonic() - float(start)
        return start


class _Timed:
    def __init__(self, iterator: Iterator, wait: InputWait):
        self._iterator = iterator
        self._wait = wait

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        # Python's clock, some 0.05 ms a step: TensorFlow refuses tf.timestamp where its ops are to be deterministic.
        start = tf.numpy_function(time.monotonic, [], tf.float64)
        with tf.control_dependencies([start]):
            batch = next(self._iterator)
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            tf.numpy_function(self._wait.add_since, [start], tf.float64)
        return batch


class Throughput:
    """Throughput since an epoch began, up to its latest step: validation and checkpoints do not count.

    Args:
      batch_size: examples per step, over all workers; a smaller last batch counts as a whole one.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size

    def begin(self, model: tf.keras.Model) -> None:
        """Begins an epoch of ``model``."""
        self._model = model
        self._first_step, self._first_wait = self._steps_and_wait()
        self._start = self._end = time.monotonic()

    def step(self) -> None:
        """A step has ended."""
        self._end = time.monotonic()

    def read(self) -> dict[str, float]:
        """``examples_per_second``, and ``input_wait_share`` of the time, in [0, 1], where the model measures it."""
        step, wait = self._steps_and_wait()
        seconds = max(self._end - self._start, 1e-9)
        found = {"examples_per_second": (step - self._first_step) * self._batch_size / seconds}
        if wait is not None:
            found["input_wait_share"] = min((wait - self._first_wait) / seconds, 1.0)
        return found

    def _steps_and_wait(self) -> tuple[int, float | None]:
        return int(self._model.optimizer.iterations), getattr(self._model, "input_wait_seconds", None)
