"""Competitors that train in turn: each a process that stays alive, and trains one round whenever it is asked to.

Both ends of the conversation. A competitor's script makes a ``Worker``, builds its model and serves; the benchmark
starts it as a ``Competitor``. Answers are JSON, one object a line, through a pipe of their own, since libraries print:
first ``Ready``, then a ``Round`` for each line of standard input. No third-party imports: peers run in environments of
their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

# Tables on pages of 2 MiB, for all alike: rows lie anywhere, and the processor cannot remember that many small pages.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_ROOT = pathlib.Path(__file__).parent.parent


def keep_to_cores(count: int) -> None:
    """Keeps this process and all that it starts to the first of its cores: libraries start more threads than told."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


class CompetitorError(RuntimeError):
    """A competitor ended without an answer; the message ends with what it printed last."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Task of every competitor: DeepFM with BCE and Adam, one pass over the rows each round.

    Attributes:
      dataset_dir: the rows as a dataset directory.
      arrays: the same rows as .npz: ``ids`` int64 [num_rows, num_features], ``labels`` float32 [num_rows].
      num_features: categorical features.
      vocabulary_size: ids of each feature.
      embedding_dim: of each feature, beside its first-order weight.
      hidden_units: of the MLP, with ReLU.
      batch_size: rows of a step.
      learning_rate: of Adam.
      num_threads: that a step may use.
      settings: of our trainer only.
      profile_dir: where our trainer writes a TensorBoard trace of some steps; None for no trace.
    """

    dataset_dir: str
    arrays: str
    num_features: int
    vocabulary_size: int
    embedding_dim: int
    hidden_units: tuple[int, ...]
    batch_size: int
    learning_rate: float
    num_threads: int
    settings: tuple[str, ...] = ()
    profile_dir: str | None = None

    @property
    def table_bytes(self) -> int:
        """Of all embeddings and first-order weights in float32."""
        return 4 * self.num_features * self.vocabulary_size * (self.embedding_dim + 1)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        value = json.loads(text)
        return cls(**{**value, "hidden_units": tuple(value["hidden_units"]), "settings": tuple(value["settings"])})


@dataclasses.dataclass(frozen=True)
class Ready:
    """A competitor's model is built: its number of trainable parameters, and what it runs on by name and version."""

    parameters: int
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Round:
    """One pass over the rows.

    Attributes:
      rows: trained on.
      seconds: it took.
      loss: mean BCE over it, before each step.
      model_bytes: the most memory the process has held so far, beyond what it held before the model was built.
    """

    rows: int
    seconds: float
    loss: float
    model_bytes: int

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


class Worker:
    """A competitor's end.

    Attributes:
      task: what to train.
    """

    def __init__(self) -> None:
        self.task = Task.from_json(sys.argv[1])
        self._answers = os.fdopen(int(sys.argv[2]), "w")
        self._bytes_before = 0

    def begin_model(self) -> None:
        """Call it with everything imported and all rows loaded: memory counts from here."""
        self._bytes_before = _memory_bytes("VmRSS")

    def serve(self, train: Callable[[], tuple[int, float]], ready: Ready) -> None:
        """Trains a round for each line of standard input, until its end; ``train`` returns (rows, mean loss)."""
        self._answer(ready)
        for _ in sys.stdin:
            start = time.perf_counter()
            rows, loss = train()
            seconds = time.perf_counter() - start
            self._answer(Round(rows, seconds, float(loss), _memory_bytes("VmHWM") - self._bytes_before))

    def _answer(self, value: Ready | Round) -> None:
        self._answers.write(json.dumps(dataclasses.asdict(value)) + "\n")
        self._answers.flush()


def _memory_bytes(name: str) -> int:
    """A line of /proc/self/status: VmRSS is resident now, VmHWM its highest so far."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


class Competitor:
    """The benchmark's end of a process that trains.

    Attributes:
      ready: what it said of its model.
      rounds: what it answered so far.
    """

    def __init__(self, process: subprocess.Popen, answers: TextIO, log: TextIO):
        self._process = process
        self._answers = answers
        self._log = log
        self.ready = Ready(**self._read())
        self.rounds: list[Round] = []

    def train_round(self) -> None:
        """Raises CompetitorError when the process has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        self.rounds.append(Round(**self._read()))

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        raise CompetitorError(f"ended with status {status}: {self._log.read().strip()[-600:]}")


@contextlib.contextmanager
def running(python: str, module: str, task: Task) -> Iterator[Competitor]:
    """Starts ``python -m <module>`` and waits until its model is built; ends it when the block ends.

    Raises:
      CompetitorError: it could not build its model.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as log, os.fdopen(reading) as answers:
        process = subprocess.Popen(
            [python, "-m", module, task.to_json(), str(writing)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            pass_fds=[writing],
            env={**os.environ, **_HUGE_PAGES, "PYTHONPATH": str(_ROOT)},
        )
        os.close(writing)  # The process has its own: when that ends, so do the answers.
        try:
            yield Competitor(process, answers, log)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # It serves until its input ends.
            process.wait()


def take_turns(orders: Iterable[Iterable[Competitor]]) -> dict[Competitor, CompetitorError]:
    """A round of each per order, one after the other and never two at the same time.

    Returns:
      Those that ended, and why; the others went on without them.
    """
    ended: dict[Competitor, CompetitorError] = {}
    for competitor in itertools.chain.from_iterable(orders):
        if competitor not in ended:
            try:
                competitor.train_round()
            except CompetitorError as error:
                ended[competitor] = error
    return ended
