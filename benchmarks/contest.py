"""Competitors of benchmarks.training: who trains what, what came out, and how tables show it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pathlib
import platform
import random
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks import peer_environments
from benchmarks.floors import THREADS, Precision, Rates, Updates, Work, mlp_multiply_adds, row_work
from benchmarks.generated_dataset import NUM_CATEGORICAL, generated_dataset
from benchmarks.input_rates import epoch_end_overhead, pipeline_examples_per_second, records_per_second
from benchmarks.rounds import CompetitorError, Ready, Round, Task, running, take_turns
from clsd_tf.commands import console
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.storage.dataset_dir import DatasetDir


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a contest; ``vocabulary_sizes`` are ids of each feature, the smaller first."""

    vocabulary_sizes: tuple[int, int] = (10_000, 200_000)
    embedding_dim: int = 16
    hidden_units: tuple[int, ...] = (400, 400, 400)
    batch_size: int = 4096
    steps: int = 25
    rounds: int = 5
    pipeline_rows: int = 1_000_000

    @property
    def num_rows(self) -> int:
        return self.steps * self.batch_size


FULL = Scale()
QUICK = Scale(
    vocabulary_sizes=(50, 200),
    embedding_dim=4,
    hidden_units=(8,),
    batch_size=64,
    steps=4,
    rounds=2,
    pipeline_rows=2000,
)
_LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the table; ``peer`` names the environment it needs, None for ours."""

    name: str
    module: str
    precision: Precision
    updates: Updates
    settings: tuple[str, ...] = ()
    peer: str | None = None


def _ours(name: str, precision: Precision, updates: Updates, *settings: str) -> Contender:
    settings = (f"precision={precision}", f"optimizer.embeddings.kind={updates}", *settings)
    return Contender(name, "benchmarks.train_ours", precision, updates, settings)


HEADLINE = _ours("ours, bfloat16, lazy Adam", "bfloat16", "lazy_adam")
FLOAT32 = _ours("ours, float32, lazy Adam", "float32", "lazy_adam")
ADAGRAD = _ours("ours, bfloat16, Adagrad", "bfloat16", "adagrad")
ROWWISE = _ours("ours, bfloat16, row-wise Adagrad", "bfloat16", "rowwise_adagrad")
OURS = (FLOAT32, HEADLINE, ADAGRAD, ROWWISE)
FROM_DISK = _ours("ours, bfloat16, lazy Adam, from disk", "bfloat16", "lazy_adam", "max_cache_bytes=0")
BESIDE_MANY = (HEADLINE, FLOAT32)  # Train with few ids once more, in turn with those of many ids.
PEERS = {
    "deepctr-torch": Contender(
        "deepctr-torch", "benchmarks.train_deepctr", "float32", "dense_adam", peer="deepctr-torch"
    ),
    "torch-rechub": Contender("torch-rechub", "benchmarks.train_rechub", "float32", "dense_adam", peer="torch-rechub"),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a contender's task. The first round traces and fills caches, and is not timed."""

    contender: Contender
    task: Task
    ready: Ready
    rounds: tuple[Round, ...]

    @property
    def rates(self) -> np.ndarray:
        """Examples per second of the timed rounds."""
        return np.array([entry.rows_per_second for entry in self.rounds[1:]])

    @property
    def step_seconds(self) -> float:
        return self.task.batch_size / float(np.median(self.rates))

    @property
    def memory_share(self) -> float:
        """Memory of training over the bytes of the tables."""
        return max(entry.model_bytes for entry in self.rounds) / self.task.table_bytes

    def times_as_fast_as(self, other: Result) -> float:
        return float(np.median(self.rates / other.rates))


# --- Running ---------------------------------------------------------------------------------------------------------


