"""Errors over users: how far the luck of the test split's users could move a difference between methods.

Paired seeds share the rows they are measured on, so that their spread says nothing about other users. The standard
errors here take users for drawn at random, with all their impressions, and the models for given.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from clsd_tf.metrics.pointwise import auc_by_user

Array = np.ndarray


def auc_difference_error(
    labels: Array, treatment: Array, baseline: Array, users: Array, weights: Array | None = None
) -> float | None:
    """Standard error over users of the mean over seeds of AUC(treatment) - AUC(baseline).

    AUC is the mean over clicks of placement = share of non-clicks that score lower, and likewise over non-clicks. With
    d the difference of a row's placements (treatment - baseline, mean over seeds) and difference the mean of d,

    influence_u = sum over clicks of u of weight * (d - difference) / weight of all clicks, plus the same of non-clicks
    error^2 = num_users / (num_users - 1) * sum_u influence_u^2

    Args:
      labels: 0/1, [num_rows].
      treatment: scores by which the treated models rank, [num_seeds, num_rows].
      baseline: [num_seeds, num_rows].
      users: whose row it is, [num_rows].
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      None with fewer than two users, or without clicks or non-clicks.

    Source: Obuchowski (1997), "Nonparametric analysis of clustered ROC curve data", Biometrics 53.
    """
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    clicked = np.asarray(labels) > 0.5
    mass = np.where(clicked, weights[clicked].sum(), weights[~clicked].sum())
    if not (mass > 0).all() or clicked.all() or not clicked.any():
        return None
    change = np.mean(
        [
            _placements(clicked, one, weights) - _placements(clicked, other, weights)
            for one, other in zip(treatment, baseline, strict=True)
        ],
        axis=0,
    )
    difference = np.average(change[clicked], weights=weights[clicked])
    return influence_error(
        np.bincount(np.unique(users, return_inverse=True)[1], weights * (change - difference) / mass)
    )


def gauc_difference_error(
    labels: Array, treatment: Array, baseline: Array, users: Array, weights: Array | None = None
) -> float | None:
    """Standard error over users of the mean over seeds of GAUC(treatment) - GAUC(baseline).

    influence_u = impressions_u * (d_u - difference) / impressions, with d_u the difference of the user's own AUC.

    Args:
      labels: 0/1, [num_rows].
      treatment: scores by which the treated models rank, [num_seeds, num_rows].
      baseline: [num_seeds, num_rows].
      users: whose row it is, [num_rows]; those whose labels are all equal do not enter.
      weights: >= 0, [num_rows]; 1 by default.

    Returns:
      None with fewer than two users that enter.
    """
    change = []
    for one, other in zip(treatment, baseline, strict=True):
        _, one_aucs, impressions = auc_by_user(labels, one, users, weights)
        change.append(one_aucs - auc_by_user(labels, other, users, weights)[1])
    known = np.isfinite(change[0])
    if not known.any():
        return None
    change, impressions = np.mean(change, axis=0)[known], impressions[known]
    difference = np.average(change, weights=impressions)
    return influence_error(impressions * (change - difference) / impressions.sum())


def difference_errors(columns: Mapping[str, Array], treatment: Array, baseline: Array) -> dict[str, float]:
    """Computes the errors over users of the metrics that studies test.

    Args:
      columns: ``label``, ``user_hash``, ``sample_weight`` and, where declared, ``intensity_label``, [num_rows] each.
      treatment: scores by which the treated models rank, [num_seeds, num_rows].
      baseline: [num_seeds, num_rows].

    Returns:
      Metric -> standard error of its difference, where that is defined.
    """
    label, users, weights = columns["label"], columns["user_hash"], columns["sample_weight"]
    found = {
        "auc": auc_difference_error(label, treatment, baseline, users, weights),
        "gauc": gauc_difference_error(label, treatment, baseline, users, weights),
    }
    if "intensity_label" in columns:
        intensity, clicked = columns["intensity_label"], label > 0.5
        found["intensity_auc"] = auc_difference_error(intensity, treatment, baseline, users, weights)
        among = (intensity[clicked], treatment[:, clicked], baseline[:, clicked], users[clicked], weights[clicked])
        found["intensity_auc_among_clicks"] = auc_difference_error(*among)
    return {metric: error for metric, error in found.items() if error is not None}


def _placements(clicked: Array, scores: Array, weights: Array) -> Array:
    """Of each click the share of non-clicks that score lower, of each non-click the share of clicks that score higher.

    Ties count half; shares are of weight. [num_rows]
    """
    scores = np.asarray(scores, np.float64)
    result = np.empty(len(scores))
    for rows, sign in ((clicked, 1.0), (~clicked, -1.0)):
        others, other_weights = sign * scores[~rows], weights[~rows]
        order = np.argsort(others, kind="stable")
        mass = np.append(0.0, np.cumsum(other_weights[order]))
        others, own = others[order], sign * scores[rows]
        below = mass[np.searchsorted(others, own, "left")] + mass[np.searchsorted(others, own, "right")]
        result[rows] = below / (2 * mass[-1])
    return result


def influence_error(influence: Array) -> float | None:
    """Standard error over users: sqrt(num_users / (num_users - 1) * sum_u influence_u^2).

    Args:
      influence: how far each user moves the estimate, [num_users].

    Returns:
      None with fewer than two users.
    """
    count = len(influence)
    return float(np.sqrt(count / (count - 1) * np.sum(influence**2))) if count > 1 else None
