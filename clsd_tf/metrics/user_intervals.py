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
from clsd_tf.metrics.scored_rows import ScoredRows
from clsd_tf.metrics.table import METRICS
from clsd_tf.metrics.user_errors import auc_difference_error, gauc_difference_error, influence_error

Array = np.ndarray

CONFIDENCE = 0.95


def user_intervals(rows: ScoredRows, values: Mapping[str, float | None]) -> dict[str, tuple[float, float] | None]:
    """Computes the 95 % intervals of metrics, cut off where a metric cannot be.

    Args:
      rows: that were measured.
      values: metric -> value on the rows.

    Returns:
      Metric -> (low, high), where ``values`` has it, of ``click_rate``, ``auc``, ``gauc``, ``log_loss``,
      ``normalized_entropy``, ``pcoc``, ``intensity_auc`` and ``intensity_auc_among_clicks``; None where the metric is
      not defined or there are fewer than two users.
    """
    num_users = _num_users(rows)
    return {
        name: _interval(name, values[name], error, num_users[name])
        for name, error in _errors(rows).items()
        if name in values
    }


def _interval(name: str, value: float | None, error: float | None, num_users: int) -> tuple[float, float] | None:
    if value is None or error is None:
        return None
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, num_users - 1)) * error
    return max(value - margin, 0.0), min(value + margin, METRICS[name].at_most)


def _num_users(rows: ScoredRows) -> Mapping[str, int]:
    """Metric -> number of users that enter it."""
    _, aucs, _ = auc_by_user(rows.label, rows.ctr, rows.user_hash, rows.sample_weight)
    return collections.defaultdict(
        lambda: len(np.unique(rows.user_hash)),
        gauc=int(np.isfinite(aucs).sum()),
        intensity_auc_among_clicks=len(np.unique(rows.clicks().user_hash)),
    )


def _errors(rows: ScoredRows) -> dict[str, float | None]:
    found = {
        **_ratio_errors(rows.label, rows.ctr, rows.user_hash, rows.sample_weight),
        "auc": _auc_error(rows),
        "gauc": gauc_difference_error(
            rows.label, rows.ctr[np.newaxis], _no_ranking(rows.ctr), rows.user_hash, rows.sample_weight
        ),
        "intensity_auc": None,
        "intensity_auc_among_clicks": None,
    }
    if rows.has("intensity_label"):
        found["intensity_auc"] = _auc_error(rows.judged_by("intensity_label"))
        found["intensity_auc_among_clicks"] = _auc_error(rows.clicks().judged_by("intensity_label"))
    return found


def _auc_error(rows: ScoredRows) -> float | None:
    scores = rows.ctr[np.newaxis]
    return auc_difference_error(rows.label, scores, _no_ranking(rows.ctr), rows.user_hash, rows.sample_weight)


def _no_ranking(scores: Array) -> Array:
    """Scores by which every user's AUC is 0.5 without error: the difference to it has the error of AUC itself."""
    return np.zeros([1, len(scores)])


def _ratio_errors(label: Array, ctr: Array, users: Array, weight: Array) -> dict[str, float | None]:
    """Of the metrics that are functions of sums over users."""
    user_of = np.unique(users, return_inverse=True)[1]

    def by_user(values: Array) -> Array:
        return np.bincount(user_of, np.asarray(values, np.float64) * weight)

    mass, clicks, predicted = by_user(np.ones(len(label))), by_user(label), by_user(ctr)
    losses = by_user(_row_losses(label, ctr))

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


def _row_losses(label: Array, ctr: Array) -> Array:
    ctr = np.clip(np.asarray(ctr, np.float64), 1e-7, 1 - 1e-7)
    return -(label * np.log(ctr) + (1 - label) * np.log1p(-ctr))
