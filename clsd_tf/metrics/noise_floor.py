"""The click noise floor: a rough sign of how many clicks of a user group are accidents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray

_LOWEST_SHARE = 0.05


def click_noise_floor(
    scores: Array, groups: Mapping[str, tuple[Array, Sequence[str]]], *, share: float = _LOWEST_SHARE
) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean score of the ``share`` of impressions with the lowest scores: a rough sign of accidental clicks.

    If a click is genuine with probability eta(x), or else accidental with a rate eps_g that depends on the user group
    alone, then ctr(x) = 1 - (1 - eta(x)) * (1 - eps_g) = eps_g + (1 - eps_g) * eta(x) >= eps_g, with equality where
    interest vanishes. So the lowest scores of a group bound eps_g from above, the closer the more impressions nobody
    wants. This holds for a teacher that knows ctr: the noise of one that does not pulls the lowest scores down. In
    docs/study.md a factorisation's floors lie 15 to 40 % below most of the simulation's rates, and above that of the
    group with the highest genuine interest: compare groups of like click rates.

    Args:
      scores: teacher scores of all impressions, clicked or not, [num_rows], in [0, 1].
      groups: user group -> (ids [num_rows], label of each id); a label without rows is left out.
      share: of the impressions of each group, rounded up to whole rows, in (0, 1].

    Returns:
      User group -> label -> ``num_rows`` and ``floor``, ready for JSON.

    Raises:
      ValueError: share outside (0, 1], or scores that are not finite.
    """
    return {
        name: {
            label: {"num_rows": int(np.sum(ids == index)), "floor": mean_of_lowest(scores[ids == index], share)}
            for index, label in enumerate(labels)
            if np.any(ids == index)
        }
        for name, (ids, labels) in groups.items()
    }


def mean_of_lowest(scores: Array, share: float = _LOWEST_SHARE) -> float:
    """Averages the lowest ceil(share * num_rows) scores: the floor of one user group.

    Args:
      scores: finite, [num_rows], num_rows >= 1.
      share: in (0, 1].

    Returns:
      Their mean, in the unit of ``scores``.

    Raises:
      ValueError: share outside (0, 1], or scores that are not finite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]. Received: {share}")
    scores = np.asarray(scores, np.float64)
    num_wrong = np.count_nonzero(~np.isfinite(scores))
    if num_wrong:
        raise ValueError(f"scores must be finite. Received: {num_wrong} that are not. Leave out rows without a score")
    return float(np.sort(scores)[: int(np.ceil(share * len(scores)))].mean())
