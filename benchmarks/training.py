"""Speed of training against peers, all on the same rows and in turn, and against what this machine could do at best.

Example:
  python -m benchmarks.training --work_dir=bench

Everyone trains DeepFM with 26 categorical features, embeddings of 16 numbers and a first-order weight per id, an MLP of
400x3, BCE and Adam with learning rate .001, in batches of 4096, with 2 threads on 2 cores, from memory:

  ours           what `pipelines.train` runs, without validation, checkpoints and progress bar, with several precisions
                 and optimizers of the tables
  deepctr-torch  DeepCTR-Torch's DeepFM and its `fit`
  torch-rechub   Torch-RecHub's DeepFM, without batch normalization, and its CTRTrainer

Ids are uniform, the hardest case for caches and sparse updates. Competitors are processes that train one pass over the
rows at a time, in another order each round and never two at once, so that the machine's drift meets all alike. Numbers
are medians of 5 rounds, ratios the medians of each round's ratios. The floor is the time of a step's multiply-adds and
row traffic at the rates that matrix products, random gathers and copies reached in the same run; dense optimizers
stream their tables. Memory is what the process held at most beyond what it held before its model was built, over the
bytes of embeddings and first-order weights in float32. Both count a first-order weight per id for torch-rechub too,
which has none: its floor and its tables are up to a seventeenth too large. Losses only show that all learn the same:
rounds repeat the same random rows, which every model memorises in the end.

Targets end with how many were reached; the command succeeds either way.

Peers are installed by pip from its configured index into environments under --work_dir, on first use and not counted:
that index should offer CPU builds of torch, or gigabytes of GPU libraries come along. All competitors are in memory at
once: some 10 GB with 200,000 ids. Linux only. Give the machine nothing else to do.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

# isort: off
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.

# isort: on
from benchmarks.contest import (
    BESIDE_MANY,
    FROM_DISK,
    FULL,
    OURS,
    PEERS,
    QUICK,
    Result,
    Scale,
    contest,
    make_task,
    markdown_table,
    pipeline_targets,
    profile,
    result_columns,
    result_rows,
    setting,
    training_targets,
)
from benchmarks.directories import work_directory
from benchmarks.floors import THREADS, measure_rates
from benchmarks.generated_dataset import generated_dataset
from benchmarks.rounds import keep_to_cores

_PEERS = flags.DEFINE_list("peers", ["deepctr-torch", "torch-rechub"], "Peers to train; empty for none.")
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Keeps rows and peers' environments; default: a temporary directory.")
_PROFILE = flags.DEFINE_string("profile", None, "Directory for a TensorBoard trace of some of our steps.")
_QUICK = flags.DEFINE_bool("quick", False, "A tiny model and few rows: shows that all runs, its numbers say nothing.")


def _run(work_dir: pathlib.Path, scale: Scale) -> None:
    few, many = scale.vocabulary_sizes
    with console.step("generate rows"):
        tasks = {size: make_task(work_dir, scale, size) for size in (few, many)}
    contenders = [*OURS, FROM_DISK, *(PEERS[name] for name in _PEERS.value)]
    results: dict[int, list[Result]] = {}
    for size, task in tasks.items():
        beside = [(contender, tasks[few]) for contender in BESIDE_MANY] if size == many else []
        results[size] = contest([*((contender, task) for contender in contenders), *beside], work_dir, scale.rounds)
        _print_results([result for result in results[size] if result.task.vocabulary_size == size])
    with console.step("measure the input pipeline"):
        dataset = generated_dataset(work_dir, num_rows=scale.pipeline_rows, vocabulary_size=few)
        targets = [
            *training_targets(results[few], results[many], few, many),
            *pipeline_targets(dataset, scale.batch_size),
        ]
    print(markdown_table(["measure", "found", "to reach", "reached"], [target.row() for target in targets]))
    if _PROFILE.value:
        profile(tasks[many], _PROFILE.value)
    print(f"\n{sum(target.is_reached for target in targets)} of {len(targets)} targets reached")


def _print_results(results: Sequence[Result]) -> None:
    if not results:
        return
    task = results[0].task
    with console.step("measure the machine"):
        rates = measure_rates(
            num_rows=task.num_features * task.vocabulary_size,
            embedding_dim=task.embedding_dim,
            batch_size=task.batch_size,
            units=task.hidden_units[0],
        )
    print(f"\n{task.vocabulary_size:,} ids per feature. {setting(results, rates)}\n")
    print(markdown_table(result_columns(results), result_rows(results, rates)), end="\n\n", flush=True)


def main(argv) -> None:
    unknown = [name for name in _PEERS.value if name not in PEERS]
    if unknown:
        raise ValueError(f"unknown peers. Received: {', '.join(unknown)}. Allowed: {', '.join(PEERS)}")
    keep_to_cores(THREADS)
    with work_directory(_WORK_DIR.value) as work_dir:
        _run(work_dir, QUICK if _QUICK.value else FULL)


if __name__ == "__main__":
    console.run(main)
