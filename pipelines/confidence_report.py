"""Judges click confidence by an intensity signal that training never read.

Example:
  clsd confidence-report --dataset_dir=demo/dataset --work_dir=demo/clsd

Does a click of high confidence stand for strong interest? On the training split it takes the teacher's scores, by which
the run weighted its clicks; where the run has none, and on other splits, predictions of the run's model. Prints a table
for global and local confidence, overall and per user group; leaves confidence_report_<split>.json and
confidence_report_<split>.html in the work directory. The spec must declare intensity_label or intensity_value. Rows of
sample weight 0 are left out; all others count alike.
"""

from typing import Any

import numpy as np
from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.evaluation.scores import MODEL, split_scores
from clsd_tf.methods.clsd.confidence_report import (
    HEADLINES,
    global_and_local_confidence,
    measure_confidence,
    render_confidence_report,
    table_rows,
)
from clsd_tf.metrics.noise_floor import click_noise_floor
from clsd_tf.statistics.small_groups import merge_small_groups
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir
from clsd_tf.storage.files import write_json, write_text
from clsd_tf.storage.work_dir import WorkDir

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory the run was trained on.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Work directory of a finished run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "train", SPLITS, "Split whose clicks are judged.")


def scored_columns(work_dir: WorkDir, dataset: DatasetDir, split: str) -> tuple[dict[str, np.ndarray], str]:
    """Reads the rows that have weight, with their scores.

    Args:
      work_dir: of a finished run.
      dataset: that it was trained on.
      split: whose rows are read.

    Returns:
      Columns, [num_rows] each, ``score`` among them; and what made the scores.
    """
    names = ["label", "intensity_label", "intensity_value", "sample_weight", "user_hash"]
    columns = read_columns(dataset, split, [*names, *(group.name for group in dataset.inputs.groups)])
    columns["score"], source = split_scores(work_dir, dataset, split)
    kept = (columns["sample_weight"] > 0) & np.isfinite(columns["score"])
    return {name: values[kept] for name, values in columns.items()}, source


def analyze(columns: dict[str, np.ndarray], dataset: DatasetDir) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures confidence and the noise floor of clicks.

    Args:
      columns: of ``scored_columns``.
      dataset: that they are from.

    Returns:
      ``global`` and ``local`` -> measures of that confidence; user group -> noise floor of its values.
    """
    groups = {
        group.name: merge_small_groups(columns[group.name], group.labels, columns["user_hash"])
        for group in dataset.inputs.groups
    }
    noise_floor = click_noise_floor(columns["score"], groups)
    clicked = columns["label"] > 0.5
    clicks = {name: values[clicked] for name, values in columns.items()}
    groups_of_clicks = {name: (ids[clicked], labels) for name, (ids, labels) in groups.items()}
    measured = {
        part: measure_confidence(
            confidence,
            clicks["intensity_label"] if dataset.spec.intensity_label else None,
            clicks["intensity_value"] if dataset.spec.intensity_value else None,
            groups_of_clicks,
            clicks["user_hash"],
        )
        for part, confidence in global_and_local_confidence(clicks["score"], groups_of_clicks).items()
    }
    return measured, noise_floor


def main(argv) -> None:
    dataset, work_dir, split = DatasetDir(_DATASET_DIR.value), WorkDir(_WORK_DIR.value), _SPLIT.value
    with console.step(f"measure click confidence on {split}") as note:
        columns, source = scored_columns(work_dir, dataset, split)
        measured, noise_floor = analyze(columns, dataset)
        note(source)
    if split == "train" and source == MODEL:
        console.warn("the model was trained on the clicks it judges here, and is overconfident. Use --split=validation")
    facts = {
        "split": split,
        "scores": source,
        "label": dataset.spec.label,
        "intensity_label": dataset.spec.intensity_label,
        "intensity_value": dataset.spec.intensity_value,
        "dataset_fingerprint": dataset.fingerprint,
    }
    path = work_dir.path / f"confidence_report_{split}"
    write_json(path.with_suffix(".json"), {**facts, "confidence": measured, "click_noise_floor": noise_floor})
    write_text(path.with_suffix(".html"), render_confidence_report(measured, noise_floor, facts))
    for part, entry in measured.items():
        title = f"{part} confidence of {work_dir.path} on clicks of {split}: value [95 % interval]"
        console.print_table(title, ["", *(heading for _, heading in HEADLINES)], table_rows(entry))
    console.console.print(f"{path}.json and {path}.html", soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
