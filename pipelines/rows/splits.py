"""Splits: rules by which a row is of train, validation or test."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from clsd_tf.data.hashing import mix_row_ids
from clsd_tf.spec.tables import Split
from clsd_tf.statistics.sketches import Histogram
from clsd_tf.storage.dataset_dir import SPLITS

_LEFT_OUT = 3  # Behind the indices of train, validation and test.


def split_cut_offs(split: Split, histogram: Histogram) -> list[int]:
    """Finds where the time rule cuts.

    Args:
      split: dates, or fractions.
      histogram: of all event times in microseconds.

    Returns:
      Event times in microseconds at which validation and test begin, and at which rows are left out again, if any.
    """
    if split.validation_from is not None:
        moments = [split.validation_from, split.test_from, split.until]
        return [_microseconds(moment) for moment in moments if moment is not None]
    return histogram.cut_offs([split.train, split.train + split.validation])


def _microseconds(moment: dt.datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def expected_rows(split: Split, cut_offs: Sequence[int], histogram: Histogram) -> dict[str, int]:
    """Estimates the size of each split, which its number of shards comes from.

    Args:
      split: the rule.
      cut_offs: of the time rule, see ``split_cut_offs``.
      histogram: of all event times in microseconds.

    Returns:
      Split -> about how many rows it will have.
    """
    if split.rule != "time":
        return {name: round(getattr(split, name) * histogram.count) for name in SPLITS}
    ends = np.array([*cut_offs, np.iinfo(np.int64).max][: len(SPLITS)])
    before = np.rint(histogram.share_up_to(ends - 1) * histogram.count).astype(int)
    return dict(zip(SPLITS, np.diff(before, prepend=0).tolist(), strict=True))


def split_indices(split: Split, cut_offs: Sequence[int], table: pa.Table) -> np.ndarray:
    """Finds the split of each row.

    Args:
      split: the rule.
      cut_offs: of the time rule, see ``split_cut_offs``.
      table: ``row_id``, ``event_time`` and ``user_hash`` of every event of some users, sorted by user, time and row id.

    Returns:
      [num_rows]: 0 train, 1 validation, 2 test, 3 left out.
    """
    match split.rule:
        case "time":
            return _by_time(split, np.array(cut_offs, np.int64), table.column("event_time").to_numpy())
        case "user":
            return _by_hash(split, table.column("user_hash").to_numpy())
        case "last_n_per_user":
            return _last_events(split, table.column("user_hash").to_numpy())
        case "random":
            return _by_hash(split, table.column("row_id").to_numpy())


def _by_time(split: Split, cut_offs: np.ndarray, times: np.ndarray) -> np.ndarray:
    indices = np.searchsorted(cut_offs, times, side="right")
    gap = round(split.gap_days * 86_400_000_000)
    for later, begin in enumerate(cut_offs[:2], start=1):  # Validation and test.
        indices[(indices < later) & (times >= begin - gap)] = _LEFT_OUT
    return indices


def _by_hash(split: Split, keys: np.ndarray) -> np.ndarray:
    uniform = mix_row_ids(keys, split.seed) / 2.0**64
    return np.searchsorted([split.train, split.train + split.validation], uniform, side="right")


def _last_events(split: Split, users: np.ndarray) -> np.ndarray:
    _, user, sizes = np.unique(users, return_inverse=True, return_counts=True)
    from_end = np.cumsum(sizes)[user] - np.arange(len(users))  # 1 for a user's last event.
    indices = np.where(from_end <= split.test_events, 2, 1)
    held_out = split.test_events + split.validation_events
    return np.where((from_end > held_out) | (sizes[user] <= held_out), 0, indices)
