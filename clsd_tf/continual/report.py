"""The HTML page of daily training: the progressive validation of each day, and what the last model comes from."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from clsd_tf.commands.console import format_number
from clsd_tf.continual.daily_training import days_table
from clsd_tf.metrics.table import Metric, metrics_in
from clsd_tf.pages.plots import COLORS, LINE_STYLE, render_page, svg, tidy

_TEMPLATE = pathlib.Path(__file__).with_name("report.html")


def render_days(days: Sequence[dict[str, Any]], lineage: dict[str, Any]) -> str:
    """Renders the page.

    Args:
      days: from ``clsd_tf.continual.daily_training.train_daily``.
      lineage: of the last day's run.

    Returns:
      A self-contained HTML page.
    """
    measured = [day for day in days if day["prequential"]]
    columns, lines = days_table(days)
    return render_page(
        _TEMPLATE,
        headings=columns,
        rows=[[date, *map(format_number, values)] for date, *values in lines],
        plots=[svg(figure) for figure in (_plots(measured) if measured else ())],
        runs=[*lineage["ancestors"], {"work_fingerprint": "this run", **lineage["run"]}],
    )


def _plots(days: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Metrics overall, and the first of them by each user group."""
    latest = days[-1]["prequential"]
    metrics = [metric for metric in metrics_in("days") if metric.name in latest["overall"]]
    if metrics:
        yield _overall(days, metrics)
        yield from (_by_label(days, name, metrics[0]) for name in latest["groups"])


def _overall(days: Sequence[dict[str, Any]], metrics: Sequence[Metric]) -> Figure:
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        values = [day["prequential"]["overall"][metric.name] for day in days]
        _plot(axes, days, values, color=COLORS[0])
        tidy(axes, metric.heading, "", "")
    return figure


def _by_label(days: Sequence[dict[str, Any]], group: str, metric: Metric) -> Figure:
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    axes = figure.subplots()
    of_days = [day["prequential"]["groups"][group] for day in days]
    labels = dict.fromkeys(label for entry in of_days for label in entry)
    for label, color in zip(labels, itertools.cycle(COLORS), strict=False):
        values = [entry[label][metric.name] if label in entry else None for entry in of_days]
        _plot(axes, days, values, color, label)
    tidy(axes, f"{metric.heading} by {group}", "", "")
    axes.legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _plot(axes, days: Sequence[dict[str, Any]], values: Sequence[float | None], color: str, label: str = "") -> None:
    numbers = [float("nan") if value is None else value for value in values]
    axes.plot([day["date"] for day in days], numbers, color=color, label=label, **LINE_STYLE)
    axes.tick_params(axis="x", rotation=60)
