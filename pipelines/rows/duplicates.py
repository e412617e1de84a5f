"""Events that a log holds more than once: those of one user, item and time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from clsd_tf.data.hashing import hash_keys
from clsd_tf.spec.feature_spec import FeatureSpec
from pipelines.rows.joins import USER_HASH, microseconds
from pipelines.sources import ROW_ID


def without_duplicates(events: pa.Table, spec: FeatureSpec) -> tuple[pa.Table, Counter]:
    """Applies the spec's rule for duplicates to all events of some users.

    Args:
      events: parsed log rows with ``user_hash``.
      spec: ``duplicates`` is the rule.

    Returns:
      The rows that stay; and counts: ``duplicates`` found, ``duplicates_dropped`` of them, and where the rule is
      ``fail``, ``log/duplicates/<row id>/<row id>`` of the first pair.
    """
    first_row_ids = _first_row_ids(events, spec)
    row_ids = events.column(ROW_ID).to_numpy()
    repeated = np.flatnonzero(first_row_ids != row_ids)
    counts: Counter[str] = Counter()
    if not len(repeated):
        return events, counts
    counts["duplicates"] = len(repeated)
    if spec.duplicates == "fail":
        first = repeated[np.argmin(row_ids[repeated])]
        counts[f"log/duplicates/{first_row_ids[first]}/{row_ids[first]}"] = len(repeated)
    if spec.duplicates != "keep_first":
        return events, counts
    counts["duplicates_dropped"] = len(repeated)
    return events.filter(pa.array(first_row_ids == row_ids)), counts


def _first_row_ids(events: pa.Table, spec: FeatureSpec) -> np.ndarray:
    """Lowest row id among the events of the same user, item and time, [num_events]."""
    times = microseconds(events.column(spec.event_time.column), spec.event_time)
    keys = (hash_keys(events.column(spec.item_key)), times, events.column(USER_HASH).to_numpy())
    row_ids = events.column(ROW_ID).to_numpy()
    order = np.lexsort((row_ids, *keys))
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    first = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))
    found = np.empty_like(row_ids)
    found[order] = row_ids[order][first]
    return found
