"""Throughput of training, and the share of its time that it waits for input."""

from __future__ import annotations

import time

import tensorflow as tf


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
        self._start = time.monotonic()
        self._end: float | None = None

    def step(self) -> None:
        """A step has ended."""
        self._end = time.monotonic()

    def read(self) -> dict[str, float]:
        """``examples_per_second``, and ``input_wait_share`` of the time, in [0, 1], where the model measures it."""
        step, wait = self._steps_and_wait()
        # A parameter server's chief does not see steps end.
        seconds = max((self._end or time.monotonic()) - self._start, 1e-9)
        found = {"examples_per_second": (step - self._first_step) * self._batch_size / seconds}
        if wait is not None and self._first_wait is not None:
            found["input_wait_share"] = min((wait - self._first_wait) / seconds, 1.0)
        return found

    def _steps_and_wait(self) -> tuple[int, float | None]:
        return int(self._model.optimizer.iterations.numpy()), getattr(self._model, "input_wait_seconds", None)
