"""Small summaries of columns: immutable, mergeable and deterministic.

``Histogram`` and ``DistinctSketch`` depend on the data alone, whatever the order of merges; so does ``TopValues`` while
its ``error`` is 0. They are our own since Apache DataSketches' quantile sketch flips coins, so that two builds of one
dataset would differ, and updates item by item from Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.data.hashing import hash_keys

Arrow: TypeAlias = pa.Array | pa.ChunkedArray
_MAX_HASH = 2**63 - 1  # Hashes lie in [0, _MAX_HASH).
COUNT_SCHEMA = pa.schema([("value", pa.string()), ("count", pa.int64())])


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in buckets: exact while there are at most ``max_buckets`` distinct values.

    A value has an int64 key: itself for integers; for floats the bits of the float64, mapped so that keys grow with
    values. A bucket is ``key >> shift``, with the smallest ``shift`` that leaves at most ``max_buckets`` buckets. So an
    integer is known to less than 2^shift, and a normal float to a relative error below 2^(shift - 52).

    >>> histogram = Histogram.of_integers([3, 1, 3]).merge(Histogram.of_integers([7]))
    >>> histogram.quantiles([0.5, 1.0]).tolist()
    [3, 7]

    Attributes:
      kind: of the values.
      shift: in [0, 63].
      buckets: int64 [num_buckets], ascending.
      counts: values in each bucket, int64 [num_buckets], all positive.
      max_buckets: >= 1.
    """

    MAX_BUCKETS = 1 << 16

    kind: Literal["int64", "float64"]
    shift: int
    buckets: np.ndarray
    counts: np.ndarray
    max_buckets: int = MAX_BUCKETS

    @classmethod
    def of_integers(
        cls, values: np.ndarray, max_buckets: int = MAX_BUCKETS, counts: np.ndarray | None = None
    ) -> Histogram:
        """Counts integers.

        Args:
          values: int64 [num_values].
          max_buckets: >= 1.
          counts: how often each value stands, >= 1, int64 [num_values]; once if None.

        Returns:
          Their histogram.
        """
        keys, counts = _sum_equal(np.asarray(values, np.int64), counts)
        return cls("int64", 0, keys, counts, max_buckets)._coarsened()

    @classmethod
    def of_floats(
        cls, values: np.ndarray, max_buckets: int = MAX_BUCKETS, counts: np.ndarray | None = None
    ) -> Histogram:
        """Counts floats.

        Args:
          values: [num_values].
          max_buckets: >= 1.
          counts: how often each value stands, >= 1, int64 [num_values]; once if None.

        Returns:
          Their histogram.

        Raises:
          ValueError: NaN or an infinity among them.
        """
        values = np.asarray(values, np.float64)
        if not np.isfinite(values).all():
            raise ValueError(
                f"a histogram takes finite values. Received: {np.count_nonzero(~np.isfinite(values)):,} others of "
                f"{len(values):,}. Leave missing values out"
            )
        keys, counts = _sum_equal(_float_keys(values), counts)
        return cls("float64", 0, keys, counts, max_buckets)._coarsened()

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def merge(self, other: Histogram) -> Histogram:
        """Returns the histogram of both sets of values; ``other`` must have the same kind and ``max_buckets``."""
        if (self.kind, self.max_buckets) != (other.kind, other.max_buckets):
            raise ValueError(
                "merged histograms need one kind and one max_buckets. Received: "
                f"{self.kind}, {self.max_buckets} and {other.kind}, {other.max_buckets}"
            )
        shift = max(self.shift, other.shift)
        parts = [part.buckets >> (shift - part.shift) for part in (self, other)]
        buckets, counts = _sum_equal(np.concatenate(parts), np.concatenate([self.counts, other.counts]))
        return dataclasses.replace(self, shift=shift, buckets=buckets, counts=counts)._coarsened()

    def _coarsened(self) -> Histogram:
        if len(self.buckets) <= self.max_buckets:
            return self
        # Neighbors stay apart at shift k where they differ in bit k or above: max_buckets - 1 pairs may.
        differing = (self.buckets[1:] ^ self.buckets[:-1]).view(np.uint64)
        largest_joined = np.partition(differing, -self.max_buckets)[-self.max_buckets]
        more = int(largest_joined).bit_length()
        if more > 63:  # Negative and other keys are told apart at every shift.
            raise ValueError(f"max_buckets must be >= 2 for values of both signs. Received: {self.max_buckets}")
        buckets, counts = _sum_equal(self.buckets >> more, self.counts)
        return dataclasses.replace(self, shift=self.shift + more, buckets=buckets, counts=counts)

    def quantiles(self, fractions: Sequence[float] | np.ndarray) -> np.ndarray:
        """Finds the smallest v with at least ``fraction * count`` values <= v, for each fraction.

        v is rounded up to the end of its bucket; with ``shift`` 0 it is ``np.quantile(method="inverted_cdf")``.

        Args:
          fractions: in [0, 1].

        Returns:
          int64 or float64 [num_fractions].

        Raises:
          ValueError: no values.
        """
        self._require_values()
        reached = np.searchsorted(np.cumsum(self.counts), np.asarray(fractions) * self.count)
        return self._upper_ends()[np.minimum(reached, len(self.counts) - 1)]

    def share_up_to(self, values: np.ndarray) -> np.ndarray:
        """Returns the share of all counts in buckets that end at or before each of ``values``, float64 in [0, 1]."""
        self._require_values()
        cumulative = np.append(0, np.cumsum(self.counts))
        return cumulative[np.searchsorted(self._upper_ends(), values, side="right")] / self.count

    def cut_offs(self, fractions: Sequence[float]) -> list[int]:
        """Finds integers t such that about ``fraction`` of the values lie below t; equal values are never separated.

        Args:
          fractions: in [0, 1].

        Returns:
          An integer for each fraction.

        Raises:
          ValueError: no values, or floats.
        """
        self._require_values()
        if self.kind != "int64":
            raise ValueError(f"cut-offs are for integers. Received: a histogram of {self.kind}")
        before = np.append(0, np.cumsum(self.counts))
        ends = np.append(self.buckets, self.buckets[-1] + 1)
        nearest = [int(np.argmin(np.abs(before - fraction * before[-1]))) for fraction in fractions]
        return [int(ends[index]) << self.shift for index in nearest]

    def _upper_ends(self) -> np.ndarray:
        """Largest value of each bucket."""
        keys = (self.buckets << self.shift) | ((1 << self.shift) - 1)
        return keys if self.kind == "int64" else _floats_of_keys(keys)

    def _require_values(self) -> None:
        if not len(self.counts):
            raise ValueError("a histogram needs values to have quantiles. Received: none")

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``from_dict`` takes, ready for JSON."""
        return {
            "kind": self.kind,
            "shift": self.shift,
            "buckets": self.buckets.tolist(),
            "counts": self.counts.tolist(),
            "max_buckets": self.max_buckets,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Histogram:
        """Returns the histogram whose ``to_dict`` gave ``content``."""
        arrays = {name: np.array(content[name], np.int64) for name in ("buckets", "counts")}
        return cls(**{**content, **arrays})


def _sum_equal(keys: np.ndarray, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(distinct keys, ascending; sum of the counts of each, or how often each stands where counts is None)."""
    if counts is None:
        return np.unique(keys, return_counts=True)
    distinct, codes = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(distinct), np.int64)
    np.add.at(sums, codes, counts)  # np.bincount would sum in float64.
    return distinct, sums


