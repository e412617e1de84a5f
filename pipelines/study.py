"""Runs a study, data x backbone x method x seed, and writes what it shows.

Example:
  clsd study --study=small --study_dir=study
  clsd study --study=full --study_dir=study_full --input_dir=kuairand=path/to/kuairand

--study is the name of a study that comes with the package or the path of a YAML file, which declares all of it;
pipelines/studies/small.yaml is the one to copy. Datasets are fetched, simulated or read from --input_dir, and built
below <study_dir>/data; every run has a directory of its own below <study_dir>/runs. Finished runs are kept: a killed
study goes on where it was (SIGTERM saves the running ones and ends with status 75), and a study that grew by a method
only runs what is new. Leaves results.parquet (every measured number), tables.md, user_groups.md and report.html (both,
with plots) in the study directory.
"""

from __future__ import annotations

import collections
import concurrent.futures
import datetime as dt
import functools
import importlib.metadata
import multiprocessing
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.parquet
import rich.progress
from absl import flags

import clsd_tf
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.commands.interruption import TrainingInterruptedError, handling_sigterm
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import write_text
from clsd_tf.study.cells import (
    Cell,
    errors_over_users,
    is_finished,
    prepare_teacher,
    read_results,
    run_cell,
    run_seconds,
    run_task,
    start_worker,
    stopped_cells,
)
from clsd_tf.study.tables import (
    GridTables,
    compare,
    overall,
    render_groups_markdown,
    render_html,
    render_markdown,
    summary_table,
)
from clsd_tf.training.teachers.stored import scores_path
from pipelines.studies.config import StudyConfig, load_study
from pipelines.studies.data import PreparedData, prepared_data

_STUDY = flags.DEFINE_string("study", "small", "Name of a study, or path of a YAML file.")
_STUDY_DIR = flags.DEFINE_string("study_dir", None, "Directory for datasets, runs and tables.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", None, "Number of paired seeds, instead of the study's.", 1)
_INPUT_DIR = flags.DEFINE_multi_string("input_dir", [], "<name>=<directory> with the tables of a data set.")
_DATASET_DIR = flags.DEFINE_multi_string("dataset_dir", [], "<data>=<dataset directory> that is built already.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 2, "Runs side by side, one thread each.", 1)
_TASKS_PER_PROCESS = 40


def _directories(flag: str, values: Iterable[str]) -> dict[str, pathlib.Path]:
    """``name=path`` flags -> name -> path."""
    found = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not pathlib.Path(path).is_dir():
            raise ValueError(f"--{flag} takes <name>=<existing directory>. Received: {value!r}")
        found[name] = pathlib.Path(path)
    return found


def _run_tasks(title: str, tasks: dict[str, tuple[Callable, ...]]) -> None:
    """Runs ``label -> (function, *arguments)`` side by side in processes, under one bar with the time left.

    The first error ends the study; finished work is kept.
    """
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=console.console, disable=not console.console.is_terminal) as bar:
        progress = _Progress(bar, title, len(tasks))
        for batch in _batches(list(tasks.items()), _TASKS_PER_PROCESS * _NUM_PROCESSES.value):
            _run_batch(dict(batch), progress)


