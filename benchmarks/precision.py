"""Cost of faster training in AUC: bfloat16 against float32, and row-sparse rules against the Adam that moves every
row in every step, by runs that share seeds.

Example:
  python -m benchmarks.precision --dataset_dir=demo/dataset --set=max_epochs=1

Each comparison trains both settings on every seed; a pair differs in nothing else. AUC is that of the test split,
without calibration, which keeps the order of scores but for ties. The interval is that of the paired t-test, 95 %:
one that holds 0 may be chance. The last column says of the mean, and of the whole interval, whether |difference| is at
most .0005, which is accepted. Finished runs below --work_dir are not trained again.
"""

from absl import flags

# isort: off
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.

# isort: on
from benchmarks.auc_differences import COMPARISONS, SETTINGS, auc_of_run, difference_row
from benchmarks.directories import work_directory
from clsd_tf.metrics.significance import paired_difference
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import make_deterministic

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory to train and test on.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Keeps the runs; default: a temporary directory.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Pairs of each comparison.", 2)
_SET = flags.DEFINE_multi_string("set", [], "Training settings that all runs share; may be repeated.")
_COLUMNS = ["difference", "AUC", "mean", "95 % interval", "pairs", "at most .0005: mean, interval"]


def main(argv) -> None:
    make_deterministic()
    dataset = DatasetDir(_DATASET_DIR.value)
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with work_directory(_WORK_DIR.value) as directory:
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
    console.print_table("AUC on the test split", _COLUMNS, rows)


if __name__ == "__main__":
    console.run(main)
