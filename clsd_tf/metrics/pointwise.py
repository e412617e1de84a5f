"""Exact offline metrics in NumPy, float64. Weights are the rows' sample weights."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def auc(labels: Array, scores: Array, weights: Array | None = None) -> float | None:
    """Area under the ROC curve: P(score of a click > score of a non-click) + P(tie) / 2, exact.

    Args:
      labels: 0/1, [num_rows].
      scores: any ranking, [num_rows].
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      In [0, 1], or None when there are no clicks or no non-clicks.
    """
    weights = _weights(weights, labels)
    order = np.argsort(scores, kind="stable")
    scores, labels, weights = np.asarray(scores)[order], np.asarray(labels, np.float64)[order], weights[order]
    starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1])[: len(scores)])  # First row of each tie.
    if not len(starts):
        return None
    clicks = np.add.reduceat(weights * labels, starts)
    others = np.add.reduceat(weights * (1 - labels), starts)
    pairs = clicks.sum() * others.sum()
    if pairs == 0:
        return None
    others_below = np.cumsum(others) - others
    return float((clicks * (others_below + others / 2)).sum() / pairs)


def auc_by_user(labels: Array, scores: Array, users: Array, weights: Array | None = None) -> tuple[Array, Array, Array]:
    """AUC within each user, exact, all users at once.

    Args:
      labels: 0/1, [num_rows].
      scores: any ranking, [num_rows].
      users: whose row it is, [num_rows].
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      (users, ascending; AUC of each, NaN where all labels are equal; impressions of each, as sums of weights), each
      [num_users].
    """
    weights = _weights(weights, labels)
    order = np.lexsort((scores, users))
    labels, scores, users, weights = (np.asarray(x)[order] for x in (labels, scores, users, weights))
    is_first = np.append(True, users[1:] != users[:-1])[: len(users)]
    is_new_score = is_first | np.append(True, scores[1:] != scores[:-1])[: len(users)]
    ties, firsts = np.flatnonzero(is_new_score), np.flatnonzero(is_first)  # First row of each tie, and of each user.
    if not len(users):
        return users, np.array([]), np.array([])
    clicks = np.add.reduceat(weights * labels, ties)
    others = np.add.reduceat(weights * (1.0 - labels), ties)
    first_ties = np.searchsorted(ties, firsts)
    others_below = np.cumsum(others) - others
    user_of_tie = np.cumsum(is_first[ties]) - 1
    others_below -= others_below[first_ties][user_of_tie]
    in_order = np.add.reduceat(clicks * (others_below + others / 2), first_ties)
    pairs = np.add.reduceat(clicks, first_ties) * np.add.reduceat(others, first_ties)
    aucs = np.divide(in_order, pairs, out=np.full(len(firsts), np.nan), where=pairs > 0)
    return users[firsts], aucs, np.add.reduceat(weights, firsts)


def gauc(labels: Array, scores: Array, users: Array, weights: Array | None = None) -> tuple[float | None, float]:
    """AUC within each user, averaged by the user's number of impressions (sum of weights).

    Users whose labels are all equal have no AUC and are left out. This is FuxiCTR's definition; others average users
    equally or by clicks.

    Args:
      labels: 0/1, [num_rows].
      scores: any ranking, [num_rows].
      users: whose row it is, [num_rows].
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      (gauc or None if no user has both labels, share of impressions that entered).
    """
    _, aucs, impressions = auc_by_user(labels, scores, users, weights)
    known = np.isfinite(aucs)
    if not known.any():
        return None, 0.0
    entered = impressions[known]
    return float(np.average(aucs[known], weights=entered)), float(entered.sum() / impressions.sum())


def mean(values: Array, weights: Array) -> float:
    """Weighted mean: sum_i weights_i * values_i / sum_i weights_i.

    Args:
      values: [num_rows].
      weights: >= 0, not all 0, [num_rows].

    Returns:
      Between the smallest and the largest value.
    """
    return float(np.average(values, weights=weights))


def log_loss(labels: Array, ctr: Array, weights: Array | None = None) -> float:
    """Weighted mean of -labels * log(ctr) - (1 - labels) * log(1 - ctr); ctr clipped to [1e-7, 1 - 1e-7].

    Args:
      labels: 0/1, [num_rows].
      ctr: in [0, 1], [num_rows].
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      In nats, >= 0.
    """
    weights = _weights(weights, labels)
    ctr = np.clip(np.asarray(ctr, np.float64), 1e-7, 1 - 1e-7)
    losses = -(labels * np.log(ctr) + (1 - np.asarray(labels)) * np.log1p(-ctr))
    return float(np.average(losses, weights=weights))


def normalized_entropy(labels: Array, ctr: Array, weights: Array | None = None) -> float | None:
    """Log loss relative to that of the click rate r: log_loss / -(r * log(r) + (1 - r) * log(1 - r)).

    Args:
      labels: 0/1, [num_rows].
      ctr: in [0, 1], [num_rows].
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      Below 1 for predictions that beat the constant r; None when r is 0 or 1.

    Source: He et al. (2014), "Practical Lessons from Predicting Clicks on Ads at Facebook", section 2.
    """
    rate = np.average(labels, weights=_weights(weights, labels))
    if rate in (0.0, 1.0):
        return None
    return log_loss(labels, ctr, weights) / float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def pcoc(labels: Array, ctr: Array, weights: Array | None = None) -> float | None:
    """Predicted clicks over clicks: mean ctr / click rate.

    Args:
      labels: 0/1, [num_rows].
      ctr: in [0, 1], [num_rows].
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      1 for calibrated predictions, above 1 for too high ones; None without clicks.
    """
    weights = _weights(weights, labels)
    rate = np.average(labels, weights=weights)
    return float(np.average(np.asarray(ctr, np.float64), weights=weights) / rate) if rate else None


def calibration_bins(
    labels: Array, ctr: Array, weights: Array | None = None, num_bins: int = 20
) -> list[dict[str, float]]:
    """Sorts rows by ctr and cuts them into bins of equal mass.

    Args:
      labels: 0/1, [num_rows].
      ctr: in [0, 1], [num_rows].
      weights: >= 0, [num_rows]; 1 by default.
      num_bins: >= 1.

    Returns:
      Per non-empty bin: mean ``ctr``, ``click_rate`` and ``weight``.
    """
    weights = _weights(weights, labels)
    order = np.argsort(ctr, kind="stable")
    order = order[weights[order] > 0]
    labels, ctr, weights = np.asarray(labels)[order], np.asarray(ctr, np.float64)[order], weights[order]
    middle = (np.cumsum(weights) - weights / 2) / weights.sum()  # Place of each row's mass in (0, 1).
    bins = np.minimum((middle * num_bins).astype(int), num_bins - 1)
    result = []
    for index in np.unique(bins):
        rows = bins == index
        result.append(
            {
                "ctr": float(np.average(ctr[rows], weights=weights[rows])),
                "click_rate": float(np.average(labels[rows], weights=weights[rows])),
                "weight": float(weights[rows].sum()),
            }
        )
    return result


def ece(labels: Array, ctr: Array, weights: Array | None = None, num_bins: int = 20) -> float:
    """Expected calibration error: mean over equal-mass bins, by weight, of |mean ctr - click rate|.

    Args:
      labels: 0/1, [num_rows].
      ctr: in [0, 1], [num_rows].
      weights: >= 0, [num_rows]; 1 by default.
      num_bins: >= 1.

    Returns:
      In [0, 1].
    """
    bins = calibration_bins(labels, ctr, weights, num_bins)
    total = sum(entry["weight"] for entry in bins)
    return sum(entry["weight"] * abs(entry["ctr"] - entry["click_rate"]) for entry in bins) / total


def _weights(weights: Array | None, like: Array) -> Array:
    return np.ones(len(like)) if weights is None else np.asarray(weights, np.float64)
