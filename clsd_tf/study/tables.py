"""Tables of a study: differences to a baseline over paired seeds, with tests, as Markdown and HTML."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clsd_tf.metrics.significance import PairedDifference, holm, paired_difference, rela_impr
from clsd_tf.pages.plots import render_page, svg, tidy
from clsd_tf.study.cells import BASELINE
from clsd_tf.study.measures import OVERALL

_TEMPLATE = pathlib.Path(__file__).with_name("report.html")

# Metrics of the tables, in order: key, heading.
METRICS = (
    ("auc", "AUC"),
    ("gauc", "GAUC"),
    ("group_auc", "AUC within groups"),
    ("intensity_auc", "intensity AUC"),
    ("intensity_auc_among_clicks", "intensity AUC among clicks"),
    ("genuine_auc", "genuine AUC"),
    ("genuine_group_auc", "genuine AUC within groups"),
    ("log_loss", "log loss"),
    ("pcoc", "PCOC"),
    ("ece", "ECE"),
    ("uncalibrated_pcoc", "PCOC uncalibrated"),
    ("uncalibrated_ece", "ECE uncalibrated"),
)
CONSOLE_METRICS = ("auc", "gauc", "intensity_auc", "genuine_auc", "genuine_group_auc", "pcoc")  # What fits a terminal.
TESTED = ("auc", "gauc", "intensity_auc", "intensity_auc_among_clicks", "genuine_auc", "genuine_group_auc")


@dataclasses.dataclass(frozen=True)
class Row:
    """One metric of one method: over its seeds, and against the baseline over the seeds that both have.

    Attributes:
      place: (data, backbone, slice): where the comparison was made.
      baseline: the method that it is compared with.
      difference: None for the baseline itself, and where no seed has both.
      holm_p: the paired t-test's p-value, adjusted for all comparisons of this metric in the table.
      holm_permutation_p: likewise of the permutation test.
      lift: RelaImpr, for AUCs.
      user_error: standard error of the difference over users, see ``clsd_tf.metrics.user_errors``; None where it is
        not known.
    """

    place: tuple[str, str, str]
    method: str
    metric: str
    mean: float
    std: float | None
    num_seeds: int
    baseline: str
    difference: PairedDifference | None = None
    holm_p: float | None = None
    holm_permutation_p: float | None = None
    lift: float | None = None
    user_error: float | None = None


@dataclasses.dataclass(frozen=True)
class GridTables:
    """A grid of a study: its title, the rows of ``compare``, and lines about runs that did not finish."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


def compare(
    results: Iterable[dict[str, Any]],
    user_errors: Mapping[tuple[str, str, str, str], float] | None = None,
    baseline: str = BASELINE,
) -> list[Row]:
    """Results -> rows, in the order of the results.

    Args:
      results: from ``clsd_tf.study.cells.read_results``: the rows of one grid, the family of Holm's correction.
      user_errors: from ``clsd_tf.study.cells.errors_over_users``.
      baseline: the method that all others are compared with.
    """
    values: dict[tuple[tuple[str, str, str], str, str], dict[int, float]] = {}
    for found in results:
        place = (found["data"], found["backbone"], found["slice"])
        by_seed = values.setdefault((place, found["method"], found["metric"]), {})
        by_seed[found["seed"]] = found["value"]
    rows = [
        _row(place, method, metric, by_seed, baseline, values.get((place, baseline, metric), {}))
        for (place, method, metric), by_seed in values.items()
    ]
    return [_with_user_error(row, user_errors or {}) for row in _with_holm(rows)]


def _with_user_error(row: Row, user_errors: Mapping[tuple[str, str, str, str], float]) -> Row:
    data, backbone, part = row.place
    error = user_errors.get((data, backbone, row.method, row.metric)) if part == OVERALL else None
    return dataclasses.replace(row, user_error=error)


def _row(
    place: tuple[str, str, str],
    method: str,
    metric: str,
    by_seed: dict[int, float],
    baseline: str,
    baseline_by_seed: dict[int, float],
) -> Row:
    found = list(by_seed.values())
    mean, std = float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None
    row = Row(place, method, metric, mean, std, len(found), baseline)
    seeds = sorted(by_seed.keys() & baseline_by_seed.keys())
    if method == baseline or not seeds:
        return row
    paired = [baseline_by_seed[seed] for seed in seeds]
    difference = paired_difference([by_seed[seed] for seed in seeds], paired)
    base = float(np.mean(paired))
    lift = rela_impr(base + difference.mean, base) if "auc" in metric else None
    return dataclasses.replace(row, difference=difference, lift=lift)


