"""What is known of an event at its time: profiles, histories and labels, as functions on Arrow tables. No Beam here."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.features import FeatureSpec, HistoryFeature
from clsd_tf.hashing import hash_keys
from clsd_tf.tables import Comparison
from pipelines.sources import ROW_ID

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


def evaluate_comparison(comparison: Comparison, table: pa.Table) -> np.ndarray:
    """``column operator value`` per row, as float32 0/1."""
    values = table.column(comparison.column).to_numpy()
    return _OPERATORS[comparison.operator](values, comparison.value).astype(np.float32)


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
