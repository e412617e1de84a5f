"""The HTML report of a run: one file with tables and plots, no scripts and nothing loaded from elsewhere."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from clsd_tf.commands.console import format_number
from clsd_tf.evaluation.evaluate import evaluation_table
from clsd_tf.metrics.table import definitions, headlines
from clsd_tf.pages.plots import COLORS, LINE_STYLE, panel_grid, render_page, svg, tidy

_TEMPLATE = pathlib.Path(__file__).with_name("report.html")


def render_report(evaluation: dict[str, Any], history: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """Renders the report.

    Args:
      evaluation: from ``clsd_tf.evaluation.evaluate.evaluate``.
      history: one dict per epoch, from training.
      config: the resolved config of the run.

    Returns:
      A self-contained HTML page.
    """
    headings, lines = evaluation_table(evaluation)
    return render_page(
        _TEMPLATE,
        evaluation=evaluation,
        config=config,
        headings=headings,
        rows=[[name, *map(format_number, values)] for name, *values in lines],
        definitions=definitions(headlines(evaluation["overall"])),
        training_curves=svg(_training_curves(history)),
        calibration={name: svg(_calibration_curves(evaluation, name)) for name in evaluation["groups"]}
        or {"all rows": svg(_calibration_curves(evaluation, None))},
        monitors={
            name: svg(figure)
            for name, labels in evaluation["groups"].items()
            if (figure := _group_monitors(history, name, list(labels))) is not None
        },
    )


def _training_curves(history: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    epochs = [entry["epoch"] + 1 for entry in history]
    panels: Sequence[tuple[str, list[tuple[str, str]]]] = (
        ("Loss", [("loss", "training, weighted"), ("bce", "training, BCE"), ("val_log_loss", "validation")]),
        ("Validation AUC", [("val_auc", "validation")]),
        ("Mean ctr in training", [("mean_ctr", "mean ctr")]),
    )
    for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (key, label), color in zip(series, COLORS, strict=False):
            axes.plot(epochs, [entry.get(key) for entry in history], label=label, color=color, **LINE_STYLE)
        axes.set_xticks(epochs)
        tidy(axes, title, "epoch", "")
        if len(series) > 1:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _calibration_curves(evaluation: dict[str, Any], group: str | None) -> Figure:
    """Click rate against mean ctr in bins of equal mass: one small panel per user group, overall first."""
    curves = {"overall": evaluation["overall"], **(evaluation["groups"][group] if group else {})}
    figure, panels = panel_grid(len(curves), (2.4, 2.4))
    for axes, (label, entry) in zip(panels, curves.items(), strict=True):
        bins = entry["calibration_bins"]
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        axes.plot([b["ctr"] for b in bins], [b["click_rate"] for b in bins], color=COLORS[0], **LINE_STYLE)
        tidy(axes, f"{label} ({entry['rows']:,} rows)", "mean ctr", "click rate")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    return figure


def _group_monitors(history: list[dict[str, Any]], group: str, labels: list[str]) -> Figure | None:
    """Means that the method watched of each label of a user group, by epoch; None if it watched none."""
    watched = _watched(history, group, labels)
    if not watched:
        return None
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    epochs = [entry["epoch"] + 1 for entry in history]
    for axes, (name, keys) in zip(figure.subplots(1, len(watched), squeeze=False)[0], watched.items(), strict=True):
        for (label, key), color in zip(keys.items(), itertools.cycle(COLORS), strict=False):
            axes.plot(epochs, [entry[key] for entry in history], label=label, color=color, **LINE_STYLE)
        axes.set_xticks(epochs)
        tidy(axes, f"Mean {name.replace('_', ' ')} by group", "epoch", "")
    figure.axes[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _watched(history: list[dict[str, Any]], group: str, labels: list[str]) -> dict[str, dict[str, str]]:
    """Monitored value -> label -> its key in the history, ``<value>/<user group>/<label>``."""
    names = dict.fromkeys(key.partition("/")[0] for key in history[0] if f"/{group}/" in key)
    found = {
        name: {label: key for label in labels if (key := f"{name}/{group}/{label}") in history[0]} for name in names
    }
    return {name: keys for name, keys in found.items() if keys}
