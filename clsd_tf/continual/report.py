"""The HTML page of a walk over days: how well each was predicted ahead, and what the last model comes from."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from clsd_tf.commands.console import format_number
from clsd_tf.continual.daily_training import table_rows
from clsd_tf.evaluation.evaluate import HEADLINES
from clsd_tf.pages.plots import COLORS, LINE_STYLE, render_page, svg, tidy

_TEMPLATE = pathlib.Path(__file__).with_name("report.html")

_PANELS = (("auc", "AUC"), ("log_loss", "Log loss"), ("pcoc", "PCOC"))


def render_days(days: Sequence[dict[str, Any]], lineage: dict[str, Any]) -> str:
    """Renders the page.

    Args:
      days: from ``clsd_tf.continual.daily_training.walk``.
      lineage: of the last day's run.

    Returns:
      A self-contained HTML page.
    """
    measured = [day for day in days if day["prequential"]]
    groups = list(measured[-1]["prequential"]["groups"]) if measured else []
    return render_page(
        _TEMPLATE,
        headings=["day", "trained rows", *(heading for _, heading in HEADLINES)],
        rows=[[row[0], *map(format_number, row[1:])] for row in table_rows(days)],
        overall=svg(_overall(measured)),
        groups={name: svg(_auc_by_label(measured, name)) for name in groups},
        runs=[*lineage["ancestors"], {"work_fingerprint": "this run", **lineage["run"]}],
    )


def _overall(days: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        values = [day["prequential"]["overall"][key] for day in days]
        _plot(axes, days, values, color=COLORS[0])
        tidy(axes, title, "", "")
    return figure


def _auc_by_label(days: Sequence[dict[str, Any]], group: str) -> Figure:
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    axes = figure.subplots()
    of_days = [day["prequential"]["groups"][group] for day in days]
    labels = dict.fromkeys(label for entry in of_days for label in entry)
    for label, color in zip(labels, itertools.cycle(COLORS), strict=False):
        _plot(axes, days, [entry[label]["auc"] if label in entry else None for entry in of_days], color, label)
    tidy(axes, f"AUC by {group}", "", "")
    axes.legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _plot(axes, days: Sequence[dict[str, Any]], values: Sequence[float | None], color: str, label: str = "") -> None:
    numbers = [float("nan") if value is None else value for value in values]
    axes.plot([day["date"] for day in days], numbers, color=color, label=label, **LINE_STYLE)
    axes.tick_params(axis="x", rotation=60)
