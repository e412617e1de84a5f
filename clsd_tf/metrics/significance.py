"""Tests of differences: runs that share seeds, many comparisons, resampled rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

Array = np.ndarray

_MAX_EXACT_PAIRS = 14
_RANDOM_FLIPS = 10_000


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Statistics of the differences of pairs; all but ``mean`` and ``num_pairs`` is None below two pairs.

    Attributes:
      mean: mean of the differences.
      standard_error: sd / sqrt(num_pairs).
      num_pairs: seeds, >= 1.
      t_p_value: two-sided p-value of the paired t-test; equal differences give 0, or 1 when they are 0.
      permutation_p_value: two-sided p-value of flipping the signs of the differences, at least 2 / 2**num_pairs: below
        six pairs it cannot fall under .05, whatever the data.
      confidence_interval: mean -+ t quantile * standard_error, 95 %: (low, high).
    """

    mean: float
    standard_error: float | None
    num_pairs: int
    t_p_value: float | None = None
    permutation_p_value: float | None = None
    confidence_interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        error = "n/a" if self.standard_error is None else f"{self.standard_error:.4f}"
        return f"{self.mean:+.4f} +- {error}"


def paired_difference(treatment: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """Computes mean(treatment_i - baseline_i) and how sure it is, pair i sharing its seed.

    Args:
      treatment: a metric of the treated runs, [num_pairs].
      baseline: of those that they are compared with, [num_pairs].

    Returns:
      The mean difference with its standard error, tests and interval.

    Raises:
      ValueError: the lengths differ, or there is no pair.
    """
    if len(treatment) != len(baseline) or not len(treatment):
        raise ValueError(f"paired values need equal lengths >= 1. Received: {len(treatment)} and {len(baseline)}")
    differences = np.asarray(treatment, np.float64) - np.asarray(baseline, np.float64)
    mean, count = float(differences.mean()), len(differences)
    if count == 1:
        return PairedDifference(mean, None, count)
    error = float(differences.std(ddof=1) / np.sqrt(count))
    margin = float(stats.t.ppf(0.975, count - 1)) * error
    return PairedDifference(
        mean,
        error,
        count,
        t_p_value=_t_p_value(mean, error, count),
        permutation_p_value=_permutation_p_value(differences),
        confidence_interval=(mean - margin, mean + margin),
    )


def _t_p_value(mean: float, error: float, count: int) -> float:
    if error == 0:  # t is 0 / 0 or infinite.
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, count - 1))


def _permutation_p_value(differences: Array) -> float:
    """Share of sign flips whose sum is as far from 0: of all flips up to 14 pairs, of 10,000 seeded ones above."""
    count = len(differences)
    if count <= _MAX_EXACT_PAIRS:
        signs = 1 - 2 * ((np.arange(2**count)[:, np.newaxis] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], [_RANDOM_FLIPS, count])
        signs[0] = 1  # The data's own signs count as a flip: no p-value is 0.
    rounding = 1e-12 * np.abs(differences).sum()  # It must not part flips of equal sums.
    return float(np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - rounding))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values: below alpha for no true null hypothesis of the family, with probability >= 1 - alpha.

    With the m known p-values sorted, adjusted_k = max over j <= k of min(1, (m - j + 1) * p_j).

    Args:
      p_values: in [0, 1]; None, a test that could not be made, stays None and does not count.

    Returns:
      Adjusted ones in the same order.

    Raises:
      ValueError: a p-value outside [0, 1].

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    known = {index: p_value for index, p_value in enumerate(p_values) if p_value is not None}
    wrong = [p_value for p_value in known.values() if not 0 <= p_value <= 1]
    if wrong:
        raise ValueError(f"p-values must lie in [0, 1]; use None where there is none. Received: {wrong}")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(known, key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[index]))
        adjusted[index] = largest
    return adjusted


def rela_impr(value: float, baseline: float, chance: float = 0.5) -> float | None:
    """(value - chance) / (baseline - chance) - 1: the relative gain above a random ranking; 0.1 is 10 %.

    Args:
      value: AUC, or another metric of rankings.
      baseline: what it is compared with.
      chance: value of a random ranking.

    Returns:
      None when ``baseline`` is ``chance``: there is nothing to be relative to.

    Source: Yan et al. (2014), "Coupled group lasso for web-scale CTR prediction in display advertising", section 5.2.1.
    """
    return None if baseline == chance else (value - chance) / (baseline - chance) - 1


def bootstrap_interval(
    statistic: Callable[..., float | None],
    columns: Sequence[Array],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    clusters: Array | None = None,
) -> tuple[float, float] | None:
    """Percentile interval of ``statistic(*columns)`` over rows, or clusters of rows, drawn with replacement.

    Impressions of one user are alike, so that intervals over rows are too narrow: give the users as ``clusters``. A
    cluster that is drawn twice brings all its rows twice.

    Args:
      statistic: resampled columns -> number; None or NaN where the rows do not define it (say, AUC without clicks).
      columns: arrays [num_rows, ...], num_rows >= 1.
      num_resamples: >= 1.
      seed: equal seeds give equal intervals.
      confidence: in (0, 1).
      clusters: [num_rows], which rows belong together; by default each row is its own cluster.

    Returns:
      (low, high), or None when fewer than half of the resamples define the statistic.

    Raises:
      ValueError: no rows, columns of different lengths, or a number out of range.

    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3.
    """
    columns = [np.asarray(column) for column in columns]
    clusters = np.arange(len(columns[0]) if columns else 0) if clusters is None else np.asarray(clusters)
    _check_bootstrap([len(column) for column in columns] + [len(clusters)], num_resamples, confidence)
    order = np.argsort(clusters, kind="stable")
    _, starts, sizes = np.unique(clusters[order], return_index=True, return_counts=True)
    random = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        drawn = random.integers(len(starts), size=len(starts))
        rows = order[_ranges(starts[drawn], sizes[drawn])]
        value = statistic(*(column[rows] for column in columns))
        if value is not None and not np.isnan(value):
            values.append(value)
    if 2 * len(values) < num_resamples:
        return None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _ranges(starts: Array, sizes: Array) -> Array:
    """Concatenation of arange(start, start + size): starts (5, 0), sizes (2, 3) -> 5 6 0 1 2."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)


def _check_bootstrap(lengths: list[int], num_resamples: int, confidence: float) -> None:
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"columns and clusters need equal lengths >= 1. Received: {lengths}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1. Received: {num_resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1). Received: {confidence}")
