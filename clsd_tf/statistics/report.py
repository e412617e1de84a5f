"""Tables and the HTML page of checked data: anomalies, drift, distributions, and user groups side by side."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clsd_tf.commands.console import format_number
from clsd_tf.pages.plots import COLORS, render_page, svg, tidy
from clsd_tf.statistics.column_summaries import ValueSummary
from clsd_tf.statistics.data_checks import Anomaly, Contrast, binned_shares
from clsd_tf.statistics.data_statistics import ALL_ROWS, ColumnStatistics, DataStatistics

_TEMPLATE = pathlib.Path(__file__).with_name("report.html")

_NUM_VALUES = 10  # Of a column in a plot.
_NUM_TOP_VALUES = 20  # Of a column in the JSON report.
_PANELS_A_LINE = 3
ANOMALY_HEADINGS = ("where", "column", "group", "kind", "received", "allowed")
SUMMARY_HEADINGS = ("column", "missing", "distinct", "mean", "std", "min", "median", "max", "click rate if missing")
_KINDS = ("jensen_shannon", "l_infinity", "unseen", "mean_change", "missing_change", "click_rate_change")
DRIFT_HEADINGS = ("column", *(kind.replace("_", " ") for kind in _KINDS))


def anomaly_rows(anomalies: Mapping[str, Iterable[Anomaly]]) -> list[list[Any]]:
    """Returns rows under ``ANOMALY_HEADINGS``.

    Args:
      anomalies: where they are (a split, or two sides) -> the anomalies.
    """
    return [
        [where, found.column, found.group or ALL_ROWS[1], found.kind, found.received, found.allowed]
        for where, entries in anomalies.items()
        for found in entries
    ]


def summary_rows(statistics: DataStatistics) -> list[list[Any]]:
    """Returns a row under ``SUMMARY_HEADINGS`` per raw input of ``statistics``, over all rows."""
    return [[name, *_summary(statistics, column)] for name, column in statistics.columns.items()]


def _summary(statistics: DataStatistics, column: ColumnStatistics) -> list[Any]:
    missing = int(column.missing[0])
    numbers, histogram = column.numbers, column.histogram
    known = histogram if histogram is not None and histogram.count else None
    return [
        missing / max(int(statistics.rows[0]), 1),
        column.distinct and column.distinct.estimate,
        float(numbers.mean[0]) if numbers and known else None,
        float(numbers.std[0]) if numbers and known else None,
        numbers and numbers.minimum,
        float(known.quantiles([0.5])[0]) if known else None,
        numbers and numbers.maximum,
        column.missing_clicks / missing if missing and statistics.has_labels else None,
    ]


def drift_rows(contrast: Contrast) -> list[list[Any]]:
    """Returns a row under ``DRIFT_HEADINGS`` per column of ``contrast``, over all rows; None if one does not apply."""
    values = {(drift.column, drift.kind): drift.value for drift in contrast.measures if not drift.group}
    columns = dict.fromkeys(column for column, _ in values)
    return [[column, *(values.get((column, kind)) for kind in _KINDS)] for column in columns]


def top_values(statistics: DataStatistics) -> dict[str, list[list[Any]]]:
    """Lists the most frequent values.

    Args:
      statistics: of one set of rows.

    Returns:
      Raw input -> up to 20 of [value, rows, click rate], ready for JSON; the click rate is None without labels.
    """
    found = {}
    for name, column in statistics.columns.items():
        if column.values:
            rates = {
                value: clicks / rows if statistics.has_labels else None
                for value, rows, clicks in zip(
                    column.values.values.to_pylist(),
                    column.values.rows[:, 0].tolist(),
                    column.values.clicks.tolist(),
                    strict=True,
                )
            }
            common = column.values.top.most_common(_NUM_TOP_VALUES)
            found[name] = [[value, count, rates[value]] for value, count in common]
    return found


def render_data_report(
    parts: Mapping[str, DataStatistics],
    contrasts: Sequence[Contrast],
    anomalies: Mapping[str, Iterable[Anomaly]],
    facts: Mapping[str, Any],
) -> str:
    """Renders the report.

    Args:
      parts: name of each set of rows (``train``, ``served``) -> its statistics.
      contrasts: what is compared with what.
      anomalies: where they are -> the anomalies.
      facts: ``dataset``, ``spec``, ``min_group_users``, and ``left_out``: raw inputs that served requests leave out.

    Returns:
      A self-contained HTML page: no scripts, nothing loaded from elsewhere.
    """
    return render_page(
        _TEMPLATE,
        facts=facts,
        anomaly_headings=ANOMALY_HEADINGS,
        anomalies=_text(anomaly_rows(anomalies)),
        summary_headings=SUMMARY_HEADINGS,
        summaries={f"{name}: {int(part.rows[0]):,} rows": _text(summary_rows(part)) for name, part in parts.items()},
        drift_headings=DRIFT_HEADINGS,
        contrasts=[
            {
                "title": entry.title,
                "rows": _text(drift_rows(entry)),
                "distributions": svg(_distributions(entry)),
                "groups": {name: svg(_groups(entry, name)) for name in _group_names(entry)},
            }
            for entry in contrasts
        ],
    )


def _text(rows: list[list[Any]]) -> list[list[str]]:
    return [[cell if isinstance(cell, str) else format_number(cell) for cell in row] for row in rows]


def _distributions(contrast: Contrast) -> Figure:
    """A small panel per raw input: shares of values, of bins of numbers, or of lengths, on both sides."""
    names = [name for name, column in contrast.baseline.columns.items() if column.values or column.histogram]
    lines = -(-len(names) // _PANELS_A_LINE)
    figure = Figure(figsize=(3.6 * _PANELS_A_LINE, 2.5 * lines), layout="constrained")
    panels = list(figure.subplots(lines, _PANELS_A_LINE, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        columns = [side.columns[name] for side in (contrast.baseline, contrast.new) if name in side.columns]
        if len(columns) == 2:
            _draw_shares(axes, *_shares(columns), (contrast.baseline_name, contrast.new_name))
        tidy(axes, name, "", "share")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def _shares(columns: Sequence[ColumnStatistics]) -> tuple[list[str], list[np.ndarray]]:
    """(labels, share of each on either side): the baseline's most frequent values and the new side's, or bins."""
    summaries = [column.values for column in columns if column.values]
    if len(summaries) == len(columns):
        return _value_shares(summaries)
    histograms = [column.histogram for column in columns if column.histogram and column.histogram.count]
    if len(histograms) < len(columns):
        return [], [np.array([]), np.array([])]
    ends, *shares = binned_shares(*histograms)
    return [*(f"≤{end:.4g}" for end in ends), f">{ends[-1]:.4g}"], shares


def _value_shares(summaries: Sequence[ValueSummary]) -> tuple[list[str], list[np.ndarray]]:
    labels = list(dict.fromkeys(value for part in summaries for value, _ in part.top.most_common(_NUM_VALUES)))
    labels = labels[: _NUM_VALUES + 2]
    counts = [dict(zip(part.values.to_pylist(), part.rows[:, 0].tolist(), strict=True)) for part in summaries]
    totals = [max(int(part.total[0]), 1) for part in summaries]
    return labels, [
        np.array([count.get(label, 0) / total for label in labels]) for count, total in zip(counts, totals, strict=True)
    ]


def _draw_shares(axes: Axes, labels: list[str], shares: Sequence[np.ndarray], names: Sequence[str]) -> None:
    positions = np.arange(len(labels))
    for offset, side, name, color in zip((-0.2, 0.2), shares, names, COLORS, strict=False):
        axes.bar(positions + offset, side, 0.4, label=name, color=color)
    shown = [label if len(label) <= 12 else f"{label[:11]}…" for label in labels]
    axes.set_xticks(positions, shown, rotation=90)


def _group_names(contrast: Contrast) -> list[str]:
    """User groups that both sides have."""
    names = [{group for group, _ in side.segments[1:]} for side in (contrast.baseline, contrast.new)]
    return sorted(names[0] & names[1])


def _groups(contrast: Contrast, group: str) -> Figure:
    """Click rate, and missing share of the columns that miss any, by label of a user group on both sides."""
    sides = (contrast.baseline, contrast.new)
    names = (contrast.baseline_name, contrast.new_name)
    labels = list(dict.fromkeys(label for side in sides for name, label in side.segments if name == group))
    with_missing = [
        name
        for name, column in contrast.baseline.columns.items()
        if name in contrast.new.columns and column.missing[0] + contrast.new.columns[name].missing[0]
    ]
    figure = Figure(figsize=(10.5, 1.2 + 0.28 * len(labels)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    _draw_groups(panels[0], sides, names, group, labels)
    for axes, side, name in zip(panels[1:], sides, names, strict=True):
        for column, color in zip(with_missing, COLORS, strict=False):
            shares = _by_label(side, group, labels, side.columns[column].missing)
            axes.plot(shares, range(len(labels)), "o", markersize=4, label=column, color=color)
        axes.set_xlim(0, 1)
        tidy(axes, f"Missing in {name}", "share", "")
    if with_missing:
        panels[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _draw_groups(axes: Axes, sides, names: Sequence[str], group: str, labels: list[str]) -> None:
    positions = np.arange(len(labels))
    for offset, side, name, color in zip((-0.2, 0.2), sides, names, COLORS, strict=False):
        if side.has_labels:
            rates = _by_label(side, group, labels, side.clicks)
            axes.barh(positions + offset, rates, 0.4, label=name, color=color)
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    tidy(axes, "Click rate", "", "")
    axes.legend(fontsize=7, frameon=False)


def _by_label(side: DataStatistics, group: str, labels: list[str], counts: np.ndarray) -> np.ndarray:
    """Counts over rows of each label, NaN where the side lacks it, [num_labels]."""
    index = {label: i for i, (name, label) in enumerate(side.segments) if name == group}
    return np.array([counts[index[label]] / side.rows[index[label]] if label in index else np.nan for label in labels])
