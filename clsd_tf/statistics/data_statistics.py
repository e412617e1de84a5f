"""Statistics of the joined rows of a data set, per raw input and user group, that can be merged.

Statistics of a part are made from a table, those of a split by merging the parts in a fixed order. They hold no user
ids: of the user key's column only how many values are missing and distinct.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.data.examples import arrow_to_tensors
from clsd_tf.data.hashing import mix_row_ids
from clsd_tf.data.transform import group_ids
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.model_inputs import RawInput
from clsd_tf.spec.user_groups import UserGroup
from clsd_tf.statistics.column_summaries import NumberSummary, ValueSummary, sum_segments
from clsd_tf.statistics.sketches import DistinctSketch, Histogram, TopValues
from clsd_tf.statistics.small_groups import MIN_GROUP_USERS, merged_labels
from clsd_tf.storage.dataset_dir import SPLITS
from clsd_tf.storage.files import write_text

MAX_VALUES = 1000  # Values of a column that are counted; exactly where no more are distinct.
MAX_BUCKETS = 4096  # Of a column's histogram; exact where no more numbers are distinct.
SKETCH_SIZE = 1024  # Distinct values, and users of a group, that are counted exactly; above that to 3 %.

Segment = tuple[str, str]  # (user group, label).
ALL_ROWS: Segment = ("", "all rows")


@dataclasses.dataclass(frozen=True, eq=False)
class ColumnStatistics:
    """One raw input.

    Attributes:
      missing: rows without a value (for lists: empty) in each segment, int64 [num_segments].
      missing_clicks: clicks among all rows without a value.
      distinct: sketch of the values; None for lists.
      lengths: of texts in characters, of lists in values; None for numbers.
      numbers: of columns that are used as numbers.
      values: of columns that are used as ids; never of the user key.
    """

    missing: np.ndarray
    missing_clicks: int
    distinct: DistinctSketch | None = None
    lengths: Histogram | None = None
    numbers: NumberSummary | None = None
    values: ValueSummary | None = None

    @property
    def histogram(self) -> Histogram | None:
        """Of numbers, or of the lengths of lists; None for other columns."""
        if self.numbers:
            return self.numbers.histogram
        return self.lengths if self.distinct is None else None

    def merge(self, other: ColumnStatistics) -> ColumnStatistics:
        """Adds the rows of another part.

        Args:
          other: of the same column and segments.

        Returns:
          The statistics of both parts' rows.
        """
        parts = {name: getattr(self, name) and getattr(self, name).merge(getattr(other, name)) for name in _SUMMARIES}
        return ColumnStatistics(self.missing + other.missing, self.missing_clicks + other.missing_clicks, **parts)

    def in_segments(self, chosen: Sequence[Sequence[int]]) -> ColumnStatistics:
        """Gives the statistics of unions of segments.

        Args:
          chosen: indices of the segments of each union.

        Returns:
          A segment per union, in their order.
        """
        return dataclasses.replace(
            self,
            missing=sum_segments(self.missing, chosen),
            numbers=self.numbers and self.numbers.in_segments(chosen),
            values=self.values and self.values.in_segments(chosen),
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        parts = {name: getattr(self, name) and getattr(self, name).to_dict() for name in _SUMMARIES}
        return {"missing": self.missing.tolist(), "missing_clicks": self.missing_clicks, **parts}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ColumnStatistics:
        """Reads a ``content`` of ``to_dict``.

        Returns:
          Equal statistics.
        """
        parts: dict[str, Any] = {
            name: content[name] and kind.from_dict(content[name]) for name, kind in _SUMMARIES.items()
        }
        return cls(np.array(content["missing"], np.int64), content["missing_clicks"], **parts)


_SUMMARIES: dict[str, type[DistinctSketch | Histogram | NumberSummary | ValueSummary]] = {
    "distinct": DistinctSketch,
    "lengths": Histogram,
    "numbers": NumberSummary,
    "values": ValueSummary,
}


@dataclasses.dataclass(frozen=True, eq=False)
class DataStatistics:
    """Statistics of joined rows.

    Attributes:
      segments: ``ALL_ROWS`` first, then each label of each user group.
      has_labels: False for served requests, whose clicks are not known; all clicks are then 0.
      rows: in each segment, int64 [num_segments].
      clicks: likewise.
      users: of each segment.
      columns: raw input -> its statistics.
    """

    segments: tuple[Segment, ...]
    has_labels: bool
    rows: np.ndarray
    clicks: np.ndarray
    users: tuple[DistinctSketch, ...]
    columns: Mapping[str, ColumnStatistics]

    @classmethod
    def of(cls, table: pa.Table, spec: FeatureSpec, left_out: Collection[str] = ()) -> DataStatistics:
        """Sums up the rows of a part.

        Args:
          table: a column per ``spec.raw_inputs`` with null for missing; ``user_hash`` (int64, null where the user is
            not known); ``label`` (0 or 1), which may be absent.
          spec: the feature spec.
          left_out: raw inputs that the table does not have; neither they nor user groups made of them are counted.

        Returns:
          Statistics that can be merged with those of other parts.
        """
        return _Part(table, spec, left_out).statistics()

    def merge(self, other: DataStatistics) -> DataStatistics:
        """Merges the statistics of two parts.

        Args:
          other: of the same spec.

        Returns:
          Statistics of the rows of both. Deterministic, but means may differ by rounding with the order of merges.

        Raises:
          ValueError: the parts are of different specs.
        """
        if self.segments != other.segments or set(self.columns) != set(other.columns):
            raise ValueError("merged statistics must be of one feature spec. Received: other columns or user groups")
        return DataStatistics(
            self.segments,
            self.has_labels and other.has_labels,
            self.rows + other.rows,
            self.clicks + other.clicks,
            tuple(left.merge(right) for left, right in zip(self.users, other.users, strict=True)),
            {name: column.merge(other.columns[name]) for name, column in self.columns.items()},
        )

    def merge_small_groups(self, min_users: int = MIN_GROUP_USERS) -> DataStatistics:
        """Makes of the statistics what reports may show.

        Args:
          min_users: groups of fewer users become part of "other".

        Returns:
          The same columns, without the segments of small and of empty groups.
        """
        unions: dict[Segment, list[int]] = {ALL_ROWS: [0]}
        for group in dict.fromkeys(group for group, _ in self.segments[1:]):
            members = [index for index, (name, _) in enumerate(self.segments) if name == group]
            labels = [self.segments[index][1] for index in members]
            users = [self.users[index] for index in members]
            for index, label in zip(members, merged_labels(labels, users, min_users), strict=True):
                if self.users[index].estimate:
                    unions.setdefault((group, label), []).append(index)
        return self._in_segments(unions)

    def _in_segments(self, unions: Mapping[Segment, Sequence[int]]) -> DataStatistics:
        chosen = list(unions.values())
        return DataStatistics(
            tuple(unions),
            self.has_labels,
            sum_segments(self.rows, chosen),
            sum_segments(self.clicks, chosen),
            tuple(_merge_all([self.users[index] for index in indices]) for indices in chosen),
            {name: column.in_segments(chosen) for name, column in self.columns.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "segments": [list(segment) for segment in self.segments],
            "has_labels": self.has_labels,
            "rows": self.rows.tolist(),
            "clicks": self.clicks.tolist(),
            "users": [sketch.to_dict() for sketch in self.users],
            "columns": {name: column.to_dict() for name, column in self.columns.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DataStatistics:
        """Reads a ``content`` of ``to_dict``.

        Returns:
          Equal statistics.
        """
        return cls(
            tuple(tuple(segment) for segment in content["segments"]),
            content["has_labels"],
            np.array(content["rows"], np.int64),
            np.array(content["clicks"], np.int64),
            tuple(DistinctSketch.from_dict(sketch) for sketch in content["users"]),
            {name: ColumnStatistics.from_dict(column) for name, column in content["columns"].items()},
        )


def _merge_all(sketches: Sequence[DistinctSketch]) -> DistinctSketch:
    merged = sketches[0]
    for sketch in sketches[1:]:
        merged = merged.merge(sketch)
    return merged


def write_data_statistics(path: pathlib.Path, splits: Mapping[str, DataStatistics]) -> None:
    """Writes the statistics of each split as JSON, without line breaks: long lists of counts.

    Args:
      path: of the file.
      splits: split -> its statistics.
    """
    write_text(path, json.dumps({split: statistics.to_dict() for split, statistics in splits.items()}) + "\n")


def read_data_statistics(path: pathlib.Path) -> dict[str, DataStatistics]:
    """Reads what ``write_data_statistics`` wrote.

    Args:
      path: of the file.

    Returns:
      Split -> its statistics; train first.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return {split: DataStatistics.from_dict(content[split]) for split in SPLITS if split in content}


