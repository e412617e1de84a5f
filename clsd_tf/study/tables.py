"""Tables of a study: differences to a baseline over paired seeds, with tests, as Markdown and HTML."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clsd_tf.metrics.significance import PairedDifference, holm, paired_difference, rela_impr
from clsd_tf.metrics.table import METRICS, Metric, Report, metrics_in
from clsd_tf.pages.plots import render_page, svg, tidy
from clsd_tf.study.cells import BASELINE
from clsd_tf.study.measures import OVERALL

_TEMPLATE = pathlib.Path(__file__).with_name("report.html")


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
    """Compares the methods of a grid with its baseline.

    Args:
      results: from ``clsd_tf.study.cells.read_results``: the rows of one grid, the family of Holm's correction.
      user_errors: from ``clsd_tf.study.cells.errors_over_users``.
      baseline: the method that all others are compared with.

    Returns:
      A row for each place, method and metric, in the order of the results.

    Raises:
      ValueError: results of a metric that is not in the table of metrics.
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
    base, chance = float(np.mean(paired)), METRICS[metric].chance
    lift = None if chance is None else rela_impr(base + difference.mean, base, chance)
    return dataclasses.replace(row, difference=difference, lift=lift)


def _with_holm(rows: list[Row]) -> list[Row]:
    families: dict[tuple[str, str], dict[int, PairedDifference]] = {}
    for index, row in enumerate(rows):
        if row.difference is not None:
            # Slices are other questions than the whole: each makes a family of its own.
            families.setdefault((row.metric, row.place[2]), {})[index] = row.difference
    adjusted = list(rows)
    for family in families.values():
        of_t = holm([difference.t_p_value for difference in family.values()])
        of_permutation = holm([difference.permutation_p_value for difference in family.values()])
        for index, t, permutation in zip(family, of_t, of_permutation, strict=True):
            adjusted[index] = dataclasses.replace(rows[index], holm_p=t, holm_permutation_p=permutation)
    return adjusted


def summary_table(rows: Sequence[Row], report: Report = "study") -> tuple[list[str], list[list[str]]]:
    """Makes a table with a line of means per data, backbone and method, and below it one of differences.

    Args:
      rows: from ``compare``, of one slice.
      report: whose metrics it shows, where they were measured.

    Returns:
      (columns, lines).
    """
    shown = _measured(rows, report)
    most_seeds = max((row.num_seeds for row in rows), default=0)
    lines = []
    for place, method in _runs(rows):
        found = {row.metric: row for row in rows if (row.place, row.method) == (place, method)}
        num_seeds = max(row.num_seeds for row in found.values())
        # Means of fewer seeds than the others' are no means of the same runs: the line of differences is.
        name = method if num_seeds == most_seeds else f"{method} ({num_seeds} of {most_seeds} seeds)"
        lines.append([*place[:2], name, *(_mean_text(found.get(metric.name)) for metric in shown)])
        baseline = next(iter(found.values())).baseline
        if method != baseline:
            differences = (_difference_text(found.get(metric.name)) for metric in shown)
            lines.append(["", "", f"minus {baseline}", *differences])
    return ["data", "backbone", "method", *(metric.heading for metric in shown)], lines


def _measured(rows: Sequence[Row], report: Report) -> list[Metric]:
    """Metrics of a report that rows have, and tables show."""
    measured = {row.metric for row in rows}
    return [metric for metric in metrics_in(report) if metric.heading and metric.name in measured]


def tests_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Makes a table with a line per comparison of a tested metric.

    Args:
      rows: from ``compare``, of one slice.

    Returns:
      (columns, lines).
    """
    columns = ["data", "backbone", "method", "metric", "difference", "95 % interval", "RelaImpr"]
    columns += ["p (t)", "p (permutation)", "p (t, Holm)", "p (permutation, Holm)", "pairs", "± over users"]
    tested = {metric.name: metric.heading for metric in _measured(rows, "study_tests")}
    lines = []
    for row in rows:
        if row.difference is None or row.metric not in tested:
            continue
        found = row.difference
        lift = "" if row.lift is None else f"{row.lift:+.2%}"
        p_values = (found.t_p_value, found.permutation_p_value, row.holm_p, row.holm_permutation_p)
        measured = [str(found), _interval_text(found.confidence_interval), lift, *map(_p_text, p_values)]
        measured.append(str(found.num_pairs))
        measured.append("" if row.user_error is None else f"{row.user_error:.4f}")
        lines.append([*row.place[:2], row.method, tested[row.metric], *measured])
    return columns, lines


def group_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Makes a table with a line per user group and method, of means and differences within the group.

    Args:
      rows: from ``compare``.

    Returns:
      (columns, lines).
    """
    sliced = [row for row in rows if row.place[2] != OVERALL]
    shown = _measured(sliced, "study_groups")
    lines = []
    for place, method in _runs(sliced):
        found = {row.metric: row for row in sliced if (row.place, row.method) == (place, method)}
        baseline = next(iter(found.values())).baseline
        cells = (_group_cell(metric, found.get(metric.name), method, baseline) for metric in shown)
        lines.append([*place, method, *cells])
    return ["data", "backbone", "group", "method", *(metric.heading for metric in shown)], lines


