"""The time that training steps wait for their batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf


class InputWait:
    """Seconds that training steps have waited for their batch, measured around ``next(iterator)``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, iterator: Iterator) -> Iterator:
        """Measures how long the batches of ``iterator`` take to come.

        Returns:
          An iterator over the same batches.
        """
        return _Timed(iterator, self)

    def add_since(self, start: np.ndarray) -> np.ndarray:
        """Adds the seconds since ``start``, a time of ``time.monotonic``.

        Returns:
          The start, for ``tf.numpy_function``.
        """
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