def make_task(work_dir: pathlib.Path, scale: Scale, vocabulary_size: int) -> Task:
    """Generates the rows, as a dataset directory and as arrays for peers."""
    dataset = generated_dataset(work_dir, num_rows=scale.num_rows, vocabulary_size=vocabulary_size)
    arrays = work_dir / f"{dataset.path.name}.npz"
    names = [entry.name for entry in dataset.inputs.categorical]
    if not arrays.exists():
        columns = read_columns(dataset, "train", [*names, "label"])
        np.savez(arrays, ids=np.stack([columns[name] for name in names], axis=1), labels=columns["label"])
    return Task(
        dataset_dir=str(dataset.path),
        arrays=str(arrays),
        num_features=NUM_CATEGORICAL,
        vocabulary_size=vocabulary_size,
        embedding_dim=scale.embedding_dim,
        hidden_units=scale.hidden_units,
        batch_size=scale.batch_size,
        learning_rate=_LEARNING_RATE,
        num_threads=THREADS,
    )


def contest(entries: Sequence[tuple[Contender, Task]], work_dir: pathlib.Path, rounds: int) -> list[Result]:
    """All train in turn, all in memory at once; what cannot start or ends in a round is left out with a warning."""
    competitors, entered = [], []
    order = random.Random(0)
    with contextlib.ExitStack() as stack:
        for contender, task in entries:
            try:
                competitors.append(stack.enter_context(_started(contender, task, work_dir)))
                entered.append((contender, task))
            except (CompetitorError, peer_environments.InstallError) as error:
                console.warn(f"{contender.name} is left out: {error}")
        with console.step(f"train {len(competitors)} in turn, {1 + rounds} rounds"):
            ended = take_turns([competitors] + [order.sample(competitors, len(competitors)) for _ in range(rounds)])
    results = []
    for (contender, task), competitor in zip(entered, competitors, strict=True):
        if competitor in ended:
            console.warn(f"{contender.name} is left out: {ended[competitor]}")
        else:
            results.append(Result(contender, task, competitor.ready, tuple(competitor.rounds)))
    return results


def _started(contender: Contender, task: Task, work_dir: pathlib.Path):
    python = peer_environments.peer_python(work_dir, contender.peer) if contender.peer else sys.executable
    return running(str(python), contender.module, dataclasses.replace(task, settings=contender.settings))


def profile(task: Task, directory: str) -> None:
    """Trains a round of the headline contender with TensorBoard's profiler."""
    task = dataclasses.replace(task, settings=HEADLINE.settings, profile_dir=directory)
    with running(sys.executable, HEADLINE.module, task) as competitor:
        competitor.train_round()


# --- Printing --------------------------------------------------------------------------------------------------------


def floor_seconds(contender: Contender, task: Task, rates: Rates) -> float:
    """The shortest time of a step, for its first batch of rows."""
    with np.load(task.arrays) as arrays:
        ids = arrays["ids"][: task.batch_size] + task.vocabulary_size * np.arange(task.num_features)
    num_rows = task.num_features * task.vocabulary_size
    gathered, copied = row_work(contender.updates, ids, task.embedding_dim, num_rows)
    num_inputs = task.num_features * task.embedding_dim
    multiply_adds = mlp_multiply_adds(task.batch_size, num_inputs, task.hidden_units)
    return Work(multiply_adds, gathered, copied).seconds(rates, contender.precision)


def result_rows(results: Sequence[Result], rates: Rates) -> list[list[str]]:
    """Rows under ``result_columns``."""
    peers = [result for result in results if result.contender.peer]
    rows = []
    for result in results:
        floor = floor_seconds(result.contender, result.task, rates)
        rows.append(
            [
                result.contender.name,
                f"{np.median(result.rates):,.0f}",
                *(f"{result.times_as_fast_as(peer):.2f}" for peer in peers),
                f"{1000 * result.step_seconds:.1f}",
                f"{1000 * floor:.1f}",
                f"{100 * floor / result.step_seconds:.0f} %",
                f"{result.rounds[0].loss:.4f}, {result.rounds[-1].loss:.4f}",
                f"{result.ready.parameters:,}",
                f"{result.memory_share:.2f}",
            ]
        )
    return rows