def _group_cell(metric: Metric, row: Row | None, method: str, baseline: str) -> str:
    """A mean and, where there is one, its difference."""
    if metric.of_baseline:
        return _mean_text(row) if method == BASELINE else ""
    return _mean_text(row) if method == baseline else f"{_mean_text(row)}; {_difference_text(row)}"


def _runs(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str], str]]:
    return list(dict.fromkeys((row.place, row.method) for row in rows))


def overall(rows: Sequence[Row]) -> list[Row]:
    """Selects from ``rows`` those of the whole split, without those of user groups.

    Returns:
      Rows in their order.
    """
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
    """Writes a table as Markdown, in which cells keep their text.

    Args:
      columns: [num_columns].
      lines: [num_lines][num_columns].

    Returns:
      A line of text for each of the table, without a newline at the end.
    """
    cells = [columns, ["---"] * len(columns), *lines]
    # An asterisk would start emphasis, a vertical bar a new cell.
    return "\n".join(
        "| " + " | ".join(str(cell).replace("*", "\\*").replace("|", "\\|") for cell in line) + " |" for line in cells
    )


def render_markdown(facts: dict[str, str], grids: Sequence[GridTables]) -> str:
    """Writes the tables of a study as Markdown, without those of user groups.

    Args:
      facts: what the study was: command, date, versions, seeds.
      grids: its tables.

    Returns:
      The content of a file.
    """
    parts = ["\n".join(f"* {key}: {value}" for key, value in facts.items()), _LEGEND.replace("*", "\\*")]
    for grid in grids:
        rows = overall(grid.rows)
        parts += [f"### {grid.title}", markdown_table(*summary_table(rows)), *(f"* {note}" for note in grid.notes)]
        parts += ["Tests:", markdown_table(*tests_table(rows))]
    return "\n\n".join(parts) + "\n"


def render_groups_markdown(facts: dict[str, str], grids: Sequence[GridTables]) -> str:
    """Writes what was measured within user groups, as Markdown.

    A document of its own: with two user groups it is ten times as long as the tables of the whole.

    Args:
      facts: as of ``render_markdown``.
      grids: its tables; those without user groups are left out.

    Returns:
      The content of a file.
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
    """Renders all tables of a study, with the differences as plots.

    Args:
      name: of the study.
      facts: as of ``render_markdown``.
      grids: its tables.

    Returns:
      A self-contained HTML page.
    """
    sections = []
    for grid in grids:
        rows = overall(grid.rows)
        plots = [svg(figure) for metric in metrics_in("study_tests") if (figure := _forest(rows, metric)) is not None]
        tables = [("", summary_table(rows)), ("Tests", tests_table(rows)), ("User groups", group_table(grid.rows))]
        tables = [entry for entry in tables if entry[1][1]]
        sections.append({"title": grid.title, "plots": plots, "tables": tables, "notes": grid.notes})
    return render_page(_TEMPLATE, name=name, facts=facts, sections=sections, legend=_LEGEND)


def _forest(rows: Sequence[Row], metric: Metric) -> Figure | None:
    """Differences to the baseline with their 95 % intervals, a line per data, backbone and method."""
    shown = [(row, row.difference) for row in rows if row.metric == metric.name and row.difference is not None]
    if not shown:
        return None
    figure = Figure(figsize=(7.5, 0.9 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for height, (_, difference) in enumerate(reversed(shown)):
        low, high = difference.confidence_interval or (difference.mean, difference.mean)
        axes.plot([low, high], [height, height], color="#0072B2", linewidth=1.6)
        axes.plot([difference.mean], [height], "o", color="#0072B2", markersize=4)
    axes.axvline(0, color="#999999", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), [" ".join((*row.place[:2], row.method)) for row, _ in reversed(shown)])
    axis = f"difference to {shown[0][0].baseline}, 95 % interval"
    tidy(axes, metric.heading, f"{axis}; {metric.better} is better" if metric.better else axis, "")
    return figure
