"""Measures of a run of a study: overall and per user group."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from clsd_tf.evaluation.scored_rows import rows_by_label
from clsd_tf.metrics import table
from clsd_tf.metrics.scored_rows import ScoredRows
from clsd_tf.spec.model_inputs import GroupInput

OVERALL = "overall"


def measure_slices(
    rows: ScoredRows, groups: Sequence[GroupInput], metrics: Collection[str] | None = None
) -> Iterator[tuple[str, str, float]]:
    """Measures rows overall and per user group.

    Args:
      rows: with ids of ``groups``.
      groups: the user groups to measure; labels of few users are part of "other".
      metrics: names in the table of metrics; None for all that a study has.

    Yields:
      (slice, metric, value) of each metric that is defined there; the slice is ``overall`` or
      ``<user group>=<label>``.
    """
    slices = {OVERALL: table.measure(rows, "study", metrics)}
    for group in groups:
        for label, part in rows_by_label(rows, group):
            slices[f"{group.name}={label}"] = table.measure(part, "study_groups", metrics)
    for name, measured in slices.items():
        yield from ((name, metric, float(value)) for metric, value in measured.items() if value is not None)
