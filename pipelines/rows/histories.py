"""Histories and window aggregates of what a user did strictly before each event, as functions on Arrow columns.

Events are sorted by (user, time, row id). Every function cuts them by times alone, so events of one user at the same
time never see each other. A result depends on the user's own events only, never on who else is in the table.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa

from clsd_tf.spec.past_features import FromPastEvents, HistoryFeature, WindowFeature

_MICROSECONDS = 1_000_000


class SortedEvents:
    """The users and times of events that are sorted by both.

    Args:
      users: user of each event, [num_events].
      times: microseconds, [num_events].
    """

    def __init__(self, users: np.ndarray, times: np.ndarray):
        self.times = times
        self._distinct_times, ranks = np.unique(times, return_inverse=True)
        new_user = np.append(True, users[1:] != users[:-1])[: len(users)]
        # (user, time) as one number that sorts like the pair; microseconds themselves would overflow.
        self._user_base = np.cumsum(new_user) * len(self._distinct_times)
        self._moments = self._user_base + ranks
        self._rows_before: dict[int, np.ndarray] = {}  # Features often share their spans.

    def rows_before(self, age: int) -> np.ndarray:
        """Finds, for each event, the user's first event that is not too old.

        Args:
          age: microseconds that it may be old.

        Returns:
          How many rows stand before it, int64 [num_events].
        """
        if age not in self._rows_before:
            ranks = np.searchsorted(self._distinct_times, self.times - age)
            self._rows_before[age] = np.searchsorted(self._moments, self._user_base + ranks)
        return self._rows_before[age]

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """The row at which the user's events begin, [num_events]."""
        return np.searchsorted(self._moments, self._user_base)


@dataclasses.dataclass(frozen=True)
class PastEvents:
    """For event i the user's past events that count: ``rows[start[i]:end[i]]``, oldest first."""

    rows: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @classmethod
    def select(cls, events: SortedEvents, counts: np.ndarray, feature: FromPastEvents) -> PastEvents:
        """Selects the events in [time - within_seconds, time - delay_seconds) for which a mask is true.

        Args:
          events: users and times.
          counts: the mask, bool [num_events].
          feature: the span.
        """
        counted_before = np.append(0, np.cumsum(counts))
        start, end = events.first_rows, events.rows_before(round(feature.delay_seconds * _MICROSECONDS))
        if feature.within_seconds is not None:
            start = events.rows_before(round(feature.within_seconds * _MICROSECONDS))
        return cls(np.flatnonzero(counts), counted_before[start], counted_before[end])

    @property
    def sizes(self) -> np.ndarray:
        """Past events that count of each event, [num_events]."""
        return self.end - self.start


def past_values(
    events: SortedEvents, values: pa.ChunkedArray | None, holds: np.ndarray, feature: FromPastEvents
) -> pa.Array:
    """Computes a feature of past events.

    Args:
      events: users and times.
      values: the column of ``feature.event_column``, [num_events]; None where it names none.
      holds: where ``feature.where`` holds, bool [num_events].
      feature: what is made of which past events.

    Returns:
      Its value for each event, [num_events].

    Raises:
      TypeError: there is no case for this kind of feature.
    """
    match feature:
        case HistoryFeature():
            assert values is not None, "of a column"
            return user_histories(events, values.cast(pa.string()), holds, feature)
        case WindowFeature():
            return window_values(events, values, holds, feature)
        case _:
            raise TypeError(f"each kind of feature must have its case here. Received: {type(feature).__name__}")


def user_histories(
    events: SortedEvents, values: pa.ChunkedArray, counts: np.ndarray, feature: HistoryFeature
) -> pa.ListArray:
    """Collects the user's last values before each event.

    Args:
      events: users and times.
      values: what the history is made of, strings [num_events]; nulls are left out.
      counts: where ``feature.where`` holds, bool [num_events].
      feature: says how many values to keep, and how old and how new they may be.

    Returns:
      list<string> [num_events], oldest first.
    """
    past = PastEvents.select(events, counts & values.is_valid().to_numpy(), feature)
    start = np.maximum(past.start, past.end - feature.max_length)
    offsets = np.append(0, np.cumsum(past.end - start))
    # Positions start[i] .. end[i]-1 for each event i, one after the other.
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, past.end - start)
    flat = values.take(pa.array(past.rows[positions])).combine_chunks()
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


def window_values(
    events: SortedEvents, values: pa.ChunkedArray | None, holds: np.ndarray, feature: WindowFeature
) -> pa.Array:
    """Aggregates the user's past events.

    Args:
      events: users and times.
      values: what a mean is of, numbers [num_events].
      holds: where ``feature.where`` holds, bool [num_events].
      feature: the aggregate and its window.

    Returns:
      float64 [num_events], null where the aggregate has no value.
    """
    every = np.ones_like(holds)
    match feature.aggregate:
        case "count":
            return pa.array(PastEvents.select(events, holds, feature).sizes.astype(np.float64))
        case "rate":
            past = PastEvents.select(events, every, feature)
            return _mean(PastEvents.select(events, holds, feature).sizes, past.sizes, feature.min_count)
        case "mean":
            assert values is not None, "of a column"
            past = PastEvents.select(events, holds & values.is_valid().to_numpy(), feature)
            numbers = values.cast(pa.float64()).to_numpy()[past.rows]
            return _mean(_sums(numbers, past), past.sizes, feature.min_count)
        case "seconds_since_last":
            past = PastEvents.select(events, holds, feature)
            last = np.append(past.rows, 0)[past.end - 1]
            seconds = (events.times - events.times[last]) / _MICROSECONDS
            return pa.array(seconds, mask=past.sizes == 0)


def _mean(sums: np.ndarray, sizes: np.ndarray, min_count: int) -> pa.Array:
    return pa.array(sums / np.maximum(sizes, 1), mask=sizes < min_count)


def _sums(numbers: np.ndarray, past: PastEvents) -> np.ndarray:
    """The sum over each window, exact to its own rounding: differences of running sums would carry other users' too."""
    bounds = np.stack([past.start, past.end], axis=1).ravel()  # reduceat sums from each bound to the next.
    sums = np.add.reduceat(np.append(numbers, 0.0), bounds)[::2] if len(bounds) else np.zeros(0)
    return np.where(past.sizes > 0, sums, 0.0)