def _batches(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _run_batch(tasks: dict[str, tuple[Callable, ...]], progress: _Progress) -> None:
    """Runs tasks in fresh processes: TensorFlow keeps a little of every graph it has seen."""
    # Spawned, since TensorFlow's threads do not survive a fork. The executor's own max_tasks_per_child can deadlock.
    context = multiprocessing.get_context("spawn")
    with (
        handling_sigterm(_stop_workers),
        concurrent.futures.ProcessPoolExecutor(
            _NUM_PROCESSES.value, context, start_worker, (console.plugins(),)
        ) as pool,
    ):
        pending = {pool.submit(run_task, *task): label for label, task in tasks.items()}
        try:
            for done in concurrent.futures.as_completed(pending):
                done.result()
                progress.advance(pending[done])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _stop_workers(*_: object) -> None:
    """Passes SIGTERM on; the pool then waits until each worker has saved the run it trains."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    raise TrainingInterruptedError(
        "stopped by SIGTERM: finished runs and the checkpoints of the others are kept. "
        "Start the same command again to go on"
    )


class _Progress:
    """A bar, a line per finished task, and about how long the rest will take."""

    def __init__(self, bar: rich.progress.Progress, title: str, total: int):
        self._bar, self._total, self._count, self._start = bar, total, 0, time.monotonic()
        self._task = bar.add_task(title, total=total)

    def advance(self, label: str) -> None:
        self._count += 1
        seconds = (time.monotonic() - self._start) / self._count * (self._total - self._count)
        self._bar.advance(self._task)
        left = dt.timedelta(seconds=round(seconds))
        self._bar.console.print(f"[green]done[/] {label} ({self._count}/{self._total}, about {left} left)")


def _require_known(flag: str, given: Iterable[str], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"--{flag} names data of the study. Received: {unknown[0]!r}. Allowed: {', '.join(sorted(known))}"
        )


def _locate(study: StudyConfig, cells: Iterable[Cell], study_dir: pathlib.Path) -> dict[Cell, PreparedData]:
    dataset_dirs = _directories("dataset_dir", _DATASET_DIR.value)
    input_dirs = _directories("input_dir", _INPUT_DIR.value)
    _require_known("dataset_dir", dataset_dirs, {data.name for data in study.data})
    _require_known("input_dir", input_dirs, {data.input or data.name for data in study.data})
    return {
        cell: prepared_data(study.data_set(cell.data), cell.seed, study_dir, dataset_dirs, input_dirs) for cell in cells
    }


def _run(study: StudyConfig, cells: list[Cell], study_dir: pathlib.Path, located: dict[Cell, PreparedData]) -> None:
    for warning in {cell.config.warning for cell in cells}:
        console.warn(warning)
    for data in {str(data.dataset_dir): data for data in located.values()}.values():
        data.require_same_source()
    todo = [cell for cell in cells if not is_finished(cell, str(located[cell].dataset_dir), study_dir, study.split)]
    datasets = {str(located[cell].dataset_dir): located[cell] for cell in todo}
    _run_tasks(
        "datasets",
        {path: (data.prepare,) for path, data in datasets.items() if not pathlib.Path(path).exists()},
    )
    _run_tasks("teachers", dict(_teacher_tasks(todo, located)))
    _run_tasks(
        "runs",
        {
            str(cell): (run_cell, cell, str(located[cell].dataset_dir), study_dir, study.split, located[cell].truth)
            for cell in todo
        },
    )


def _teacher_tasks(cells: Iterable[Cell], located: dict[Cell, PreparedData]) -> Iterable[tuple[str, tuple]]:
    """One task per teacher: cells that share it must not train it twice."""
    open_dataset = functools.cache(DatasetDir)
    seen = set()
    for cell in cells:
        path = str(located[cell].dataset_dir)
        for run in cell.config.teacher_runs:
            file = scores_path(open_dataset(path), cell.config, run)
            if file not in seen and not file.exists():
                seen.add(file)
                yield f"teacher of {cell}", (prepare_teacher, path, cell.config)


def _facts(study: StudyConfig, session_seconds: float, all_seconds: float) -> dict[str, str]:
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tensorflow", "tf-keras", "numpy"))
    return {
        "command": shlex.join(["python", "-m", "pipelines.study", *sys.argv[1:]]),
        "date": dt.date.today().isoformat(),
        "versions": f"Python {platform.python_version()}, clsd_tf {clsd_tf.__version__}, {libraries}",
        "seeds": "; ".join(f"{grid.seeds or study.seeds} ({grid.title})" for grid in study.grids),
        "split": study.split,
        "this session took": f"{dt.timedelta(seconds=round(session_seconds))} with {_NUM_PROCESSES.value} processes",
        "all runs together took": f"{dt.timedelta(seconds=round(all_seconds))} of a process, teachers not counted",
    }


def _write_tables(
    study: StudyConfig,
    cells: list[Cell],
    study_dir: pathlib.Path,
    located: dict[Cell, PreparedData],
    facts: dict[str, str],
) -> None:
    results = read_results(cells, study_dir)
    dataset_paths = {cell: str(data.dataset_dir) for cell, data in located.items()}
    pyarrow.parquet.write_table(pa.Table.from_pylist(results), study_dir / "results.parquet")
    grids = []
    for grid in study.grids:
        shown = list(study.cells(grid))
        keys = {(cell.data, cell.backbone, cell.method, cell.seed) for cell in shown}
        rows = compare(
            (row for row in results if (row["data"], row["backbone"], row["method"], row["seed"]) in keys),
            errors_over_users(shown, study_dir, dataset_paths, study.split, grid.baseline),
            grid.baseline,
        )
        grids.append(GridTables(grid.title, rows, _stopped_notes(shown, study_dir)))
        console.print_table(grid.title, *summary_table(overall(rows), "study_console"))
    write_text(study_dir / "tables.md", render_markdown(facts, grids))
    write_text(study_dir / "user_groups.md", render_groups_markdown(facts, grids))
    write_text(study_dir / "report.html", render_html(_STUDY.value, facts, grids))


def _stopped_notes(cells: list[Cell], study_dir: pathlib.Path) -> list[str]:
    """A line for each method of which runs were stopped: how many of its seeds, and why the first was."""
    messages: dict[tuple[str, str, str], list[str]] = {}
    for cell, message in stopped_cells(cells, study_dir).items():
        messages.setdefault((cell.data, cell.backbone, cell.method), []).append(f"at seed {cell.seed}: {message}")
    counts = collections.Counter((cell.data, cell.backbone, cell.method) for cell in cells)
    return [
        f"{' '.join(run)} was stopped on {len(found)} of {counts[run]} seeds; {found[0]}"
        for run, found in messages.items()
    ]


def main(argv) -> None:
    start = time.monotonic()
    study = load_study(_STUDY.value)
    if _SEEDS.value is not None:
        grids = tuple(grid.model_copy(update={"seeds": None}) for grid in study.grids)
        study = study.model_copy(update={"seeds": _SEEDS.value, "grids": grids})
    study_dir = pathlib.Path(_STUDY_DIR.value)
    # Grids may share cells; each is run once.
    cells = list({str(cell): cell for grid in study.grids for cell in study.cells(grid)}.values())
    located = _locate(study, cells, study_dir)
    _run(study, cells, study_dir, located)
    _write_tables(
        study, cells, study_dir, located, _facts(study, time.monotonic() - start, run_seconds(cells, study_dir))
    )
    console.console.print(f"results.parquet, tables.md, user_groups.md and report.html in {study_dir}", soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
