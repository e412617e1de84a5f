"""The confidence report: click confidence, judged by an intensity signal that training never read."""

from __future__ import annotations

import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clsd_tf.metrics.significance import bootstrap_interval
from clsd_tf.pages.plots import COLORS, LINE_STYLE, panel_grid, render_page, svg, tidy

_TEMPLATE = pathlib.Path(__file__).with_name("confidence_report.html")

Array = np.ndarray
Groups = Mapping[str, tuple[Array, Sequence[str]]]  # User group -> (ids [num_rows], label of each id).

_MIN_ROWS = 20  # Of a user group, and of a reliability bin.
_MAX_BINS = 10
_INTERVAL = 0.95

# The measures of a table, in order: key, heading.
HEADLINES = (
    ("num_clicks", "clicks"),
    ("mean_confidence", "mean confidence"),
    ("mean_intensity_label", "mean intensity"),
    ("auc", "AUC of intensity"),
    ("spearman", "Spearman"),
)


def global_and_local_confidence(scores: Array, groups: Groups) -> dict[str, Array]:
    """Click confidence, global and local, before clipping and mixing.

    global = scores / mean(scores)
    local = 1 + scores - mean(scores of the clicks of the same group), where AdGate ends if it reads that group alone

    Within a group both rank clicks as the scores do; they differ in how they rank clicks of different groups.

    Args:
      scores: teacher scores of the clicks, [num_clicks], in [0, 1].
      groups: user groups; local confidence takes the first and is left out where there is none.

    Returns:
      ``global`` and ``local``, each [num_clicks] with mean 1; ``local`` also within each label of the first group.

    Raises:
      ValueError: no clicks, or scores that are not finite or all 0.

    Source: CLSD (arXiv 2309.16322), abstract; the equations are those of ``clsd_tf.methods.clsd.confidence``.
    """
    scores = np.asarray(scores, np.float64)
    _require_finite("scores", scores)
    if not scores.any():
        raise ValueError(f"one click or more must score above 0. Received: {len(scores)} clicks. Choose another split")
    found = {"global": scores / scores.mean()}
    if groups:
        ids, _ = next(iter(groups.values()))
        _, codes = np.unique(ids, return_inverse=True)
        found["local"] = 1.0 + scores - (np.bincount(codes, scores) / np.bincount(codes))[codes]
    return found