# --- Statistics of one table ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A column as its distinct values and the code of each row; len(dictionary) is the code of a missing value."""

    dictionary: pa.Array
    codes: np.ndarray

    @classmethod
    def of(cls, values: pa.Array) -> _Encoded:
        encoded = values.dictionary_encode()
        codes = pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy(zero_copy_only=False)
        return cls(encoded.dictionary, codes.astype(np.int64))


class _Part:
    """Rows with their user-group ids, which every column is counted by."""

    def __init__(self, table: pa.Table, spec: FeatureSpec, left_out: Collection[str]):
        self._spec = spec
        self._raw_inputs = [entry for entry in spec.raw_inputs if entry.name not in left_out]
        self._user_groups = [group for group in spec.user_groups if group.column not in left_out]
        self._table = table
        self._has_labels = "label" in table.column_names
        self._labels = table.column("label").to_numpy() if self._has_labels else np.zeros(table.num_rows, np.float32)
        self._encoded: dict[str, _Encoded] = {}
        self._groups = [(self._group_ids(group), len(group.labels)) for group in self._user_groups]
        self._rows = self._count(np.zeros(table.num_rows, np.int64), 1)[0]

    def _column(self, name: str) -> _Encoded:
        if name not in self._encoded:
            self._encoded[name] = _Encoded.of(self._table.column(name).combine_chunks())
        return self._encoded[name]

    def _group_ids(self, group: UserGroup) -> np.ndarray:
        encoded = self._column(group.column)
        with_missing = pa.concat_arrays([encoded.dictionary, pa.nulls(1, encoded.dictionary.type)])
        raw = group.raw_input(self._spec.column_types)
        tensors = arrow_to_tensors(pa.table({group.column: with_missing}), [raw])
        return group_ids(group, tensors[group.column]).numpy()[encoded.codes]

    def statistics(self) -> DataStatistics:
        segments = (ALL_ROWS, *((group.name, label) for group in self._user_groups for label in group.labels))
        return DataStatistics(
            segments,
            self._has_labels,
            self._rows,
            self._sum(self._labels).astype(np.int64),
            self._users(),
            {entry.name: self._column_statistics(entry) for entry in self._raw_inputs},
        )

    def _count(self, slots: np.ndarray, num_slots: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Occurrences of each slot in each segment, int64 [num_slots, num_segments]; ``rows``: the row of each."""
        parts = [np.bincount(slots, minlength=num_slots)[:, np.newaxis]]
        for ids, size in self._groups:
            cells = slots * size + (ids if rows is None else ids[rows])
            parts.append(np.bincount(cells, minlength=num_slots * size).reshape(num_slots, size))
        return np.concatenate(parts, axis=1)

    def _sum(self, weights: np.ndarray) -> np.ndarray:
        """Sum over the rows of each segment, float64 [num_segments]."""
        parts: list[np.ndarray] = [np.array([weights.sum(dtype=np.float64)])]
        parts += [np.bincount(ids, weights, minlength=size) for ids, size in self._groups]
        return np.concatenate(parts)

    def _users(self) -> tuple[DistinctSketch, ...]:
        users = _Encoded.of(self._table.column("user_hash").combine_chunks())
        hashes = users.dictionary.to_numpy()
        in_segment = self._count(users.codes, len(hashes) + 1)[: len(hashes)] > 0
        return tuple(DistinctSketch.of_hashes(hashes[present], SKETCH_SIZE) for present in in_segment.T)

    def _column_statistics(self, entry: RawInput) -> ColumnStatistics:
        if entry.is_list:
            return self._list_statistics(self._table.column(entry.name).combine_chunks())
        encoded = self._column(entry.name)
        missing = self._missing(encoded.codes == len(encoded.dictionary))
        lengths = _text_lengths(encoded) if entry.dtype == "string" else None
        if entry.name == self._spec.user_key:
            return ColumnStatistics(*missing, _distinct(encoded.dictionary))
        numbers = self._number_summary(encoded, self._rows - missing[0]) if _is_number(self._spec, entry.name) else None
        separator = _separators(self._spec).get(entry.name)
        counted, rows = (encoded, None) if separator is None else _separated(encoded, separator)
        values = self._value_summary(counted, rows) if _is_id(self._spec, entry.name) else None
        return ColumnStatistics(*missing, _distinct(counted.dictionary), lengths, numbers, values)

    def _missing(self, is_missing: np.ndarray) -> tuple[np.ndarray, int]:
        """(rows without a value in each segment, clicks among all of them)."""
        rows = np.flatnonzero(is_missing)  # Mostly few.
        return self._count(np.zeros(len(rows), np.int64), 1, rows)[0], int(self._labels[rows].sum())

    def _list_statistics(self, lists: pa.Array) -> ColumnStatistics:
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return ColumnStatistics(*self._missing(lengths == 0), lengths=Histogram.of_integers(lengths, MAX_BUCKETS))

    def _number_summary(self, encoded: _Encoded, count: np.ndarray) -> NumberSummary:
        values = encoded.dictionary.to_numpy(zero_copy_only=False).astype(np.float64)
        in_segments = self._count(encoded.codes, len(values) + 1)[: len(values)]
        counts, present = in_segments[:, 0], np.maximum(count, 1)
        mean = (in_segments * values[:, np.newaxis]).sum(axis=0) / present
        squares = (values[:, np.newaxis] - mean) ** 2
        return NumberSummary(
            count,
            mean,
            (in_segments * squares).sum(axis=0),
            float(values.min()) if len(values) else None,
            float(values.max()) if len(values) else None,
            int(counts[values == 0].sum()),
            Histogram.of_floats(values, MAX_BUCKETS, counts),
        )

    def _value_summary(self, encoded: _Encoded, rows: np.ndarray | None) -> ValueSummary:
        num_values = len(encoded.dictionary)
        counts = np.bincount(encoded.codes, minlength=num_values + 1)[:num_values]
        texts = encoded.dictionary.cast(pa.string())
        top = TopValues.of_counts(texts, pa.array(counts), MAX_VALUES)
        num_kept = top.table.num_rows
        slots = np.full(num_values + 1, num_kept)  # Values that are not kept share a slot; missing ones have the last.
        slots[num_values] = num_kept + 1
        slots[_positions(top.table.column("value"), texts)] = np.arange(num_kept)
        occurrences = slots[encoded.codes]
        in_segments = self._count(occurrences, num_kept + 2, rows)
        labels = self._labels if rows is None else self._labels[rows]
        clicks = np.bincount(occurrences, labels, minlength=num_kept + 2).astype(np.int64)
        return ValueSummary(top, in_segments[:num_kept], clicks[:num_kept], in_segments[: num_kept + 1].sum(axis=0))


def _is_number(spec: FeatureSpec, column: str) -> bool:
    """Tells if statistics treat the column as numbers: it is scaled, cut into intervals or expected in a range."""
    return "numbers" in _uses(spec, column) or (column in spec.expectations and spec.expectations[column].has_range)


def _is_id(spec: FeatureSpec, column: str) -> bool:
    """Tells if statistics count the column's values: they become ids or user groups, or are listed in the spec."""
    return "values" in _uses(spec, column) or (column in spec.expectations and bool(spec.expectations[column].values))


def _uses(spec: FeatureSpec, column: str) -> set[str]:
    return {entry.counted_as for entry in spec.entries if entry.raw_name == column}


def _separators(spec: FeatureSpec) -> dict[str, str]:
    """Column of separated values -> its separator."""
    return {feature.raw_name: feature.value_separator for feature in spec.features if feature.value_separator}


def _positions(kept: pa.ChunkedArray, values: pa.Array) -> np.ndarray:
    """Where each kept value stands in ``values``."""
    if len(kept) == len(values):
        return np.arange(len(values))
    return pc.index_in(kept, value_set=values).to_numpy()


def _distinct(values: pa.Array) -> DistinctSketch:
    if pa.types.is_string(values.type):
        return DistinctSketch.of(values, SKETCH_SIZE)
    bits = values.to_numpy(zero_copy_only=False).view(np.int64)  # Numbers need no text to be hashed by.
    return DistinctSketch.of_hashes((mix_row_ids(bits, seed=0) >> np.uint64(1)).astype(np.int64), SKETCH_SIZE)


def _text_lengths(encoded: _Encoded) -> Histogram:
    lengths = pc.utf8_length(encoded.dictionary).to_numpy(zero_copy_only=False)
    counts = np.bincount(encoded.codes, minlength=len(lengths) + 1)[: len(lengths)]
    return Histogram.of_integers(lengths, MAX_BUCKETS, counts)


def _separated(encoded: _Encoded, separator: str) -> tuple[_Encoded, np.ndarray]:
    """(the separated values, "" left out; the row of each)."""
    lists = pc.split_pattern(encoded.dictionary.cast(pa.string()), separator)
    flat = pc.list_flatten(lists)
    parts = _Encoded.of(pc.if_else(pc.equal(flat, ""), pa.scalar(None, pa.string()), flat))
    # Distinct texts are split once; then each row takes the codes of its text, and a missing value none.
    codes = pa.ListArray.from_arrays(lists.offsets, pa.array(parts.codes))
    of_rows = pa.concat_arrays([codes, pa.array([[]], codes.type)]).take(pa.array(encoded.codes))
    return _Encoded(parts.dictionary, pc.list_flatten(of_rows).to_numpy()), pc.list_parent_indices(of_rows).to_numpy()