def result_columns(results: Sequence[Result]) -> list[str]:
    peers = [f"over {result.contender.name}" for result in results if result.contender.peer]
    costs = [
        "ms per step",
        "floor, ms",
        "share of floor",
        "BCE of first and last round",
        "parameters",
        "memory / table",
    ]
    return ["training", "examples/s", *peers, *costs]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As README has them: the first column to the left, the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(results: Sequence[Result], rates: Rates) -> str:
    """Date, machine, its rates, and versions of what ran."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"Python": platform.python_version()}
    for result in results:
        versions |= result.ready.versions
    products = ", ".join(f"{rate / 1e9:.0f} ({name})" for name, rate in rates.multiply_adds_per_second.items())
    return (
        f"{datetime.datetime.now(datetime.timezone.utc).date()}; {models[0] if models else platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. "
        f"Rates: {products} G multiply-adds/s, gather {rates.gathered_bytes_per_second / 1e9:.2f} GB/s, "
        f"copy {rates.copied_bytes_per_second / 1e9:.1f} GB/s."
    )


# --- What is to be reached -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """``found`` has to be at least, or at most, ``bound``; None was not measured."""

    name: str
    found: float | None
    bound: float
    is_upper: bool = False

    @property
    def is_reached(self) -> bool:
        return self.found is not None and (self.found <= self.bound if self.is_upper else self.found >= self.bound)

    def row(self) -> list[str]:
        found = "not measured" if self.found is None else f"{self.found:,.2f}"
        sign = "<=" if self.is_upper else ">="
        return [self.name, found, f"{sign} {self.bound:,.2f}", "yes" if self.is_reached else "NO"]


def training_targets(of_few: Sequence[Result], of_many: Sequence[Result], few: int, many: int) -> list[Target]:
    """Lists what is to be reached: by the headline contender, and by others that show where speed and memory come from.

    Args:
      of_few: results of the contest with few ids.
      of_many: of that with many, where those of ``BESIDE_MANY`` also train with few.
      few: ids per feature.
      many: ids per feature.
    """
    peer = PEERS["deepctr-torch"]
    large, beside = ([entry for entry in of_many if entry.task.vocabulary_size == size] for size in (many, few))
    targets = []
    for size, found, bound in ((few, of_few, 2.5), (many, large, 10.0)):
        for ours in (HEADLINE, FLOAT32):
            name = f"{ours.name}: over {peer.name} (float32, dense Adam), {size:,} ids"
            targets.append(Target(name, _ratio(_found(found, ours), _found(found, peer)), bound))
    for ours in BESIDE_MANY:
        name = f"{ours.name}: step time with {many:,} ids over that with {few:,}"
        targets.append(Target(name, _ratio(_found(beside, ours), _found(large, ours)), 1.25, True))
    for ours in (HEADLINE, ADAGRAD, ROWWISE):
        result = _found(large, ours)
        name = f"{ours.name}: memory over the tables' bytes, {many:,} ids"
        targets.append(Target(name, result and result.memory_share, 3.0, True))
    from_disk = _ratio(_found(of_few, FROM_DISK), _found(of_few, HEADLINE))
    return [*targets, Target(f"{FROM_DISK.name}: over from memory, {few:,} ids", from_disk, 0.9)]


def pipeline_targets(dataset: DatasetDir, batch_size: int) -> list[Target]:
    """Lists what the input pipeline has to reach without a model, from files that the page cache holds."""
    rate = pipeline_examples_per_second(dataset, batch_size=batch_size)
    read = records_per_second(dataset, batch_size=batch_size)
    overhead = epoch_end_overhead(dataset, batch_size=batch_size)
    name = f"input pipeline alone, examples/s ({rate / read:.2f} of reading the records in order, unparsed)"
    return [
        Target(name, rate, 600_000),
        Target("time of fit for an epoch over that until its last batch", 1 + overhead, 1.02, True),
    ]


def _found(results: Sequence[Result], contender: Contender) -> Result | None:
    return next((result for result in results if result.contender == contender), None)


def _ratio(result: Result | None, other: Result | None) -> float | None:
    return None if result is None or other is None else result.times_as_fast_as(other)
