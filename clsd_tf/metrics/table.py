"""The table of metrics: the one place that knows their names, order, headings and meaning.

Evaluation, studies, daily training, model cards and pages measure and print what stands here. A metric of one's own
joins with ``METRICS.register(metric.name)(metric)``, in a module that ``--plugin`` names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Literal

from clsd_tf.metrics import pointwise
from clsd_tf.metrics.noise_floor import mean_of_lowest
from clsd_tf.metrics.scored_rows import Array, ScoredRows
from clsd_tf.plugins.registry import Registry

Report = Literal["evaluation", "days", "calibration", "study", "study_groups", "study_tests", "study_console"]
Better = Literal["higher", "lower", "near 1"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that is measured of scored rows.

    Attributes:
      name: its key in JSON files and in the results of studies.
      compute: rows -> value, or None where they do not define it; gets rows that have all that it needs.
      reports: what measures and shows it. ``evaluation``: evaluation and progressive validation, overall and of each
        user group, and the model card. ``days``: plots of daily training. ``calibration``: before and after it, on the
        model card. ``study``: the whole of a run's split. ``study_groups``: user groups of a study. ``study_tests``:
        differences to the baseline, with tests and plots. ``study_console``: tables that must fit a terminal.
      heading: over it in tables; "" for one that is kept in files alone.
      definition: a phrase that explains the heading.
      better: which way it improves; None where no way does.
      needs: optional columns of ``ScoredRows`` that it is computed from.
      chance: value of a random ranking; None where that says nothing. RelaImpr is relative to it.
      at_most: the largest value that it can have; the smallest is 0.
      of_baseline: whether it tells something of a study's plain baseline alone.
    """

    name: str
    compute: Callable[[ScoredRows], float | None]
    reports: tuple[Report, ...]
    heading: str = ""
    definition: str = ""
    better: Better | None = None
    needs: tuple[str, ...] = ()
    chance: float | None = None
    at_most: float = math.inf
    of_baseline: bool = False

    def measure(self, rows: ScoredRows) -> float | None:
        """Measures rows.

        Args:
          rows: one or more.

        Returns:
          The value; None where it is not defined, or a column that it needs is missing.
        """
        return self.compute(rows) if all(rows.has(column) for column in self.needs) else None


METRICS = Registry("metric", {})


def metrics_in(report: Report, names: Collection[str] | None = None) -> list[Metric]:
    """Selects the metrics of a report, in the order of the table.

    Args:
      report: which.
      names: those that judge a method; None for all of the table.

    Returns:
      The report's own metrics, of those with the names.

    Raises:
      ValueError: a name that is not in the table.
    """
    for name in names or ():
        METRICS.require(name)
    return [
        metric for metric in METRICS.values() if report in metric.reports and (names is None or metric.name in names)
    ]


def headlines(names: Iterable[str]) -> list[Metric]:
    """Selects the metrics that tables show.

    Args:
      names: what was measured; names that are no metrics are left out.

    Returns:
      Those with a heading, in the order of the table.
    """
    wanted = set(names)
    return [metric for metric in METRICS.values() if metric.heading and metric.name in wanted]


def definitions(metrics: Iterable[Metric]) -> str:
    """Explains the headings of a table.

    Args:
      metrics: its columns.

    Returns:
      A sentence for each metric with a definition, for the line below the table.
    """
    return " ".join(f"{metric.heading}: {metric.definition}." for metric in metrics if metric.definition)


def measure(rows: ScoredRows, report: Report, names: Collection[str] | None = None) -> dict[str, float | None]:
    """Measures rows by the metrics of a report.

    Args:
      rows: one or more.
      report: see ``Metric.reports``.
      names: see ``metrics_in``.

    Returns:
      Name -> value; None where the rows do not define it.
    """
    return {metric.name: metric.measure(rows) for metric in metrics_in(report, names)}


def _pointwise(function: Callable[[Array, Array, Array], float | None]) -> Callable[[ScoredRows], float | None]:
    """A metric of ``clsd_tf.metrics.pointwise`` that takes labels, predictions and weights."""
    return lambda rows: function(rows.label, rows.ctr, rows.sample_weight)


_auc, _log_loss, _pcoc = (_pointwise(function) for function in (pointwise.auc, pointwise.log_loss, pointwise.pcoc))
_ece = _pointwise(pointwise.ece)


def _gauc(rows: ScoredRows) -> float | None:
    return pointwise.gauc(rows.label, rows.ctr, rows.user_hash, rows.sample_weight)[0]


