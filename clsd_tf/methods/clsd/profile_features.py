"""Profile features for AdGate: those by which users differ in how much their clicks can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from clsd_tf.metrics.significance import holm

Array = np.ndarray

_MAX_BINS = 10
_MIN_USERS = 10  # Of a level; rarer levels are pooled.
_ROUNDING = 1e-9  # Means of equal residuals differ by less.
_POOLED, _MISSING = -2, -1  # Levels beside the ids, which are >= 0.

# The columns of a table, in order: key, heading.
HEADLINES = (
    ("feature", "feature"),
    ("num_users", "users"),
    ("num_levels", "levels"),
    ("eta_squared", "eta squared"),
    ("omega_squared", "omega squared"),
    ("f_p_value", "p (F)"),
    ("alexander_govern_p_value", "p (Alexander-Govern)"),
    ("holm_p_value", "p (Holm)"),
)


def rank_features(residual: Array, users: Array, features: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Ranks user features by how much of the difference between users' residuals they explain.

    A user's clicks are not independent, so each user is one observation: the mean of the user's residuals. Users count
    alike, however many clicks they have. One-way analysis of variance over the levels of a feature, with n users in k
    levels:

    eta_squared = between / total, which grows with k by chance alone
    omega_squared = (between - (k - 1) * within / (n - k)) / (total + within / (n - k)), about 0 for no effect

    where between, within and total are sums of squares around the means.

    Args:
      residual: what AdGate fits on clicks, 1 - teacher score, [num_clicks].
      users: int, [num_clicks].
      features: name -> values [num_clicks]: ids >= 0 (integers), or numbers (floats, NaN where missing), which are cut
        into up to 10 bins of equal numbers of users. A user has the value of the user's first click. Levels of fewer
        than 10 users are pooled; if the pool is as small, its users are left out.

    Returns:
      One dict per feature, the largest omega_squared first, ready for JSON: ``feature``, ``num_users``,
      ``num_levels``, ``eta_squared``, ``omega_squared``, ``f_p_value`` (equal variances),
      ``alexander_govern_p_value`` (unequal ones; None if the users of a level are all alike) and ``holm_p_value`` (the
      latter, or the former where it is None, adjusted for the number of features). A feature of one level explains 0
      and has no p-value.

    Raises:
      ValueError: no clicks, columns of different lengths, or residuals that are not finite.

    Source: Hays (1963), "Statistics for Psychologists", for omega squared; Alexander and Govern (1994), "A new and
    simpler approximation for ANOVA under variance heterogeneity".
    """
    lengths = {"residual": len(residual), "users": len(users)} | {name: len(x) for name, x in features.items()}
    if len(set(lengths.values())) > 1 or not len(residual):
        raise ValueError(f"columns need equal lengths >= 1, one value a click. Received: {lengths}")
    if not np.isfinite(residual).all():
        raise ValueError(
            f"residuals must be finite. Received: {int((~np.isfinite(residual)).sum())} that are not. "
            "Leave out clicks without a score"
        )
    _, first_clicks, codes = np.unique(users, return_index=True, return_inverse=True)
    user_means = np.bincount(codes, np.asarray(residual, np.float64)) / np.bincount(codes)
    entries = [
        {"feature": name, **_explained(user_means, _levels(np.asarray(values)[first_clicks]))}
        for name, values in features.items()
    ]
    adjusted = holm([_best_p_value(entry) for entry in entries])
    for entry, p_value in zip(entries, adjusted, strict=True):
        entry["holm_p_value"] = p_value
    return sorted(entries, key=lambda entry: -entry["omega_squared"])


def _levels(values: Array) -> Array:
    """int [num_users]: the level of each user, with small levels pooled."""
    levels = _binned(values) if np.issubdtype(values.dtype, np.floating) else values.astype(np.int64)
    names, codes, counts = np.unique(levels, return_inverse=True, return_counts=True)
    return np.where(counts < _MIN_USERS, _POOLED, names)[codes]


def _binned(values: Array) -> Array:
    """Bins of equal numbers of users by mid-rank, so that ties stay together."""
    known = np.isfinite(values)
    place = (stats.rankdata(values[known]) - 0.5) / max(1, known.sum())  # In (0, 1).
    levels = np.full(len(values), _MISSING)
    levels[known] = (place * _MAX_BINS).astype(np.int64)
    return levels


def _explained(user_means: Array, levels: Array) -> dict[str, Any]:
    """Analysis of variance of ``user_means`` [num_users] over ``levels`` [num_users]."""
    samples = [user_means[levels == level] for level in np.unique(levels)]
    samples = [sample for sample in samples if len(sample) >= _MIN_USERS]
    num_users, num_levels = sum(map(len, samples)), len(samples)
    result: dict[str, Any] = {"num_users": num_users, "num_levels": num_levels}
    result |= {"eta_squared": 0.0, "omega_squared": 0.0, "f_p_value": None, "alexander_govern_p_value": None}
    if num_levels < 2 or np.ptp(user_means) <= _ROUNDING:
        return result
    grand_mean = np.concatenate(samples).mean()
    between = sum(len(sample) * (sample.mean() - grand_mean) ** 2 for sample in samples)
    within = sum(((sample - sample.mean()) ** 2).sum() for sample in samples)
    noise = within / (num_users - num_levels)
    result["eta_squared"] = float(between / (between + within))
    result["omega_squared"] = float((between - (num_levels - 1) * noise) / (between + within + noise))
    return result | _p_values(samples)


def _best_p_value(entry: Mapping[str, Any]) -> float | None:
    unequal = entry["alexander_govern_p_value"]
    return entry["f_p_value"] if unequal is None else unequal


def _p_values(samples: list[Array]) -> dict[str, float | None]:
    # A level whose users are all alike has no variance to test with.
    testable = all(np.ptp(sample) > _ROUNDING for sample in samples)
    return {
        "f_p_value": float(stats.f_oneway(*samples).pvalue),
        "alexander_govern_p_value": float(stats.alexandergovern(*samples).pvalue) if testable else None,
    }


def table_rows(ranking: list[dict[str, Any]]) -> list[list[Any]]:
    """Lays out a ranking as a table under ``HEADLINES``.

    Args:
      ranking: from ``rank_features``.

    Returns:
      A row for each feature; p-values with their order of magnitude.
    """
    return [
        [
            f"{entry[key]:.1e}" if key.endswith("p_value") and entry[key] is not None else entry[key]
            for key, _ in HEADLINES
        ]
        for entry in ranking
    ]
