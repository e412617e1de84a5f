"""Runs that differ in one setting, their AUC, and the row of a table for what the setting changes."""

from __future__ import annotations

from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.metrics.pointwise import auc
from clsd_tf.metrics.significance import PairedDifference
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model, predict_logits
from clsd_tf.training.config import load_config
from clsd_tf.training.run import train

# Setting -> what it adds to the shared ones.
SETTINGS = {
    "Adagrad": ("precision=float32", "optimizer.embeddings.kind=adagrad"),
    "Adagrad, bfloat16": ("precision=bfloat16", "optimizer.embeddings.kind=adagrad"),
    "row-wise Adagrad": ("precision=float32", "optimizer.embeddings.kind=rowwise_adagrad"),
    "lazy Adam": ("precision=float32", "optimizer.embeddings.kind=lazy_adam"),
    "dense Adam": ("precision=float32", "optimizer.embeddings.kind=adam"),
}
# (treatment, baseline)
COMPARISONS = (
    ("Adagrad, bfloat16", "Adagrad"),
    ("Adagrad", "dense Adam"),
    ("row-wise Adagrad", "dense Adam"),
    ("lazy Adam", "dense Adam"),
)


_ACCEPTED = 0.0005


def auc_of_run(dataset: DatasetDir, work_dir: WorkDir, settings: list[str]) -> float:
    """AUC of a run on the test split; trained, unless ``work_dir`` holds it already.

    Raises:
      ValueError: the test split has rows of one label only.
    """
    config = load_config(None, settings)
    train(dataset, config, work_dir, title=None)
    columns = read_columns(dataset, "test", ["label", "sample_weight"])
    logits = predict_logits(load_model(work_dir, dataset), dataset, "test")
    found = auc(columns["label"], logits, columns["sample_weight"])
    if found is None:
        raise ValueError(f"an AUC needs rows with and without clicks. Received: the test split of {dataset.path}")
    return found


def difference_row(treatment: str, baseline: str, difference: PairedDifference, baseline_auc: float) -> list[str]:
    """The last entry: whether |mean| is at most .0005, and whether all of the interval is."""
    low, high = difference.confidence_interval
    is_accepted = [abs(difference.mean) <= _ACCEPTED, max(abs(low), abs(high)) <= _ACCEPTED]
    return [
        f"{treatment} - {baseline}",
        f"{baseline_auc:.5f}",
        f"{difference.mean:+.5f}",
        f"{low:+.5f} to {high:+.5f}",
        str(difference.num_pairs),
        ", ".join("yes" if accepted else "NO" for accepted in is_accepted),
    ]
