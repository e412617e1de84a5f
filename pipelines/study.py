"""Compares methods over paired seeds on one dataset.

Example:
  python -m pipelines.study --dataset_dir=demo/dataset --study_dir=demo/study --methods=bce,clsd_cross_fit --seeds=5

Each cell (method, seed) is a run of its own in <study_dir>/<method>/seed_<n>; finished cells are kept, so a killed
study goes on where it was. Early stopping uses the validation split, the table the evaluated split. The table gives
"mean (std)" of each method and below it the mean difference to the baseline +- its standard error over the seeds.
"""

import concurrent.futures
import multiprocessing
import pathlib

import rich.progress
from absl import flags

from clsd_tf import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.artifacts import SPLITS, write_json
from clsd_tf.study import METHODS, METRICS, Cell, run_cell, summarise, table_rows, use_one_thread
from clsd_tf.training import load_config, teacher_warning

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory.", required=True)
_STUDY_DIR = flags.DEFINE_string("study_dir", None, "Directory for the runs and results.json.", required=True)
_METHODS = flags.DEFINE_list("methods", ["bce", "clsd_cross_fit"], f"Methods to compare: {', '.join(METHODS)}.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds: 1, 2, ...", 1)
_SPLIT = flags.DEFINE_enum("split", "test", SPLITS, "Split that the table is about.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 2, "Runs side by side, one thread each.", 1)
_CONFIG = flags.DEFINE_string("config", None, "YAML file with settings that all methods share.")
_SET = flags.DEFINE_multi_string("set", [], "key=value on top of --config, for all methods; may be repeated.")


def run_cells(cells: list[Cell]) -> None:
    """Runs all cells in processes of their own, with a live bar."""
    shared = load_config(_CONFIG.value, _SET.value)
    # A wrong method or config fails before anything runs, and each warning is given once.
    for warning in {teacher_warning(cell.config(shared)) for cell in cells}:
        console.warn(warning)
    # Spawned, since TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(_NUM_PROCESSES.value, context, use_one_thread) as pool:
        arguments = (_DATASET_DIR.value, _STUDY_DIR.value, shared, _SPLIT.value)
        pending = [pool.submit(run_cell, cell, *arguments) for cell in cells]
        try:
            _watch(pending)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _watch(pending: list[concurrent.futures.Future]) -> None:
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, console=console.console, disable=not console.console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(pending))
        for done in concurrent.futures.as_completed(pending):
            cell = done.result()
            bar.advance(task)
            bar.console.print(f"[green]done[/] {cell.method} seed {cell.seed}")


def main(argv) -> None:
    if len(set(_METHODS.value)) != len(_METHODS.value):
        raise ValueError(f"each method may be named once. Received: --methods={','.join(_METHODS.value)}")
    study_dir = pathlib.Path(_STUDY_DIR.value)
    cells = [Cell(method, seed) for method in _METHODS.value for seed in range(1, _SEEDS.value + 1)]
    run_cells(cells)
    summary = summarise(cells, study_dir, _SPLIT.value)
    write_json(study_dir / "results.json", {"split": _SPLIT.value, "methods": summary})
    title = f"{_SEEDS.value} paired seeds, {_SPLIT.value} split: mean (std); difference to bce +- standard error"
    console.print_table(title, ["method", *METRICS], table_rows(summary))
    console.console.print(f"{study_dir / 'results.json'}")


if __name__ == "__main__":
    console.run(main)
