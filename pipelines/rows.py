"""What happens to rows, as functions on Arrow tables: check and convert, join, history, split. No Beam here."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import operator
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.columns import convert_column, true_mask
from clsd_tf.features import FeatureSpec, HistoryFeature, NumericFeature
from clsd_tf.hashing import hash_keys, mix_row_ids
from clsd_tf.tables import Column, Comparison, Split
from pipelines.sources import ROW_ID, BadRow, RawBatch, row_number

EVENT_TIME = "event_time"  # int64 microseconds since 1970 (UTC).
USER_HASH = "user_hash"
_OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


# --- Check and convert -----------------------------------------------------------------------------------------------


def parse_rows(batch: RawBatch, spec: FeatureSpec) -> tuple[pa.Table, list[BadRow]]:
    """Converts text to the declared types and takes out the rows that break a rule.

    Args:
      batch: rows of one file of the log, user or item table.
      spec: declares types and which columns must have a value (keys, event time, label, intensity, weight).

    Returns:
      The good rows, typed; and the bad rows with their reasons, those of the reader included.
    """
    table = dict(spec.tables.items())[batch.file.role]
    columns: dict[str, pa.Array] = {}
    reasons = np.full(batch.table.num_rows, "", dtype=object)
    for column in table.columns:
        values, failures = convert_column(batch.table.column(column.name).combine_chunks(), column)
        if table.format == "csv" and column.type == "string":
            # Mostly a stray quote that swallowed the rows behind it.
            failures[f"line_break:{column.name}"] = true_mask(pc.match_substring(values, "\n"))
        for name, mask in [*failures.items(), *_rule_failures(values, column, spec).items()]:
            reasons[mask & (reasons == "")] = name
        columns[column.name] = values
    good = pa.array(reasons == "")
    parsed = pa.table({**columns, ROW_ID: batch.table.column(ROW_ID)}).filter(good)
    return parsed, batch.bad_rows + _bad_rows(batch, reasons)


def _bad_rows(batch: RawBatch, reasons: np.ndarray) -> list[BadRow]:
    bad = np.flatnonzero(reasons != "")
    rows = batch.table.take(pa.array(bad)).to_pylist()
    return [
        BadRow(
            role=batch.file.role,
            file=batch.file.name,
            row=row_number(row.pop(ROW_ID)),
            reason=reasons[index],
            raw=json.dumps(row, default=_readable, sort_keys=True),
            lines=1 + sum(_readable(value).count("\n") for value in row.values() if isinstance(value, (str, bytes))),
        )
        for index, row in zip(bad, rows, strict=True)
    ]


def _readable(value: object) -> str:
    """What JSON has no type for: bytes that are not text, times, decimals."""
    return value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _rule_failures(values: pa.Array, column: Column, spec: FeatureSpec) -> dict[str, np.ndarray]:
    """Rules beyond the type: required values, the event-time range, weights and log1p inputs >= 0."""
    failures = {}
    if column.name in _required_columns(spec):
        failures[f"missing:{column.name}"] = true_mask(pc.is_null(values))
    if column.name == spec.event_time.column:
        time = spec.event_time
        scale = 1_000_000 / time.microseconds_per_unit
        low, high = (_epoch_seconds(day) * scale for day in (time.earliest, time.latest))
        moments = values.cast(pa.float64(), safe=False)
        outside = pc.or_(pc.less(moments, low), pc.greater_equal(moments, high))
        failures[f"event_time_outside_{time.earliest}_to_{time.latest}_in_{time.unit}"] = true_mask(outside)
    if column.name in _non_negative_columns(spec):
        failures[f"negative:{column.name}"] = true_mask(pc.less(values, 0))
    return failures


def _epoch_seconds(day: dt.date) -> float:
    return (day - dt.date(1970, 1, 1)).total_seconds()


def _required_columns(spec: FeatureSpec) -> set[str]:
    comparisons = [spec.label_comparison, spec.intensity_comparison]
    required = {spec.user_key, spec.item_key, spec.event_time.column, spec.sample_weight}
    return required | {comparison.column for comparison in comparisons if comparison}


def _non_negative_columns(spec: FeatureSpec) -> set[str]:
    logs = {feature.column for feature in spec.features if isinstance(feature, NumericFeature) and feature.log1p}
    return logs | {spec.sample_weight}


def evaluate_comparison(comparison: Comparison, table: pa.Table) -> np.ndarray:
    """``column operator value`` per row, as float32 0/1."""
    values = table.column(comparison.column).to_numpy()
    return _OPERATORS[comparison.operator](values, comparison.value).astype(np.float32)


# --- Join ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Profiles:
    """A user or item table, ready to be joined; its keys should be unique, see ``duplicate_rows``."""

    role: str
    key: str
    table: pa.Table

    def duplicate_rows(self) -> tuple[int, list[int]]:
        """Number of rows whose key was already there, and the row ids of the first such pair (not its key)."""
        keys = self.table.column(self.key).combine_chunks()
        first = pc.index_in(keys, value_set=keys).to_numpy()
        repeated = np.flatnonzero(first != np.arange(len(keys)))
        if not len(repeated):
            return 0, []
        row_ids = self.table.column(ROW_ID).to_numpy()
        return len(repeated), [int(row_ids[row]) for row in (first[repeated[0]], repeated[0])]

    def lookup(self, keys: pa.ChunkedArray, columns: Sequence[str]) -> tuple[dict[str, pa.ChunkedArray], int]:
        """The profile columns of each key (null where there is no profile), and how many have none."""
        rows = pc.index_in(keys, value_set=self.table.column(self.key).combine_chunks())
        taken = self.table.select(list(columns)).take(rows)
        return {name: taken.column(name) for name in columns}, rows.null_count


def join_rows(events: pa.Table, profiles: Sequence[Profiles], spec: FeatureSpec) -> tuple[pa.Table, Counter]:
    """Joins all events of some users with profiles and histories.

    Args:
      events: parsed log rows; must hold *every* event of each of its users, or histories would have gaps.
      profiles: user and item tables, as far as declared.
      spec: the feature spec.

    Returns:
      One row per event, sorted by (user, time, row id): row id, event time, user hash, label, intensity label, sample
      weight and the raw inputs; and counts of missing profiles.
    """
    counts: Counter = Counter()
    for profile in profiles:
        names = [name for name in profile.table.column_names if name not in (profile.key, ROW_ID)]
        found, missing = profile.lookup(events.column(profile.key), names)
        counts[f"{profile.role}_profile_missing"] += missing
        for name, values in found.items():
            events = events.append_column(name, values)
    order = _sorted_by_user_and_time(events, spec)
    events = events.take(pa.array(order))
    return _joined_columns(events, spec), counts


def _times(events: pa.Table, spec: FeatureSpec) -> np.ndarray:
    """Event times in microseconds."""
    values = events.column(spec.event_time.column).to_numpy()
    return (values * spec.event_time.microseconds_per_unit).astype(np.int64)


def _sorted_by_user_and_time(events: pa.Table, spec: FeatureSpec) -> np.ndarray:
    return np.lexsort((events.column(ROW_ID).to_numpy(), _times(events, spec), hash_keys(events.column(spec.user_key))))


def _joined_columns(events: pa.Table, spec: FeatureSpec) -> pa.Table:
    times, users = _times(events, spec), hash_keys(events.column(spec.user_key))
    label = evaluate_comparison(spec.label_comparison, events)
    intensity = evaluate_comparison(spec.intensity_comparison, events) if spec.intensity_comparison else label
    weight = events.column(spec.sample_weight).to_numpy() if spec.sample_weight else np.ones(len(label))
    columns = {
        ROW_ID: events.column(ROW_ID),
        EVENT_TIME: pa.array(times),
        USER_HASH: pa.array(users),
        "label": pa.array(label),
        "intensity_label": pa.array(intensity),
        "intensity_value": _intensity_values(events, spec),
        "sample_weight": pa.array(weight.astype(np.float32)),
    }
    histories = {feature.name: feature for feature in spec.features if isinstance(feature, HistoryFeature)}
    for entry in spec.raw_inputs:
        if entry.is_list:
            feature = histories[entry.name]
            values = events.column(spec.feature(feature.of).column).cast(pa.string())
            columns[entry.name] = user_histories(users, times, values, feature.max_length)
        else:
            columns[entry.name] = events.column(entry.name)
    return pa.table(columns)


def _intensity_values(events: pa.Table, spec: FeatureSpec) -> pa.Array:
    """float32, NaN where the event has none or the spec declares none."""
    if spec.intensity_value is None:
        return pa.array(np.full(len(events), np.nan, np.float32))
    values = pc.fill_null(events.column(spec.intensity_value).cast(pa.float64()), float("nan"))
    return pa.array(values.to_numpy().astype(np.float32))


def user_histories(users: np.ndarray, times: np.ndarray, values: pa.ChunkedArray, max_length: int) -> pa.ListArray:
    """The user's last values strictly before each event, oldest first.

    Args:
      users: user of each event, [num_events]; events must be sorted by (user, time).
      times: time of each event, [num_events].
      values: what the history is made of, [num_events]; nulls are left out.
      max_length: how many values to keep.

    Returns:
      list<string>, [num_events]. Events of one user at the same time do not see each other.
    """
    positions = np.arange(len(users))
    new_user = np.append(True, users[1:] != users[:-1])[: len(users)]
    new_time = new_user | np.append(True, times[1:] != times[:-1])[: len(users)]
    first_of_user = np.maximum.accumulate(np.where(new_user, positions, 0))
    first_of_time = np.maximum.accumulate(np.where(new_time, positions, 0))
    valid = values.is_valid().to_numpy()
    valid_before = np.append(0, np.cumsum(valid))  # Number of non-null values before each position.
    end = valid_before[first_of_time]
    start = np.maximum(valid_before[first_of_user], end - max_length)
    offsets = np.append(0, np.cumsum(end - start))
    # Positions start[i] .. end[i]-1 for each event i, one after the other.
    taken = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, end - start)
    flat = values.filter(pa.array(valid)).take(pa.array(taken)).combine_chunks()
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


# --- Split -----------------------------------------------------------------------------------------------------------


class TimeHistogram:
    """Counts of rows per event time, mergeable and of bounded size.

    Bucket width is a power of two of microseconds and grows only when there would be more than ``MAX_BUCKETS``
    buckets, so the result depends on the data alone, not on the order of merges.
    """

    MAX_BUCKETS = 1 << 16

    def __init__(self, shift: int = 0, counts: Sequence[tuple[int, int]] = ()):
        self.shift = shift
        self.counts: Counter = Counter(dict(counts))

    def to_dict(self) -> dict:
        """The constructor's arguments, ready for JSON."""
        return {"shift": self.shift, "counts": sorted(self.counts.items())}

    def add(self, times: np.ndarray) -> TimeHistogram:
        buckets, counts = np.unique(times >> self.shift, return_counts=True)
        self.counts.update(dict(zip(buckets.tolist(), counts.tolist(), strict=True)))
        return self._coarsen()

    def merge(self, other: TimeHistogram) -> TimeHistogram:
        shift = max(self.shift, other.shift)
        merged: Counter = Counter()
        for histogram in (self, other):
            for bucket, count in histogram.counts.items():
                merged[bucket >> (shift - histogram.shift)] += count
        self.shift, self.counts = shift, merged
        return self._coarsen()

    def _coarsen(self) -> TimeHistogram:
        while len(self.counts) > self.MAX_BUCKETS:
            self.shift += 1
            coarser: Counter = Counter()
            for bucket, count in self.counts.items():
                coarser[bucket >> 1] += count
            self.counts = coarser
        return self

    def cut_offs(self, fractions: Sequence[float]) -> list[int]:
        """Times t such that about ``fraction`` of the rows lie before t; rows of one time are never separated."""
        buckets = np.array(sorted(self.counts), np.int64)
        before = np.cumsum([0] + [self.counts[bucket] for bucket in buckets.tolist()])
        ends = np.append(buckets, buckets[-1] + 1)
        nearest = [int(np.argmin(np.abs(before - fraction * before[-1]))) for fraction in fractions]
        return [int(ends[index]) << self.shift for index in nearest]


def split_cut_offs(split: Split, histogram: TimeHistogram) -> list[int]:
    """Event times in microseconds at which validation and test begin (unused by the random rule)."""
    if split.validation_from is not None:
        moments = [split.validation_from, split.test_from, split.until]
        return [_microseconds(moment) for moment in moments if moment is not None]
    return histogram.cut_offs([split.train, split.train + split.validation])


def _microseconds(moment: dt.datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def split_indices(split: Split, cut_offs: Sequence[int], times: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """0 train, 1 validation, 2 test, 3 left out, per row."""
    if split.rule == "time":
        return np.searchsorted(np.array(cut_offs, np.int64), times, side="right")
    uniform = mix_row_ids(row_ids, split.seed) / 2.0**64
    return np.searchsorted([split.train, split.train + split.validation], uniform, side="right")