def _float_keys(values: np.ndarray) -> np.ndarray:
    """Finite float64 -> int64 that grow with the values: the bits of the magnitude, with the sign; 0 for -0.0."""
    magnitudes = np.abs(values).view(np.int64)
    return np.where(values < 0, -magnitudes, magnitudes)


def _floats_of_keys(keys: np.ndarray) -> np.ndarray:
    """The inverse; keys beyond the largest float (ends of the outermost buckets) become that float."""
    largest = np.array(np.finfo(np.float64).max).view(np.int64)
    magnitudes = np.abs(np.clip(keys, -largest, largest)).view(np.float64)
    return np.where(keys < 0, -magnitudes, magnitudes)


@dataclasses.dataclass(frozen=True, eq=False)
class DistinctSketch:
    """The ``size`` smallest 63-bit hashes of a set of values: an estimate of how many values are distinct.

    Exact below ``size``; above it the relative standard error is 1 / sqrt(size - 2), 1.6 % for 4,096.

    >>> DistinctSketch.of(pa.array(["u1", "u2", "u1", None])).estimate
    2

    Attributes:
      hashes: int64 [at most size], ascending, distinct.
      size: >= 3.

    Source: Bar-Yossef et al. (2002), "Counting distinct elements in a data stream"; Beyer et al. (2007) for the
    unbiased estimate.
    """

    DEFAULT_SIZE = 4096

    hashes: np.ndarray
    size: int = DEFAULT_SIZE

    @classmethod
    def of(cls, values: Arrow, size: int = DEFAULT_SIZE) -> DistinctSketch:
        """Hashes the values of a column.

        Args:
          values: text or integers; nulls are left out.
          size: >= 3.

        Returns:
          Their sketch.
        """
        return cls.of_hashes(hash_keys(pc.unique(values).drop_null()), size)

    @classmethod
    def of_hashes(cls, hashes: np.ndarray, size: int = DEFAULT_SIZE) -> DistinctSketch:
        """Makes the sketch of values that are hashed already.

        Args:
          hashes: as ``clsd_tf.data.hashing.hash_keys`` gives them, int64 [num_values].
          size: >= 3.

        Returns:
          Their sketch.
        """
        return cls(_smallest(np.asarray(hashes, np.int64), size), size)

    def merge(self, other: DistinctSketch) -> DistinctSketch:
        """Returns the sketch of both sets of values; ``other`` must have the same size."""
        if self.size != other.size:
            raise ValueError(f"merged sketches need one size. Received: {self.size} and {other.size}")
        return dataclasses.replace(self, hashes=np.union1d(self.hashes, other.hashes)[: self.size])

    @property
    def estimate(self) -> int:
        """Number of distinct values: (size - 1) / (largest kept hash as a fraction of all hashes)."""
        if len(self.hashes) < self.size:
            return len(self.hashes)
        return round((self.size - 1) * _MAX_HASH / (int(self.hashes[-1]) + 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``from_dict`` takes, ready for JSON."""
        return {"hashes": self.hashes.tolist(), "size": self.size}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DistinctSketch:
        """Returns the sketch whose ``to_dict`` gave ``content``."""
        return cls(np.array(content["hashes"], np.int64), content["size"])


def _smallest(hashes: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` smallest distinct hashes, ascending."""
    if len(hashes) > size:  # Sorting all of them would take most of a sketch's time.
        smallest = np.unique(np.partition(hashes, size)[:size])
        if len(smallest) == size:
            return smallest
    return np.unique(hashes)[:size]


@dataclasses.dataclass(frozen=True, eq=False)
class TopValues:
    """Counts of the most frequent values: exact while at most ``limit`` values are distinct.

    Above that the (limit + 1)-th largest count is subtracted from all and what is no longer positive dropped:
    count <= true count <= count + error, where a value that is not kept counts 0. ``error`` is at most the sum of all
    true counts / (limit + 1), so every more frequent value is kept. With an error above 0, counts depend on the order
    of merges (the guarantee does not).

    >>> TopValues.of(pa.array(["a", "b", "a", None]), limit=10).most_common(1)
    [('a', 2)]

    Attributes:
      table: columns value (string, distinct) and count (int64, positive); rows in no particular order.
      limit: >= 1.
      error: the greatest undercount possible.

    Source: Misra and Gries (1982), "Finding repeated elements"; Agarwal et al. (2012), "Mergeable summaries".
    """

    table: pa.Table
    limit: int
    error: int = 0

    @classmethod
    def of(cls, values: Arrow, limit: int) -> TopValues:
        """Counts the values of a column.

        Args:
          values: of any type that has a text; nulls are left out.
          limit: >= 1.

        Returns:
          Their counts, values as text.
        """
        counted = pc.value_counts(values.drop_null())
        return cls.of_counts(counted.field("values"), counted.field("counts"), limit)

    @classmethod
    def of_counts(cls, values: Arrow, counts: Arrow, limit: int) -> TopValues:
        """Takes values that are counted already.

        Args:
          values: distinct, without nulls, [num_values].
          counts: or other positive integer weights, [num_values].
          limit: >= 1.

        Returns:
          Their counts, values as text.
        """
        return cls(pa.table([values.cast(pa.string()), counts], schema=COUNT_SCHEMA), limit)._trimmed()

    def merge(self, other: TopValues) -> TopValues:
        """Returns the counts of both columns together; ``other`` must have the same limit."""
        if self.limit != other.limit:
            raise ValueError(f"merged top values need one limit. Received: {self.limit} and {other.limit}")
        both = pa.concat_tables([self.table, other.table])
        # Without threads the order of rows is that of first appearance, so results are the same bit for bit.
        summed = both.group_by("value", use_threads=False).aggregate([("count", "sum")])
        table = summed.select(["value", "count_sum"]).rename_columns(["value", "count"])
        return TopValues(table, self.limit, self.error + other.error)._trimmed()

    def _trimmed(self) -> TopValues:
        if self.table.num_rows <= self.limit:
            return self
        counts = self.table.column("count").to_numpy()
        subtracted = int(np.partition(counts, -self.limit - 1)[-self.limit - 1])
        table = self.table.set_column(1, "count", pa.array(counts - subtracted)).filter(counts > subtracted)
        return TopValues(table, self.limit, self.error + subtracted)

    def most_common(self, num_values: int) -> list[tuple[str, int]]:
        """Returns up to ``num_values`` pairs (value, count) by falling count, ties in the order of the text."""
        rows = self.table.sort_by([("count", "descending"), ("value", "ascending")]).slice(0, num_values)
        return list(zip(*(column.to_pylist() for column in rows.columns), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``from_dict`` takes, ready for JSON; values by falling count."""
        counts = dict(self.most_common(self.table.num_rows))
        return {"values": list(counts), "counts": list(counts.values()), "limit": self.limit, "error": self.error}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TopValues:
        """Returns the counts whose ``to_dict`` gave ``content``."""
        table = pa.table([content["values"], content["counts"]], schema=COUNT_SCHEMA)
        return cls(table, content["limit"], content["error"])
