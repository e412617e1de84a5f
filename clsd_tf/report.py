"""The HTML report of a run: one file with tables and plots, no scripts and nothing loaded from elsewhere."""

from __future__ import annotations

import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clsd_tf.console import format_number
from clsd_tf.evaluation import HEADLINES, table_rows

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")  # Okabe-Ito.
_STYLE = {"linewidth": 1.6, "marker": "o", "markersize": 3.5}


def render_report(evaluation: dict[str, Any], history: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """Renders the report.

    Args:
      evaluation: from ``clsd_tf.evaluation.evaluate``.
      history: one dict per epoch, from training.
      config: the resolved config of the run.

    Returns:
      A self-contained HTML page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    rows = [[row[0], *(format_number(value) for value in row[1:])] for row in table_rows(evaluation)]
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        config=config,
        headings=[heading for _, heading in HEADLINES],
        rows=rows,
        training_curves=_svg(_training_curves(history)),
        calibration={name: _svg(_calibration_curves(evaluation, name)) for name in evaluation["groups"]}
        or {"all rows": _svg(_calibration_curves(evaluation, None))},
        monitors={
            name: _svg(figure)
            for name, labels in evaluation["groups"].items()
            if (figure := _group_monitors(history, name, list(labels))) is not None
        },
    )


def _svg(figure: Figure) -> markupsafe.Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    return markupsafe.Markup(svg[svg.index("<svg") :])


def _tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _training_curves(history: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    epochs = [entry["epoch"] + 1 for entry in history]
    panels: Sequence[tuple[str, list[tuple[str, str]]]] = (
        ("Loss", [("loss", "training, weighted"), ("bce", "training, BCE"), ("val_log_loss", "validation")]),
        ("Validation AUC", [("val_auc", "validation")]),
        ("Mean pctr in training", [("mean_pctr", "mean pctr")]),
    )
    for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (key, label), colour in zip(series, _COLOURS, strict=False):
            axes.plot(epochs, [entry.get(key) for entry in history], label=label, color=colour, **_STYLE)
        axes.set_xticks(epochs)
        _tidy(axes, title, "epoch", "")
        if len(series) > 1:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _calibration_curves(evaluation: dict[str, Any], group: str | None) -> Figure:
    """Click rate against mean pctr in bins of equal mass: one small panel per user group, overall first."""
    curves = {"overall": evaluation["overall"], **(evaluation["groups"][group] if group else {})}
    columns = min(4, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes, (label, entry) in zip(panels, curves.items(), strict=False):
        bins = entry["calibration_bins"]
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        axes.plot([b["pctr"] for b in bins], [b["click_rate"] for b in bins], color=_COLOURS[0], **_STYLE)
        _tidy(axes, f"{label} ({entry['rows']:,} rows)", "mean pctr", "click rate")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for axes in list(panels):
        axes.set_visible(False)
    return figure


def _group_monitors(history: list[dict[str, Any]], group: str, labels: list[str]) -> Figure | None:
    """Mean click confidence and mean AdGate output of each user group, by epoch; None if the run had no AdGate."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    epochs = [entry["epoch"] + 1 for entry in history]
    panels = (("click_confidence", "Mean click confidence by group"), ("ad_gate", "Mean AdGate output by group"))
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        keys = {label: f"{name}/{group}/{label}" for label in labels if f"{name}/{group}/{label}" in history[0]}
        if not keys:
            return None
        for (label, key), colour in zip(keys.items(), itertools.cycle(_COLOURS), strict=False):
            axes.plot(epochs, [entry[key] for entry in history], label=label, color=colour, **_STYLE)
        axes.set_xticks(epochs)
        _tidy(axes, title, "epoch", "")
    figure.axes[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure
