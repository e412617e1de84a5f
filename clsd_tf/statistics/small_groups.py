"""User groups of few users say too much of each: in reports they are merged into "other"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clsd_tf.spec.model_inputs import OTHER_GROUP
from clsd_tf.statistics.sketches import DistinctSketch

MIN_GROUP_USERS = 20


def merged_labels(
    labels: Sequence[str], users: Sequence[DistinctSketch], min_users: int = MIN_GROUP_USERS
) -> list[str]:
    """Chooses the label under which each user group is reported: its own, or "other".

    Groups of fewer than ``min_users`` distinct users become "other" and, while that has too few users itself, the next
    smallest groups too. A group without users keeps its label.

    Args:
      labels: of the groups, distinct; one may be "other".
      users: the users of each group.
      min_users: >= 1. With 1, nothing is merged.

    Returns:
      A label for each group.
    """
    num_users = [sketch.estimate for sketch in users]
    present = [index for index, count in enumerate(num_users) if count]
    other: DistinctSketch | None = None
    merged = set()
    for index in sorted(present, key=lambda index: (labels[index] != OTHER_GROUP, num_users[index])):
        needs_more = other is not None and other.estimate < min_users
        if labels[index] != OTHER_GROUP and num_users[index] >= min_users and not needs_more:
            break
        other = users[index].merge(other) if other else users[index]
        merged.add(index)
    return [OTHER_GROUP if index in merged else label for index, label in enumerate(labels)]


def merge_small_groups(
    ids: np.ndarray, labels: Sequence[str], user_hashes: np.ndarray, min_users: int = MIN_GROUP_USERS
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Makes user-group ids and labels such that reports may show them.

    Args:
      ids: of each row, int [num_rows], in [0, len(labels)).
      labels: of each id.
      user_hashes: of each row, int64 [num_rows].
      min_users: see ``merged_labels``.

    Returns:
      (ids [num_rows], labels), with "other" as the last label where groups were merged into a new one.
    """
    users = [DistinctSketch.of_hashes(user_hashes[ids == index]) for index in range(len(labels))]
    merged = merged_labels(labels, users, min_users)
    shown = tuple(dict.fromkeys([*labels, *merged]))
    new_ids = np.array([shown.index(label) for label in merged])
    return new_ids[ids], shown
