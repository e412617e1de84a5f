"""Evaluates a trained run on a split, overall and per user group.

Example:
  clsd evaluate --dataset_dir=demo/dataset --work_dir=demo/clsd --split=test

Prints a table; leaves evaluation_<split>.json and report.html, with plots, in the work directory.
"""

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.evaluation.evaluate import evaluate, evaluation_table
from clsd_tf.evaluation.report import render_report
from clsd_tf.methods import method_of
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir
from clsd_tf.storage.files import read_json, write_json, write_text
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory the run was trained on.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Work directory of a finished run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", SPLITS, "Split to evaluate.")


def main(argv) -> None:
    dataset, work_dir = DatasetDir(_DATASET_DIR.value), WorkDir(_WORK_DIR.value)
    with console.step(f"evaluate {_SPLIT.value}"):
        model = load_model(work_dir, dataset)
        evaluation = evaluate(model, dataset, _SPLIT.value, method_of(model.config).metrics)
        write_json(work_dir.evaluation(_SPLIT.value), evaluation)
        history = read_json(work_dir.history)
        write_text(work_dir.report, render_report(evaluation, history, work_dir.resolved_config))
    console.print_table(f"{work_dir.path} on {_SPLIT.value}", *evaluation_table(evaluation))
    console.console.print(f"{work_dir.evaluation(_SPLIT.value)} and {work_dir.report}", soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
