"""Differences between runs that share seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """``mean`` of the differences and its ``standard_error`` (None below two pairs) over ``num_pairs`` seeds."""

    mean: float
    standard_error: float | None
    num_pairs: int

    def __str__(self) -> str:
        error = "n/a" if self.standard_error is None else f"{self.standard_error:.4f}"
        return f"{self.mean:+.4f} +- {error}"


def paired_difference(treatment: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """mean(treatment_i - baseline_i) and sd / sqrt(n), pair i sharing its seed.

    Raises:
      ValueError: the lengths differ, or there is no pair.
    """
    if len(treatment) != len(baseline) or not len(treatment):
        raise ValueError(f"paired values need equal lengths >= 1. Received: {len(treatment)} and {len(baseline)}")
    differences = np.asarray(treatment, np.float64) - np.asarray(baseline, np.float64)
    count = len(differences)
    error = float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    return PairedDifference(float(differences.mean()), error, count)
