"""The shortest time that a training step could take on this machine: its work at rates measured in the same run."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import tensorflow as tf

Precision = Literal["float32", "bfloat16"]
Updates = Literal["lazy_adam", "adagrad", "rowwise_adagrad", "dense_adam"]

_REPEATS = 9
_OPERANDS = 4
_SQUARE = 1024
_COPY_BYTES = 1 << 28
THREADS = 2  # Of all that is compared.


@dataclasses.dataclass(frozen=True)
class Work:
    """Least work of a step.

    Attributes:
      multiply_adds: of its matrix products.
      gathered_bytes: of rows at random places of the tables, read or written.
      copied_bytes: read at one place and written at another, one after the other.
    """

    multiply_adds: float
    gathered_bytes: float
    copied_bytes: float

    def seconds(self, rates: Rates, precision: Precision) -> float:
        """multiply_adds / GEMM rate + gathered_bytes / gather rate + copied_bytes / copy rate."""
        return (
            self.multiply_adds / rates.multiply_adds_per_second[precision]
            + self.gathered_bytes / rates.gathered_bytes_per_second
            + self.copied_bytes / rates.copied_bytes_per_second
        )


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates that the machine reached with nothing else to do; ``gathered`` is for tables of one size."""

    multiply_adds_per_second: Mapping[Precision, float]
    gathered_bytes_per_second: float
    copied_bytes_per_second: float


def mlp_multiply_adds(batch_size: int, num_inputs: int, hidden_units: Sequence[int]) -> int:
    """3 * batch_size * sum of inputs * outputs over the layers, the logit's included.

    The factor: forward, gradient of the weights, gradient of the inputs, which the embeddings need.
    """
    sizes = [num_inputs, *hidden_units, 1]
    return 3 * batch_size * sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes))


def row_work(updates: Updates, ids: np.ndarray, embedding_dim: int, num_rows: int) -> tuple[int, int]:
    """(gathered bytes, copied bytes) of a step's traffic with tables of float32 rows, first-order weight included.

    All ids are read once in the forward pass. Then lazy Adam reads and writes the distinct rows and their two moments,
    Adagrad the distinct rows and as many sums, row-wise Adagrad the distinct rows and a number for each. Dense Adam
    fills a gradient as large as the tables, reads it, the tables and both moments, and writes three of them: 8 times
    the tables, which is what copying 4 times moves.

    Args:
      updates: the optimizer.
      ids: of the batch, with those of different features apart from each other; any shape.
      embedding_dim: without the first-order weight.
      num_rows: of all tables.
    """
    row_bytes = 4 * (embedding_dim + 1)
    distinct = len(np.unique(ids))
    lookup = ids.size * row_bytes
    if updates == "lazy_adam":
        return lookup + 6 * distinct * row_bytes, 0
    if updates == "adagrad":
        return lookup + 4 * distinct * row_bytes, 0
    if updates == "rowwise_adagrad":
        return lookup + 2 * distinct * (row_bytes + 4), 0
    return lookup, 4 * num_rows * row_bytes


def measure_rates(*, num_rows: int, embedding_dim: int, batch_size: int, units: int) -> Rates:
    """Rates of this machine.

    Args:
      num_rows: of the table to gather from.
      embedding_dim: the table's rows have one number more.
      batch_size, units: the shape of the MLP's products; those of a large square are measured, too, and the faster
        counts.
    """
    return Rates(
        {precision: _gemm_rate(precision, batch_size, units) for precision in ("float32", "bfloat16")},
        _gather_rate(num_rows, embedding_dim + 1),
        _copy_rate(),
    )


def _gemm_rate(precision: Precision, batch_size: int, units: int) -> float:
    shapes = [(batch_size, units, units), (_SQUARE, _SQUARE, _SQUARE)]
    return max(_product_rate(precision, *shape) for shape in shapes)


def _product_rate(precision: Precision, rows: int, inner: int, columns: int) -> float:
    left, right, products = different_products(precision, rows, inner, columns)
    return len(left) * rows * inner * columns / shortest_seconds(lambda: products(left, right))


def different_products(
    precision: Precision, rows: int, inner: int, columns: int
) -> tuple[list[tf.Tensor], list[tf.Tensor], Callable]:
    """Operands, and the function that multiplies them pair by pair. TensorFlow computes equal products only once."""
    left = [tf.cast(tf.random.normal([rows, inner]), precision) for _ in range(_OPERANDS)]
    right = [tf.cast(tf.random.normal([inner, columns]), precision) for _ in range(_OPERANDS)]
    return left, right, tf.function(lambda left, right: [tf.matmul(*pair) for pair in zip(left, right, strict=True)])


def _gather_rate(num_rows: int, row_length: int) -> float:
    """Bytes of rows at random places of a table, per second."""
    table = tf.Variable(tf.zeros([num_rows, row_length]))
    count = 200_000
    ids = [tf.random.uniform([count], maxval=num_rows, dtype=tf.int64) for _ in range(_OPERANDS)]
    gather = tf.function(lambda ids: [tf.gather(table, part) for part in ids])
    return _OPERANDS * count * 4 * row_length / shortest_seconds(lambda: gather(ids))


def _copy_rate() -> float:
    """Bytes copied per second, by as many threads as a step has."""
    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    parts = list(zip(np.split(target, THREADS), np.split(source, THREADS), strict=True))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return _COPY_BYTES / shortest_seconds(lambda: list(threads.map(lambda part: np.copyto(*part), parts)))


def shortest_seconds(call: Callable[[], object]) -> float:
    """Of several calls, after one to warm up: what others take from the machine only makes it longer."""
    call()
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