def measure_confidence(
    confidence: Array,
    intensity_label: Array | None,
    intensity_value: Array | None,
    groups: Groups,
    users: Array,
    *,
    num_resamples: int = 300,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures how well click confidence tells strong interest from weak, among clicks alone.

    A user's clicks are alike, so intervals come from resampling whole users. Rows have equal weight.

    Args:
      confidence: of each click, finite, [num_clicks].
      intensity_label: 1 for strong interest, else 0, [num_clicks]; None if there is none.
      intensity_value: what grows with interest (seconds played, a rating), [num_clicks]; NaN where it is missing; None
        if there is none.
      groups: user groups; labels with fewer than 20 clicks are left out.
      users: int, [num_clicks].
      num_resamples: of each bootstrap. With 300, chance moves the ends of an interval by 8 % of its half width.
      seed: of the bootstraps.

    Returns:
      ``overall`` and ``groups`` (user group -> label -> measures), ready for JSON. Measures: ``num_clicks`` and
      ``num_users``; ``mean_confidence``, ``mean_intensity_label``, ``auc`` (of confidence against the label) and
      ``spearman`` (rank correlation of confidence with the value), each with its ``value`` and 95 % ``interval``, None
      where it is not defined; ``reliability``, see ``_reliability``.

    Raises:
      ValueError: no clicks, columns of different lengths, confidence that is not finite, or nothing to judge it by.
    """
    clicks = _Clicks(
        confidence=np.asarray(confidence, np.float64),
        users=np.unique(users, return_inverse=True)[1],
        intensity_label=None if intensity_label is None else np.asarray(intensity_label, np.float64),
        intensity_value=None if intensity_value is None else np.asarray(intensity_value, np.float64),
    )
    _check(clicks, groups)
    bootstrap = functools.partial(bootstrap_interval, num_resamples=num_resamples, seed=seed, confidence=_INTERVAL)
    return {
        "overall": _measure(clicks, bootstrap),
        "groups": {
            name: {
                label: _measure(clicks.rows(ids == index), bootstrap)
                for index, label in enumerate(labels)
                if np.count_nonzero(ids == index) >= _MIN_ROWS
            }
            for name, (ids, labels) in groups.items()
        },
    }


class _Clicks(NamedTuple):
    """One value a click, each [num_clicks]; None for a signal that the spec does not declare."""

    confidence: Array
    users: Array
    intensity_label: Array | None
    intensity_value: Array | None

    def rows(self, chosen: Array) -> _Clicks:
        label, value = self.intensity_label, self.intensity_value
        return _Clicks(
            self.confidence[chosen],
            self.users[chosen],
            None if label is None else label[chosen],
            None if value is None else value[chosen],
        )


def _check(clicks: _Clicks, groups: Groups) -> None:
    if clicks.intensity_label is None and clicks.intensity_value is None:
        raise ValueError(
            "click confidence is judged by an intensity signal. Received: neither intensity_label nor intensity_value. "
            "Declare one of them in the feature spec and build the dataset again"
        )
    lengths = {name: len(values) for name, values in clicks._asdict().items() if values is not None}
    lengths |= {name: len(ids) for name, (ids, _) in groups.items()}
    if len(set(lengths.values())) > 1 or not len(clicks.confidence):
        raise ValueError(f"columns need equal lengths >= 1, one value a click. Received: {lengths}")
    _require_finite("confidence", clicks.confidence)


def _require_finite(name: str, values: Array) -> None:
    num_wrong = np.count_nonzero(~np.isfinite(values))
    if num_wrong:
        raise ValueError(f"{name} must be finite. Received: {num_wrong} that are not. Leave out rows without a score")


def _measure(clicks: _Clicks, bootstrap: Callable[..., tuple[float, float] | None]) -> dict[str, Any]:
    confidence, users, label, value = clicks
    undefined: dict[str, Any] = {"value": None, "interval": None}
    spearman = undefined
    if value is not None and (known := np.isfinite(value)).any():
        spearman = _estimate(_spearman, [_codes(confidence[known]), _codes(value[known])], bootstrap, users[known])
    return {
        "num_clicks": len(users),
        "num_users": len(np.unique(users)),
        "mean_confidence": _mean(confidence, users, bootstrap),
        "mean_intensity_label": undefined if label is None else _mean(label, users, bootstrap),
        "auc": undefined if label is None else _estimate(_auc, [_codes(confidence), label > 0.5], bootstrap, users),
        "spearman": spearman,
        "reliability": _reliability(clicks),
    }


def _estimate(
    statistic: Callable[..., float | None],
    columns: Sequence[Array],
    bootstrap: Callable[..., tuple[float, float] | None],
    clusters: Array | None = None,
) -> dict[str, Any]:
    value = statistic(*columns)
    interval = None if value is None else bootstrap(statistic, columns, clusters=clusters)
    return {"value": value, "interval": interval and list(interval)}


def _mean(values: Array, users: Array, bootstrap: Callable[..., tuple[float, float] | None]) -> dict[str, Any]:
    # The sum and count of each user are all that a mean over resampled users needs.
    sums, counts = _by_user(values, users)
    return _estimate(lambda sums, counts: float(sums.sum() / counts.sum()), [sums, counts], bootstrap)


def _by_user(values: Array, users: Array) -> tuple[Array, Array]:
    """(sum of values, number of rows) of each user that has rows."""
    _, codes = np.unique(users, return_inverse=True)
    return np.bincount(codes, values), np.bincount(codes)


def _codes(values: Array) -> Array:
    """0 for the smallest value, 1 for the next, ...: all that rank statistics see of the values."""
    return np.unique(values, return_inverse=True)[1]


def _mid_ranks(codes: Array) -> Array:
    """Rank of each row from 1, ties at the middle of theirs. Counting, unlike sorting, is fast enough to bootstrap."""
    counts = np.bincount(codes)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def _auc(confidence_codes: Array, is_intense: Array) -> float | None:
    """Mann-Whitney: (sum of ranks of the intense - n (n + 1) / 2) / (n * number of the others)."""
    num_intense = int(is_intense.sum())
    num_others = len(is_intense) - num_intense
    if not (num_intense and num_others):
        return None
    rank_sum = _mid_ranks(confidence_codes)[is_intense].sum()
    return float((rank_sum - num_intense * (num_intense + 1) / 2) / (num_intense * num_others))


def _spearman(confidence_codes: Array, value_codes: Array) -> float | None:
    """Pearson's correlation of the ranks."""
    ranks, value_ranks = (_mid_ranks(codes) - (len(codes) + 1) / 2 for codes in (confidence_codes, value_codes))
    # Sums of products, since the threads of a dot product cost more than vectors of this length are worth.
    scale = float(np.sqrt(np.square(ranks).sum() * np.square(value_ranks).sum()))
    return float((ranks * value_ranks).sum()) / scale if scale else None


def _reliability(clicks: _Clicks) -> list[dict[str, Any]]:
    """Clicks sorted by confidence and cut into up to 10 bins of equal mass, of 20 clicks or more.

    Returns:
      Per bin: ``num_clicks``, ``mean_confidence``, ``mean_intensity_label`` with its 95 % ``interval``, and
      ``mean_intensity_value`` over the clicks that have one; None where there is nothing to average.
    """
    order = np.argsort(clicks.confidence, kind="stable")
    num_bins = min(_MAX_BINS, max(1, len(order) // _MIN_ROWS))
    bins = []
    for rows in np.array_split(order, num_bins):
        confidence, users, label, value = clicks.rows(rows)
        known = np.array([]) if value is None else value[np.isfinite(value)]
        bins.append(
            {
                "num_clicks": len(rows),
                "mean_confidence": float(confidence.mean()),
                "mean_intensity_label": None if label is None else float(label.mean()),
                "interval": None if label is None else _share_interval(*_by_user(label, users)),
                "mean_intensity_value": float(known.mean()) if len(known) else None,
            }
        )
    return bins


def _share_interval(successes: Array, trials: Array) -> list[float]:
    """Wilson's 95 % interval of sum(successes) / sum(trials), with the effective number of trials.

    effective = sum(trials) / max(1, design_effect), where design_effect = variance of the share over users / variance
    if trials were independent. Unlike the bootstrap it has a width where all trials of a small bin end alike.

    Args:
      successes: of each user, [num_users].
      trials: of each user, [num_users].

    Source: Franco et al. (2019), "Comparative study of confidence intervals for proportions in complex sample surveys".
    """
    count, share = trials.sum(), successes.sum() / trials.sum()
    independent = count * share * (1 - share)
    design_effect = ((successes - share * trials) ** 2).sum() / independent if independent > 0 else 1.0
    per_trial = statistics.NormalDist().inv_cdf((1 + _INTERVAL) / 2) ** 2 * max(1.0, design_effect) / count
    center = share + per_trial / 2
    margin = np.sqrt(per_trial * share * (1 - share) + per_trial**2 / 4)
    return [float((center - margin) / (1 + per_trial)), float((center + margin) / (1 + per_trial))]


def table_rows(measured: dict[str, Any]) -> list[list[Any]]:
    """Lays out measured confidence as a table under ``HEADLINES``.

    Args:
      measured: from ``measure_confidence``.

    Returns:
      Overall first, then a row for each group; estimates as "value [low, high]".
    """
    entries = {"overall": measured["overall"]}
    for name, labels in measured["groups"].items():
        entries |= {f"{name} {label}": entry for label, entry in labels.items()}
    return [[name, *(_cell(entry[key]) for key, _ in HEADLINES)] for name, entry in entries.items()]


def _cell(measure: int | dict[str, Any]) -> int | str:
    if isinstance(measure, int):
        return measure
    if measure["value"] is None:
        return "-"
    text = f"{measure['value']:.3f}"
    return f"{text} [{measure['interval'][0]:.3f}, {measure['interval'][1]:.3f}]" if measure["interval"] else text


def render_confidence_report(
    measured: Mapping[str, dict[str, Any]], noise_floor: dict[str, dict[str, dict[str, Any]]], facts: Mapping[str, Any]
) -> str:
    """Renders the report.

    Args:
      measured: ``global`` and ``local`` -> from ``measure_confidence``.
      noise_floor: from ``clsd_tf.metrics.noise_floor.click_noise_floor``.
      facts: ``split``, ``scores`` (what made them), ``label``, ``intensity_label``, ``intensity_value`` (None where
        the spec has none) and ``dataset_fingerprint``.

    Returns:
      A self-contained HTML page: no scripts, nothing loaded from elsewhere.
    """
    return render_page(
        _TEMPLATE,
        facts=facts,
        headings=[heading for _, heading in HEADLINES],
        tables={part: table_rows(entry) for part, entry in measured.items()},
        first_group=next(iter(noise_floor), None),
        reliability=svg(_reliability_curves(measured)),
        noise_floor={name: svg(_floor_bars(labels)) for name, labels in noise_floor.items()},
    )


def _reliability_curves(measured: Mapping[str, dict[str, Any]]) -> Figure:
    """Mean intensity against mean confidence: one small panel overall and one per label of the first user group."""
    panels = {"overall": {part: entry["overall"] for part, entry in measured.items()}}
    first = next(iter(measured.values()))["groups"]
    for name in list(first)[:1]:
        for label in first[name]:
            panels[label] = {part: entry["groups"][name][label] for part, entry in measured.items()}
    figure, grid = panel_grid(len(panels), (2.5, 2.3))
    for axes, (title, parts) in zip(grid, panels.items(), strict=True):
        for (part, entry), color in zip(parts.items(), COLORS, strict=False):
            _draw_reliability(axes, entry["reliability"], part, color)
        num_clicks = next(iter(parts.values()))["num_clicks"]
        tidy(axes, f"{title} ({num_clicks:,} clicks)", "mean confidence", "mean intensity")
    grid[0].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _draw_reliability(axes: Axes, bins: list[dict[str, Any]], part: str, color: str) -> None:
    """The label's mean with its interval, or the value's mean where no label is declared."""
    key = "mean_intensity_value" if bins[0]["interval"] is None else "mean_intensity_label"
    drawn = [entry for entry in bins if entry[key] is not None]
    confidence, intensity = ([entry[name] for entry in drawn] for name in ("mean_confidence", key))
    axes.plot(confidence, intensity, label=part, color=color, **LINE_STYLE)
    if key == "mean_intensity_label":
        axes.vlines(confidence, *zip(*(entry["interval"] for entry in drawn), strict=True), color=color, linewidth=1)


def _floor_bars(labels: dict[str, dict[str, Any]]) -> Figure:
    """A bar per label of 20 impressions or more: those of fewer would set the scale by chance."""
    drawn = {label: entry for label, entry in labels.items() if entry["num_rows"] >= _MIN_ROWS}
    figure = Figure(figsize=(7.0, 0.6 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    floors = [entry["floor"] for entry in drawn.values()]
    names = [f"{label} ({entry['num_rows']:,} rows)" for label, entry in drawn.items()]
    bars = axes.barh(names, floors, height=0.6, color=COLORS[0])
    axes.bar_label(bars, [f"{floor:.3f}" for floor in floors], fontsize=8, padding=3)
    axes.invert_yaxis()
    tidy(axes, "", "mean of the lowest scores", "")
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    return figure