def _with_holm(rows: list[Row]) -> list[Row]:
    adjusted = list(rows)
    for metric in {row.metric for row in rows}:
        family = [index for index, row in enumerate(rows) if row.metric == metric and row.difference is not None]
        # Slices are other questions than the whole: each makes a family of its own.
        for part in {rows[index].place[2] for index in family}:
            members = [index for index in family if rows[index].place[2] == part]
            differences = [rows[index].difference for index in members]
            of_t = holm([difference.t_p_value for difference in differences])
            of_permutation = holm([difference.permutation_p_value for difference in differences])
            for index, t, permutation in zip(members, of_t, of_permutation, strict=True):
                adjusted[index] = dataclasses.replace(rows[index], holm_p=t, holm_permutation_p=permutation)
    return adjusted


def summary_table(
    rows: Sequence[Row], metrics: Sequence[str] = tuple(dict(METRICS))
) -> tuple[list[str], list[list[str]]]:
    """(columns, lines): a line of means per data, backbone and method, and below it one of differences."""
    measured = {row.metric for row in rows}
    shown = [(key, heading) for key, heading in METRICS if key in measured and key in metrics]
    most_seeds = max((row.num_seeds for row in rows), default=0)
    lines = []
    for place, method in _runs(rows):
        found = {row.metric: row for row in rows if (row.place, row.method) == (place, method)}
        num_seeds = max(row.num_seeds for row in found.values())
        # Means of fewer seeds than the others' are no means of the same runs: the line of differences is.
        name = method if num_seeds == most_seeds else f"{method} ({num_seeds} of {most_seeds} seeds)"
        lines.append([*place[:2], name, *(_mean_text(found.get(key)) for key, _ in shown)])
        baseline = next(iter(found.values())).baseline
        if method != baseline:
            lines.append(["", "", f"minus {baseline}", *(_difference_text(found.get(key)) for key, _ in shown)])
    return ["data", "backbone", "method", *(heading for _, heading in shown)], lines


def tests_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(columns, lines): a line per comparison of a tested metric."""
    columns = ["data", "backbone", "method", "metric", "difference", "95 % interval", "RelaImpr"]
    columns += ["p (t)", "p (permutation)", "p (t, Holm)", "p (permutation, Holm)", "pairs", "± over users"]
    headings, lines = dict(METRICS), []
    for row in rows:
        if row.difference is None or row.metric not in TESTED:
            continue
        found = row.difference
        lift = "" if row.lift is None else f"{row.lift:+.2%}"
        p_values = [found.t_p_value, found.permutation_p_value, row.holm_p, row.holm_permutation_p]
        p_values = [_p_text(value) for value in p_values]
        measured = [str(found), _interval_text(found.confidence_interval), lift, *p_values, str(found.num_pairs)]
        measured.append("" if row.user_error is None else f"{row.user_error:.4f}")
        lines.append([*row.place[:2], row.method, headings[row.metric], *measured])
    return columns, lines


def group_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(columns, lines): per user group and method, means and differences of what is measured within it."""
    sliced = [row for row in rows if row.place[2] != OVERALL]
    metrics = [(key, heading) for key, heading in METRICS if any(row.metric == key for row in sliced)]
    lines = []
    for place, method in _runs(sliced):
        found = {row.metric: row for row in sliced if (row.place, row.method) == (place, method)}
        texts = [_mean_text(found.get(key)) for key, _ in metrics]
        if method != next(iter(found.values())).baseline:
            differences = [_difference_text(found.get(key)) for key, _ in metrics]
            texts = [f"{text}; {change}" for text, change in zip(texts, differences, strict=True)]
        # Weighting bends low predictions downwards: only plain BCE's lowest scores tell of accidental clicks.
        floor = _mean_text(found.get("click_noise_floor")) if method == BASELINE else ""
        lines.append([*place[:2], place[2], method, *texts, floor])
    headings = [*(heading for _, heading in metrics), "click noise floor"]
    return ["data", "backbone", "group", "method", *headings], lines


def _runs(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str], str]]:
    return list(dict.fromkeys((row.place, row.method) for row in rows))


