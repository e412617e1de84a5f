"""What click confidence costs: the time of a training step against that of plain BCE, paired, in one process.

Example:
  python -m benchmarks.train_step --dataset_dir=demo/dataset

Both models are built with the same seed and see the same batches from memory, in turn; each round times
--steps_per_round steps of either. The ratio is the median over rounds, with its quartiles.
"""

import statistics
import time

import tensorflow as tf
from absl import flags

from clsd_tf import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.artifacts import DatasetDir
from clsd_tf.assembly import build_model
from clsd_tf.input_pipeline import batches
from clsd_tf.train_config import load_config

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 30, "Paired measurements.", 2)
_STEPS_PER_ROUND = flags.DEFINE_integer("steps_per_round", 30, "Steps of each model per measurement.", 1)
_SET = flags.DEFINE_multi_string("set", [], "Training settings that all models share; may be repeated.")

# Name -> what it adds to the shared settings.
VARIANTS = {
    "global": ["clsd.teacher=self", "clsd.lambda=1", "clsd.mu=0"],
    "local (AdGate)": ["clsd.teacher=self", "clsd.lambda=0", "clsd.mu=1"],
    "both": ["clsd.teacher=self", "clsd.lambda=0.5", "clsd.mu=0.5"],
}


def _step_function(settings: list[str], dataset: DatasetDir):
    model = build_model(load_config(None, [*_SET.value, *settings]), dataset.inputs)
    return model, tf.function(model.train_step)


def _seconds(step, data: list) -> float:
    start = time.perf_counter()
    for batch in data:
        step(batch)
    return time.perf_counter() - start


def ratios(settings: list[str], dataset: DatasetDir, data: list) -> list[float]:
    """Time of the variant's steps over that of BCE's, one ratio per round."""
    # The models are kept alive: a traced step does not hold its variables.
    bce_model, bce = _step_function(["method=bce"], dataset)
    clsd_model, clsd = _step_function(settings, dataset)
    for step in (bce, clsd):
        _seconds(step, data)  # Traces, and warms the caches up.
    found = []
    for round_index in range(_ROUNDS.value):
        first, second = (bce, clsd) if round_index % 2 else (clsd, bce)  # In turn, against drift.
        times = {first: _seconds(first, data), second: _seconds(second, data)}
        found.append(times[clsd] / times[bce])
    del bce_model, clsd_model
    return found


def main(argv) -> None:
    dataset = DatasetDir(_DATASET_DIR.value)
    config = load_config(None, _SET.value)
    data = list(batches(dataset, "train", batch_size=config.batch_size).repeat().take(_STEPS_PER_ROUND.value))
    rows = []
    for name, settings in VARIANTS.items():
        low, median, high = statistics.quantiles(ratios(settings, dataset, data), n=4)
        rows.append((name, f"{median:.3f}", f"{low:.3f} to {high:.3f}"))
    title = f"Training step over BCE's, batch {config.batch_size}, {config.backbone}, teacher self"
    console.print_table(title, ["confidence", "ratio (median)", "quartiles"], rows)


if __name__ == "__main__":
    console.run(main)
