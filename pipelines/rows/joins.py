"""Joins of an event with what is known at its time: profiles, past events, labels. Arrow tables, no Beam."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.data.hashing import hash_keys
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.past_features import FromPastEvents
from clsd_tf.spec.tables import Comparison, EventTime
from pipelines.rows.histories import SortedEvents, past_values
from pipelines.sources import ROW_ID

EVENT_TIME = "event_time"  # int64 microseconds since 1970 (UTC).
USER_HASH = "user_hash"


def evaluate_comparison(comparison: Comparison, table: pa.Table) -> np.ndarray:
    """Evaluates ``column operator value`` in each row.

    Args:
      comparison: of a column of ``table``.
      table: any rows.

    Returns:
      float32 [num_rows], 0 or 1; 0 where the column is missing.
    """
    column = table.column(comparison.column)
    valid = column.is_valid().to_numpy()
    result = np.zeros(len(valid), np.float32)
    result[valid] = comparison.holds(column.drop_null().to_numpy())
    return result


def microseconds(values: pa.ChunkedArray, time: EventTime) -> np.ndarray:
    """Converts times.

    Args:
      values: numbers [num_rows].
      time: the unit that they are in.

    Returns:
      Microseconds since 1970 (UTC), rounded, int64 [num_rows].
    """
    scaled = values.to_numpy() * time.microseconds_per_unit
    return scaled if scaled.dtype == np.int64 else np.rint(scaled).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Profiles:
    """A user or item table, ready to be joined.

    Its keys should be unique, or with ``valid_from`` its pairs of key and time: see ``duplicate_rows``.
    """

    role: str
    key: str
    table: pa.Table
    valid_from: EventTime | None = None

    @property
    def columns(self) -> list[str]:
        """Columns that an event gets of the table."""
        valid_from = self.valid_from and self.valid_from.column
        return [name for name in self.table.column_names if name not in (self.key, ROW_ID, valid_from)]

    def duplicate_rows(self) -> tuple[int, list[int]]:
        """Counts the rows that repeat a key, or with ``valid_from`` a key and time.

        Returns:
          Their number, and the row ids of the row that is repeated first and of the first that repeats it.
        """
        keys = self.table.column(self.key).combine_chunks()
        codes = pc.index_in(keys, value_set=keys).to_numpy().astype(np.int64)
        if self.valid_from:
            distinct, ranks = np.unique(self._times, return_inverse=True)
            codes = codes * len(distinct) + ranks
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[inverse] != np.arange(len(keys)))
        if not len(repeated):
            return 0, []
        row_ids = self.table.column(ROW_ID).to_numpy()
        return len(repeated), [int(row_ids[row]) for row in (first[inverse[repeated[0]]], repeated[0])]

    def lookup(self, keys: pa.ChunkedArray, times: np.ndarray) -> tuple[dict[str, pa.ChunkedArray], int]:
        """Finds what is known of keys at a time.

        Args:
          keys: [num_events].
          times: microseconds, [num_events]; they matter for versioned tables only.

        Returns:
          Column -> values [num_events], null where nothing is known; and the number of events of which nothing is.
        """
        own = self.table.column(self.key).combine_chunks()
        rows = self._latest_rows(own, keys, times) if self.valid_from else pc.index_in(keys, value_set=own)
        taken = self.table.select(self.columns).take(rows)
        return {name: taken.column(name) for name in self.columns}, rows.null_count

    def _latest_rows(self, own: pa.Array, keys: pa.ChunkedArray, times: np.ndarray) -> pa.Array:
        """The latest row of each key with valid_from <= its time, null if there is none."""
        codes = pc.index_in(own, value_set=own).to_numpy().astype(np.int64)
        asked = pc.fill_null(pc.index_in(keys, value_set=own), -1).to_numpy().astype(np.int64)
        # (key, time) as one number that sorts like the pair; rank 0 is a time before every row.
        distinct, ranks = np.unique(self._times, return_inverse=True)
        moments = codes * (len(distinct) + 1) + 1 + ranks
        order = np.argsort(moments, kind="stable")
        until = asked * (len(distinct) + 1) + np.searchsorted(distinct, times, side="right")
        rows = np.append(order, -1)[np.searchsorted(moments, until, side="right", sorter=order) - 1]
        return pa.array(rows, mask=np.append(codes, -2)[rows] != asked)  # Another key's row: this key has none yet.

    @property
    def _times(self) -> np.ndarray:
        assert self.valid_from is not None, "of a table with states"
        return microseconds(self.table.column(self.valid_from.column), self.valid_from)


def join_rows(events: pa.Table, profiles: Sequence[Profiles], spec: FeatureSpec) -> tuple[pa.Table, Counter]:
    """Joins all events of some users with profiles and histories.

    Args:
      events: parsed log rows; must hold *every* event of each of its users, or histories would have gaps.
      profiles: the tables of users and items, as far as declared.
      spec: the feature spec.

    Returns:
      One row per event, sorted by (user, time, row id): row id, event time, user hash, label, intensity label, sample
      weight and the raw inputs; and counts of missing profiles.
    """
    counts: Counter = Counter()
    times = microseconds(events.column(spec.event_time.column), spec.event_time)
    users = hash_keys(events.column(spec.user_key))
    order = np.lexsort((events.column(ROW_ID).to_numpy(), times, users))
    events, times, users = events.take(pa.array(order)), times[order], users[order]
    for profile in profiles:
        found, missing = profile.lookup(events.column(profile.key), times)
        counts[f"{profile.role}_profile_missing"] += missing
        for name, values in found.items():
            events = events.append_column(name, values)
    return _joined_columns(events, SortedEvents(users, times), users, spec), counts


def _joined_columns(events: pa.Table, past: SortedEvents, users: np.ndarray, spec: FeatureSpec) -> pa.Table:
    label = evaluate_comparison(spec.label_comparison, events)
    intensity = evaluate_comparison(spec.intensity_comparison, events) if spec.intensity_comparison else label
    weight = events.column(spec.sample_weight).to_numpy() if spec.sample_weight else np.ones(len(label))
    columns = {
        ROW_ID: events.column(ROW_ID),
        EVENT_TIME: pa.array(past.times),
        USER_HASH: pa.array(users),
        "label": pa.array(label),
        "intensity_label": pa.array(intensity),
        "intensity_value": _intensity_values(events, spec),
        "sample_weight": pa.array(weight.astype(np.float32)),
    }
    of_past = {feature.name: feature for feature in spec.past_features}
    for entry in spec.raw_inputs:
        feature = of_past.get(entry.name)
        columns[entry.name] = _from_past(feature, past, events, spec) if feature else events.column(entry.name)
    return pa.table(columns)


def _from_past(feature: FromPastEvents, past: SortedEvents, events: pa.Table, spec: FeatureSpec) -> pa.Array:
    where, column = feature.where_comparison, feature.event_column(spec.feature)
    holds = evaluate_comparison(where, events) > 0 if where else np.ones(len(events), bool)
    return past_values(past, events.column(column) if column else None, holds, feature)


def _intensity_values(events: pa.Table, spec: FeatureSpec) -> pa.Array:
    """float32, NaN where the event has none or the spec declares none."""
    if spec.intensity_value is None:
        return pa.array(np.full(len(events), np.nan, np.float32))
    values = pc.fill_null(events.column(spec.intensity_value).cast(pa.float64()), float("nan"))
    return pa.array(values.to_numpy().astype(np.float32))
