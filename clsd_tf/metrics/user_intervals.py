"""Intervals of the metrics of one model: how far the luck of the split's users could have moved them.

Users are taken for drawn at random, with all their impressions, and the model for given. A metric is a smooth function
of sums over users, so that its error follows from each user's influence on it:

error^2 = num_users / (num_users - 1) * sum_u influence_u^2
interval = value -+ t quantile (num_users - 1 degrees of freedom) * error

with the users that enter the metric: of gauc those with both labels, among clicks those who clicked, else all.

The influence on a ratio of sums R = sum_u a_u / sum_u b_u is (a_u - R * b_u) / sum_u b_u. Resampling whole users gives
much the same and takes a sort for each resample, here it is one.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np
from scipy import stats

from clsd_tf.metrics.pointwise import auc_by_user
from clsd_tf.metrics.user_errors import auc_difference_error, gauc_difference_error, influence_error

Array = np.ndarray

CONFIDENCE = 0.95
_AT_MOST_1 = ("click_rate", "auc", "gauc", "intensity_auc", "intensity_auc_among_clicks")


def user_intervals(columns: Mapping[str, Array | None], values: Mapping[str, float | None]) -> dict[str, list | None]:
    """Metric -> [low, high] at 95 %, cut off where the metric cannot be.

    Args:
      columns: as ``clsd_tf.evaluation.evaluate.measure`` takes them.
      values: the metrics that it gives.

    Returns:
      Of ``click_rate``, ``auc``, ``gauc``, ``log_loss``, ``normalized_entropy``, ``pcoc``, ``intensity_auc`` and
      ``intensity_auc_among_clicks``; None where the metric is not defined or there are fewer than two users.
    """
    num_users = _num_users(columns)
    return {
        name: None if error is None or values[name] is None else _interval(name, values[name], error, num_users[name])
        for name, error in _errors(columns).items()
    }


def _interval(name: str, value: float, error: float, num_users: int) -> list[float]:
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, num_users - 1)) * error
    high = value + margin
    return [max(value - margin, 0.0), min(high, 1.0) if name in _AT_MOST_1 else high]


def _num_users(columns: Mapping[str, Array | None]) -> Mapping[str, int]:
    """Metric -> number of users that enter it."""
    label, users = columns["label"], columns["user_hash"]
    _, aucs, _ = auc_by_user(label, columns["pctr"], users, columns["sample_weight"])
    return collections.defaultdict(
        lambda: len(np.unique(users)),
        gauc=int(np.isfinite(aucs).sum()),
        intensity_auc_among_clicks=len(np.unique(users[label > 0.5])),
    )


def _errors(columns: Mapping[str, Array | None]) -> dict[str, float | None]:
    label, pctr, users, weight = (columns[name] for name in ("label", "pctr", "user_hash", "sample_weight"))
    intensity, clicked = columns["intensity_label"], label > 0.5
    found = {
        **_ratio_errors(label, pctr, users, weight),
        "auc": _auc_error(label, pctr, users, weight),
        "gauc": gauc_difference_error(label, pctr[np.newaxis], _no_ranking(pctr), users, weight),
        "intensity_auc": None,
        "intensity_auc_among_clicks": None,
    }
    if intensity is not None:
        found["intensity_auc"] = _auc_error(intensity, pctr, users, weight)
        among = (intensity[clicked], pctr[clicked], users[clicked], weight[clicked])
        found["intensity_auc_among_clicks"] = _auc_error(*among)
    return found


def _auc_error(label: Array, scores: Array, users: Array, weight: Array) -> float | None:
    return auc_difference_error(label, scores[np.newaxis], _no_ranking(scores), users, weight)


def _no_ranking(scores: Array) -> Array:
    """Scores by which every user's AUC is 0.5 without error: the difference to it has the error of AUC itself."""
    return np.zeros([1, len(scores)])


def _ratio_errors(label: Array, pctr: Array, users: Array, weight: Array) -> dict[str, float | None]:
    """Of the metrics that are functions of sums over users."""
    user_of = np.unique(users, return_inverse=True)[1]

    def by_user(values: Array) -> Array:
        return np.bincount(user_of, np.asarray(values, np.float64) * weight)

    mass, clicks, predicted = by_user(np.ones(len(label))), by_user(label), by_user(pctr)
    losses = by_user(_row_losses(label, pctr))

    def influence(above: Array, below: Array) -> Array:
        return (above - above.sum() / below.sum() * below) / below.sum()

    found: dict[str, Array | None] = dict.fromkeys(("normalized_entropy", "pcoc"))
    found["click_rate"], found["log_loss"] = influence(clicks, mass), influence(losses, mass)
    if clicks.sum() > 0:
        found["pcoc"] = influence(predicted, clicks)
    rate = clicks.sum() / mass.sum()
    if 0 < rate < 1:  # NE = log_loss / H(rate), with H' = log((1 - rate) / rate).
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        value, slope = losses.sum() / mass.sum() / entropy, np.log1p(-rate) - np.log(rate)
        found["normalized_entropy"] = (found["log_loss"] - value * slope * found["click_rate"]) / entropy
    return {name: None if values is None else influence_error(values) for name, values in found.items()}


def _row_losses(label: Array, pctr: Array) -> Array:
    pctr = np.clip(np.asarray(pctr, np.float64), 1e-7, 1 - 1e-7)
    return -(label * np.log(pctr) + (1 - label) * np.log1p(-pctr))
