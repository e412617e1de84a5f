"""What faster training costs in AUC: bfloat16 against float32, and lazy against dense Adam, by runs that share seeds.

Example:
  python -m benchmarks.precision --dataset_dir=demo/dataset --set=max_epochs=1

Each comparison trains both settings on every seed; a pair differs in nothing else. AUC is that of the test split,
without calibration, which keeps the order of scores but for ties. The interval is that of the paired t-test, 95 %:
a difference within it of 0 may be chance. Finished runs below --work_dir are not trained again.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from absl import flags

from clsd_tf import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.artifacts import DatasetDir, WorkDir
from clsd_tf.assembly import load_model, make_deterministic, predict_logits
from clsd_tf.input_pipeline import read_columns
from clsd_tf.metrics import auc
from clsd_tf.significance import PairedDifference, paired_difference
from clsd_tf.train_config import load_config
from clsd_tf.training import train

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory to train and test on.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Keeps the runs; default: a temporary directory.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Pairs of each comparison.", 2)
_SET = flags.DEFINE_multi_string("set", [], "Training settings that all runs share; may be repeated.")

# Setting -> what it adds to the shared ones.
SETTINGS = {
    "float32, lazy Adam": ("precision=float32", "optimizer.embeddings.kind=lazy_adam"),
    "bfloat16, lazy Adam": ("precision=bfloat16", "optimizer.embeddings.kind=lazy_adam"),
    "float32, dense Adam": ("precision=float32", "optimizer.embeddings.kind=adam"),
}
# (treatment, baseline)
COMPARISONS = (("bfloat16, lazy Adam", "float32, lazy Adam"), ("float32, lazy Adam", "float32, dense Adam"))


def auc_of_run(dataset: DatasetDir, work_dir: WorkDir, settings: list[str]) -> float:
    """AUC of a run on the test split; trained, unless ``work_dir`` holds it already."""
    config = load_config(None, settings)
    train(dataset, config, work_dir, title=None)
    columns = read_columns(dataset, "test", ["label", "sample_weight"])
    logits = predict_logits(load_model(work_dir, dataset), dataset, "test")
    return auc(columns["label"], logits, columns["sample_weight"])


def difference_row(treatment: str, baseline: str, difference: PairedDifference, baseline_auc: float) -> list[str]:
    low, high = difference.confidence_interval
    return [
        f"{treatment} - {baseline}",
        f"{baseline_auc:.5f}",
        f"{difference.mean:+.5f}",
        f"{low:+.5f} to {high:+.5f}",
        str(difference.num_pairs),
    ]


def main(argv) -> None:
    make_deterministic()
    dataset = DatasetDir(_DATASET_DIR.value)
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with _work_directory() as directory:
        for seed in range(1, _SEEDS.value + 1):
            for name, settings in SETTINGS.items():
                work_dir = WorkDir(directory / name.replace(", ", "_").replace(" ", "_") / f"seed_{seed}")
                with console.step(f"{name}, seed {seed}") as say:
                    found[name].append(auc_of_run(dataset, work_dir, [*_SET.value, *settings, f"seed={seed}"]))
                    say(f"AUC {found[name][-1]:.5f}")
    rows = []
    for treatment, baseline in COMPARISONS:
        difference = paired_difference(found[treatment], found[baseline])
        rows.append(difference_row(treatment, baseline, difference, sum(found[baseline]) / len(found[baseline])))
    console.print_table("AUC on the test split", ["difference", "AUC", "mean", "95 % interval", "pairs"], rows)


@contextlib.contextmanager
def _work_directory() -> Iterator[pathlib.Path]:
    if _WORK_DIR.value:
        yield pathlib.Path(_WORK_DIR.value)
        return
    with tempfile.TemporaryDirectory(prefix="precision-benchmark-") as path:
        yield pathlib.Path(path)


if __name__ == "__main__":
    console.run(main)