def overall(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.place[2] == OVERALL]


def _mean_text(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.mean:.4f}" + ("" if row.std is None else f" ({row.std:.4f})")


def _difference_text(row: Row | None) -> str:
    if row is None or row.difference is None:
        return "-"
    return f"{row.difference}{_stars(row.holm_p)}"


def _stars(p_value: float | None) -> str:
    """*, **, *** for adjusted p-values below .05, .01 and .001."""
    return "" if p_value is None else "*" * sum(p_value < limit for limit in (0.05, 0.01, 0.001))


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def _p_text(p_value: float | None) -> str:
    if p_value is None:
        return ""
    return f"{p_value:.4f}" if p_value >= 1e-4 else f"{p_value:.0e}"


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *lines]
    # An asterisk would start emphasis, a vertical bar a new cell.
    return "\n".join(
        "| " + " | ".join(str(cell).replace("*", "\\*").replace("|", "\\|") for cell in line) + " |" for line in cells
    )


def render_markdown(facts: dict[str, str], grids: Sequence[GridTables]) -> str:
    """The tables of a study as Markdown, without those of user groups.

    Args:
      facts: what the study was: command, date, versions, seeds.
      grids: its tables.
    """
    parts = ["\n".join(f"* {key}: {value}" for key, value in facts.items()), _LEGEND.replace("*", "\\*")]
    for grid in grids:
        rows = overall(grid.rows)
        parts += [f"### {grid.title}", markdown_table(*summary_table(rows)), *(f"* {note}" for note in grid.notes)]
        parts += ["Tests:", markdown_table(*tests_table(rows))]
    return "\n\n".join(parts) + "\n"


def render_groups_markdown(facts: dict[str, str], grids: Sequence[GridTables]) -> str:
    """What was measured within user groups, as Markdown; arguments as in ``render_markdown``.

    A document of its own: with two user groups it is ten times as long as the tables of the whole.
    """
    parts = ["\n".join(f"* {key}: {value}" for key, value in facts.items()), _LEGEND.replace("*", "\\*")]
    for grid in grids:
        columns, lines = group_table(grid.rows)
        if lines:
            parts += [f"### {grid.title}", markdown_table(columns, lines)]
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "Mean (standard deviation) over seeds; below it the paired difference to the baseline ± its standard error. Stars: "
    "Holm-adjusted p-value of the paired t-test below .05 (*), .01 (**), .001 (***); one family is one metric of one "
    "table, and each user group is a family of its own. Seeds share training and test rows unless the data is "
    "simulated: a small p-value is about other seeds, not about other users or days. What other users could change is "
    "the standard error over users, in a column of its own. RelaImpr = (AUC - .5) / (baseline AUC - .5) - 1. Placebo "
    "rows are named after what they shuffle."
)


def render_html(name: str, facts: dict[str, str], grids: Sequence[GridTables]) -> str:
    """The same as a self-contained page, with the differences as plots."""
    sections = []
    for grid in grids:
        rows = overall(grid.rows)
        plots = [svg(figure) for metric in TESTED if (figure := _forest(rows, metric)) is not None]
        tables = [("", summary_table(rows)), ("Tests", tests_table(rows)), ("User groups", group_table(grid.rows))]
        tables = [entry for entry in tables if entry[1][1]]
        sections.append({"title": grid.title, "plots": plots, "tables": tables, "notes": grid.notes})
    return render_page(_TEMPLATE, name=name, facts=facts, sections=sections, legend=_LEGEND)


def _forest(rows: Sequence[Row], metric: str) -> Figure | None:
    """Differences to the baseline with their 95 % intervals, a line per data, backbone and method."""
    shown = [row for row in rows if row.metric == metric and row.difference is not None]
    if not shown:
        return None
    figure = Figure(figsize=(7.5, 0.9 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for height, row in enumerate(reversed(shown)):
        low, high = row.difference.confidence_interval or (row.difference.mean,) * 2
        axes.plot([low, high], [height, height], color="#0072B2", linewidth=1.6)
        axes.plot([row.difference.mean], [height], "o", color="#0072B2", markersize=4)
    axes.axvline(0, color="#999999", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), [" ".join((*row.place[:2], row.method)) for row in reversed(shown)])
    tidy(axes, dict(METRICS)[metric], f"difference to {shown[0].baseline}, 95 % interval", "")
    return figure
