"""Cost of click confidence: the time of a training step against that of plain BCE, paired, in one process.

Example:
  python -m benchmarks.train_step --dataset_dir=demo/dataset

All models are built with the same seed and see the same batches from memory, in turn; each round times
--steps_per_round steps of each. Where a model's variables happen to lie in memory moves its time by some per cent, so
that all is built anew --builds times: a build gives one ratio, of medians over its rounds, and the table shows the
median and the quartiles over builds. The row "bce again" is a second model of plain BCE: what it differs from 1 is
noise. CPU time counts all threads, and changes less than wall time when the machine has other work.
"""

import random
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.data.input_pipeline import batches
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.training.assembly import build_model
from clsd_tf.training.config import load_config

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory.", required=True)
_BUILDS = flags.DEFINE_integer("builds", 9, "How often all models are built anew.", 2)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Paired measurements per build.", 1)
_STEPS_PER_ROUND = flags.DEFINE_integer("steps_per_round", 20, "Steps of each model per measurement.", 1)
_SET = flags.DEFINE_multi_string("set", [], "Training settings that all models share; may be repeated.")

_BASELINE = "bce"
# Name -> what it adds to the shared settings.
VARIANTS = {
    _BASELINE: ["method=bce"],
    "bce again": ["method=bce"],
    "global": ["method.teacher=self", "method.lambda=1", "method.mu=0"],
    "local": ["method.teacher=self", "method.lambda=0", "method.mu=1"],
    "both": ["method.teacher=self", "method.lambda=0.5", "method.mu=0.5"],
}


def _step_function(settings: list[str], dataset: DatasetDir) -> Callable:
    model = build_model(load_config(None, [*_SET.value, *settings]), dataset.inputs)
    step = tf.function(model.train_step)
    step.model = model  # A traced step does not keep its variables alive.
    return step


def _seconds(step: Callable, data: list) -> tuple[float, float]:
    """(wall, CPU) time of a step for each batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in data:
        step(batch)
    return time.perf_counter() - wall, time.process_time() - cpu


def build_ratios(dataset: DatasetDir, data: list, order: random.Random) -> dict[str, np.ndarray]:
    """Variant -> (wall, CPU) time over the baseline's, for models built now."""
    steps = {name: _step_function(settings, dataset) for name, settings in VARIANTS.items()}
    for step in steps.values():
        _seconds(step, data)  # Traces, and warms the caches up.
    times = {name: [] for name in steps}
    for _ in range(_ROUNDS.value):
        for name in order.sample(list(steps), len(steps)):  # In another order each time, against drift.
            times[name].append(_seconds(steps[name], data))
    medians = {name: np.median(found, axis=0) for name, found in times.items()}
    return {name: median / medians[_BASELINE] for name, median in medians.items() if name != _BASELINE}


def main(argv) -> None:
    dataset = DatasetDir(_DATASET_DIR.value)
    config = load_config(None, _SET.value)
    data = list(batches(dataset, "train", batch_size=config.batch_size).repeat().take(_STEPS_PER_ROUND.value))
    order = random.Random(0)
    builds = []
    for index in range(_BUILDS.value):
        builds.append(build_ratios(dataset, data, order))
        tf.keras.backend.clear_session()
        console.console.print(f"build {index + 1} of {_BUILDS.value}")
    rows = []
    for name in builds[0]:
        low, median, high = np.quantile([build[name] for build in builds], [0.25, 0.5, 0.75], axis=0)
        spans = [f"{low[kind]:.3f} to {high[kind]:.3f}" for kind in (0, 1)]
        rows.append((name, f"{median[0]:.3f}", spans[0], f"{median[1]:.3f}", spans[1]))
    title = f"Training step over BCE's, batch {config.batch_size}, {config.backbone}, teacher self"
    console.print_table(title, ["confidence", "wall time", "quartiles", "CPU time", "quartiles"], rows)


if __name__ == "__main__":
    console.run(main)
