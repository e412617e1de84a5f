"""Daily training: each day is measured by the model of the day before, which then goes on training on it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from clsd_tf.continual.progressive_validation import identity, validate_progressively
from clsd_tf.metrics.table import headlines
from clsd_tf.storage.dataset_dir import DatasetDir, DatasetLayout
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.config import TrainConfig
from clsd_tf.training.run import train


@dataclasses.dataclass(frozen=True)
class Day:
    """A day (UTC), its dataset, and the work directory of its run."""

    date: dt.date
    dataset: DatasetDir
    work_dir: WorkDir


def days_between(first: dt.date, last: dt.date, datasets: str, work_dirs: str) -> list[Day]:
    """Finds the datasets of the days from ``first`` to ``last``, both included.

    Args:
      first: date.
      last: date, not before ``first``.
      datasets: path of a dataset directory with ``{date}`` in it, which stands for YYYY-MM-DD.
      work_dirs: path of a work directory, likewise.

    Returns:
      The days in order; their work directories need not exist.

    Raises:
      ValueError: ``last`` is before ``first``, or a path has no ``{date}``.
      ArtifactError: a day has no dataset, or one with events of another day.
    """
    for name, pattern in (("datasets", datasets), ("work_dirs", work_dirs)):
        if "{date}" not in pattern:
            raise ValueError(f"{name} must hold {{date}}, which stands for YYYY-MM-DD. Received: {pattern!r}")
    if last < first:
        raise ValueError(f"the last date must not be before the first. Received: {first} to {last}")
    dates = [first + dt.timedelta(days=index) for index in range((last - first).days + 1)]
    paths = {date: pathlib.Path(datasets.replace("{date}", date.isoformat())) for date in dates}
    missing = [date.isoformat() for date, path in paths.items() if not DatasetLayout(path).success.is_file()]
    if missing:
        raise ArtifactError(
            f"every day from {first} to {last} needs a complete dataset. Missing: {', '.join(missing)} "
            f"({datasets}). Run `python -m pipelines.build_dataset` for them, each with --grow_from the day before"
        )
    days = [
        Day(date, DatasetDir(path), WorkDir(work_dirs.replace("{date}", date.isoformat())))
        for date, path in paths.items()
    ]
    for day in days:
        _require_events_of_the_day(day)
    return days


def _require_events_of_the_day(day: Day) -> None:
    splits = day.dataset.counts["splits"].values()
    times = [dt.datetime.fromisoformat(entry[name]) for entry in splits for name in ("first_event", "last_event")]
    if {time.astimezone(dt.timezone.utc).date() for time in times} != {day.date}:
        raise ArtifactError(
            f"the dataset of a day holds events of that day, in UTC. Received: {day.dataset.path} with events from "
            f"{min(times)} to {max(times)}. Allowed: {day.date}"
        )


def train_daily(days: Sequence[Day], config: TrainConfig, *, title: str | None = "train") -> Iterator[dict[str, Any]]:
    """Measures and trains day by day; what is done already is not done again, so that a killed one goes on.

    The first day is only trained on, unless its run is there already. Every other day is first measured, in all of its
    rows, by the run of the day before; then a run trains on its training split, warm-started from that one. Validation
    rows stop and calibrate that run as in any other; they and test rows are measured, but no run trains on them.

    Args:
      days: consecutive.
      config: of every run.
      title: what progress lines call a run, before the date; None for no progress lines.

    Yields:
      After each day: ``date``, ``trained_rows``, and ``prequential``, its progressive validation, None where there was
      none.

    Raises:
      ArtifactError: a run or dataset does not fit the day before it.
      As ``clsd_tf.training.run.train``.
    """
    previous: Day | None = None
    for day in days:
        if previous is not None:
            _measure(previous.work_dir, day)
        if previous is not None or not day.work_dir.is_complete:
            train(
                day.dataset,
                config,
                day.work_dir,
                title=title and f"{title} {day.date}",
                init_from=previous.work_dir if previous else None,
            )
        day.work_dir.require_complete(day.dataset)
        measured = read_json(day.work_dir.prequential) if day.work_dir.prequential.exists() else None
        yield {
            "date": day.date.isoformat(),
            "trained_rows": day.dataset.num_rows("train"),
            "prequential": measured,
        }
        previous = day


def _measure(earlier: WorkDir, day: Day) -> None:
    """Writes what ``earlier`` says of the day, unless it stands there: before anything trains on the day."""
    with day.work_dir.exclusive():
        if not day.work_dir.prequential.exists():
            write_json(day.work_dir.prequential, validate_progressively(earlier, day.dataset))
            return
    expected = identity(earlier, day.dataset)
    there = read_json(day.work_dir.prequential)
    received = {name: there[name] for name in expected}
    if received != expected:
        raise ArtifactError(
            f"{day.work_dir.path} was measured by another run or on another dataset. Received: {received}. "
            f"Allowed: {expected}. Choose other --work_dirs"
        )


def days_table(days: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Makes a table with a line per day.

    Args:
      days: from ``train_daily``.

    Returns:
      (columns, lines): date, training rows and the metrics of the progressive validation, None where there was none.
    """
    measured = [day["prequential"]["overall"] if day["prequential"] else {} for day in days]
    shown = headlines(itertools.chain.from_iterable(measured))
    lines = [
        [day["date"], day["trained_rows"], *(overall.get(metric.name) for metric in shown)]
        for day, overall in zip(days, measured, strict=True)
    ]
    return ["day", "trained rows", *(metric.heading for metric in shown)], lines