def _gauc_share(rows: ScoredRows) -> float | None:
    return pointwise.gauc(rows.label, rows.ctr, rows.user_hash, rows.sample_weight)[1]


def _group_auc(rows: ScoredRows) -> float | None:
    """AUC within each label of the first user group."""
    ids = next(iter(rows.group_ids.values()))
    return pointwise.gauc(rows.label, rows.ctr, ids, rows.sample_weight)[0]


_ranking = functools.partial(Metric, better="higher", chance=0.5, at_most=1.0)  # All kinds of AUC.
_STUDY: tuple[Report, ...] = ("study", "study_groups")
_TESTED: tuple[Report, ...] = ("study", "study_tests")

_TABLE = (
    Metric("rows", len, ("evaluation",), "rows"),
    Metric("clicks", lambda rows: int(rows.label.sum()), ("evaluation",)),
    Metric(
        "click_rate",
        lambda rows: pointwise.mean(rows.label, rows.sample_weight),
        ("evaluation",),
        "click rate",
        at_most=1.0,
    ),
    Metric("mean_ctr", lambda rows: pointwise.mean(rows.ctr, rows.sample_weight), ("evaluation",), at_most=1.0),
    _ranking(
        "auc",
        _auc,
        ("evaluation", "days", *_STUDY, "study_tests", "study_console"),
        "AUC",
        "share of pairs of a click and another row that are in order",
    ),
    _ranking(
        "gauc",
        _gauc,
        ("evaluation", *_TESTED, "study_console"),
        "GAUC",
        "AUC within each user, weighted by impressions, users with one label left out",
    ),
    Metric("gauc_share_of_rows", _gauc_share, ("evaluation",), at_most=1.0),
    _ranking("group_auc", _group_auc, ("study",), "AUC within groups", needs=("group_ids",)),
    _ranking(
        "intensity_auc",
        lambda rows: _auc(rows.judged_by("intensity_label")),
        ("evaluation", *_STUDY, "study_tests", "study_console"),
        "intensity AUC",
        needs=("intensity_label",),
    ),
    _ranking(
        "intensity_auc_among_clicks",
        lambda rows: _auc(rows.clicks().judged_by("intensity_label")),
        ("evaluation", *_STUDY, "study_tests"),
        "intensity AUC among clicks",
        needs=("intensity_label",),
    ),
    _ranking(
        "genuine_auc",
        lambda rows: _auc(rows.judged_by("genuine")),
        (*_STUDY, "study_tests", "study_console"),
        "genuine AUC",
        needs=("genuine",),
    ),
    _ranking(
        "genuine_group_auc",
        lambda rows: _group_auc(rows.judged_by("genuine")),
        (*_TESTED, "study_console"),
        "genuine AUC within groups",
        needs=("genuine", "group_ids"),
    ),
    Metric("log_loss", _log_loss, ("evaluation", "days", "calibration", "study"), "log loss", better="lower"),
    Metric(
        "normalized_entropy",
        _pointwise(pointwise.normalized_entropy),
        ("evaluation",),
        "NE",
        "log loss over that of the click rate",
        better="lower",
    ),
    Metric(
        "pcoc",
        _pcoc,
        ("evaluation", "days", "calibration", *_STUDY, "study_console"),
        "PCOC",
        "predicted clicks over clicks, 1 is calibrated",
        better="near 1",
    ),
    Metric(
        "ece",
        _ece,
        ("evaluation", "calibration", *_STUDY),
        "ECE",
        "mean distance of prediction and click rate in 20 bins of equal mass",
        better="lower",
    ),
    Metric("uncalibrated_log_loss", lambda rows: _log_loss(rows.without_calibration()), ("study",), better="lower"),
    Metric(
        "uncalibrated_pcoc",
        lambda rows: _pcoc(rows.without_calibration()),
        ("study",),
        "PCOC uncalibrated",
        better="near 1",
    ),
    Metric(
        "uncalibrated_ece",
        lambda rows: _ece(rows.without_calibration()),
        ("study",),
        "ECE uncalibrated",
        better="lower",
    ),
    Metric(
        "click_noise_floor",
        lambda rows: mean_of_lowest(rows.uncalibrated),
        ("study_groups",),
        "click noise floor",
        at_most=1.0,
        of_baseline=True,  # Weighting bends low predictions: the lowest scores of plain BCE tell of accidental clicks.
    ),
)
for _metric in _TABLE:
    METRICS.register(_metric.name)(_metric)
