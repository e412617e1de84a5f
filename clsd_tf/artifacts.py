"""The directories that couple the jobs: the dataset directory and the work directory.

Each has one class that knows its file names. Both are complete only when ``_SUCCESS`` is there: a dataset directory is
written to a temporary sibling and renamed, a work directory (which a killed run must be able to resume) gets the
marker last. Readers refuse anything incomplete or changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from clsd_tf.features import FeatureSpec, parse_spec
from clsd_tf.model_inputs import ModelInputs, Statistics
from clsd_tf.validation import SpecError

SPLITS = ("train", "validation", "test")
_SUCCESS = "_SUCCESS"


class ArtifactError(RuntimeError):
    """A directory that is missing, incomplete, changed after it was written, or of another data set."""


def _incomplete(kind: str, path: pathlib.Path, remedy: str) -> ArtifactError:
    state = "has none" if path.is_dir() else "does not exist"
    return ArtifactError(
        f"a {kind} directory is complete when it holds {_SUCCESS}. Received: {path}, which {state}. {remedy}"
    )


def require_absent(path: pathlib.Path) -> None:
    """Refuses an output path that exists, so that nothing is ever overwritten."""
    if path.exists():
        raise FileExistsError(
            f"an output directory must not exist yet. Received: {path}. Choose another name or remove it first"
        )


@contextlib.contextmanager
def staged_directory(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of ``final`` that becomes ``final`` by one rename, only if the block succeeds.

    Siblings that processes left which were killed are removed: a living process holds a lock on its own.
    """
    require_absent(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}.incomplete-{secrets.token_hex(4)}")
    remove_abandoned(final.parent, f".{glob.escape(final.name)}.incomplete-*")
    with contextlib.ExitStack() as locks:
        with locked(final.parent):  # Nobody may find the new directory before it is locked.
            staging.mkdir()
            locks.enter_context(locked(staging))
        try:
            yield staging
            _sync(staging)
            require_absent(final)
            staging.rename(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: pathlib.Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a directory's lock, which ends with the process and its children; yields whether it could be had."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except OSError:  # Another process has it, or the file system knows no locks.
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def remove_abandoned(parent: pathlib.Path, pattern: str) -> None:
    """Removes the directories in ``parent`` of that name which no process holds, as far as it may."""
    with contextlib.ExitStack() as locks:
        with locked(parent):  # None is between its making and its lock.
            abandoned = [path for path in parent.glob(pattern) if _hold_if_free(locks, path)]
        for path in abandoned:
            shutil.rmtree(path, ignore_errors=True)


def _hold_if_free(locks: contextlib.ExitStack, directory: pathlib.Path) -> bool:
    with contextlib.suppress(OSError):  # It is gone, or another user's.
        return locks.enter_context(locked(directory, wait=False))
    return False


def _sync(directory: pathlib.Path) -> None:
    """Flushes every file below ``directory`` to disk: a rename must not outlive the bytes it promises."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON as ``write_text`` does."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class DatasetLayout:
    """File names inside a dataset directory, for its writer and its reader."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.spec = root / "feature_spec.json"
        self.statistics = root / "statistics.json"
        self.counts = root / "counts.json"
        self.data_statistics = root / "data_statistics.json"
        self.manifest = root / "manifest.json"
        self.vocabularies = root / "vocabularies"
        self.records = root / "records"
        self.serving_sample = root / "serving_sample.parquet"
        self.dead_letter = root / "dead_letter.parquet"
        self.teacher_scores = root / "teacher_scores"
        self.success = root / _SUCCESS

    def vocabulary(self, name: str) -> pathlib.Path:
        return self.vocabularies / f"{name}.txt"

    def vocabulary_values(self, name: str) -> list[str]:
        """The values of a vocabulary in the order of their ids; [] if there is none of this name."""
        path = self.vocabulary(name)
        # Not str.splitlines: a value may hold the characters that only Python takes for line breaks.
        return path.read_bytes().decode().split("\n")[:-1] if path.exists() else []

    def shard(self, split: str, index: int, num_shards: int, compressed: bool) -> pathlib.Path:
        suffix = ".tfrecord.gz" if compressed else ".tfrecord"
        return self.records / f"{split}-{index:05d}-of-{num_shards:05d}{suffix}"

    def fingerprint(self) -> str:
        """16 hex digits over everything that gives ids and rows their meaning."""
        digest = hashlib.sha256()
        for path in (self.spec, self.statistics, self.counts, *sorted(self.vocabularies.glob("*.txt"))):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def mark_complete(self, spec: FeatureSpec) -> None:
        """Writes ``_SUCCESS``; the last thing a writer does."""
        write_json(self.success, {"spec_fingerprint": spec.fingerprint, "dataset_fingerprint": self.fingerprint()})


class DatasetDir:
    """Reader of a complete dataset directory.

    Raises:
      ArtifactError: no such directory, no ``_SUCCESS``, or contents that differ from what was written.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.layout = DatasetLayout(self.path)
        if not self.layout.success.is_file():
            raise _incomplete("dataset", self.path, "Run `python -m pipelines.build_dataset` first")
        for path in (self.layout.spec, self.layout.statistics, self.layout.counts):
            if not path.is_file():
                raise ArtifactError(f"{self.path} has lost a file. Missing: {path.name}. Build the dataset again")
        written = read_json(self.layout.success)
        self.spec = self._read_spec()
        self.fingerprint: str = written["dataset_fingerprint"]
        self._check("feature spec", written["spec_fingerprint"], self.spec.fingerprint)
        self._check("dataset", self.fingerprint, self.layout.fingerprint())
        self.statistics = Statistics.from_json(self.layout.statistics.read_text(encoding="utf-8"))
        self.inputs: ModelInputs = self.spec.model_inputs(self.statistics.vocabulary_lengths)

    def _read_spec(self) -> FeatureSpec:
        try:
            return parse_spec(read_json(self.layout.spec), str(self.layout.spec))
        except (SpecError, json.JSONDecodeError) as error:
            raise ArtifactError(f"{error}. Build the dataset again with this version of clsd_tf") from error

    def _check(self, what: str, expected: str, received: str) -> None:
        if expected != received:
            raise ArtifactError(
                f"{self.path}: the {what} was changed after the directory was written. Received: fingerprint "
                f"{received}. Allowed: {expected}, as in {_SUCCESS}. Build the dataset again"
            )

    @property
    def teacher_scores(self) -> pathlib.Path:
        """Where teachers keep their scores: the one thing that is added to a complete directory."""
        return self.layout.teacher_scores

    @property
    def counts(self) -> dict[str, Any]:
        return read_json(self.layout.counts)

    def num_rows(self, split: str) -> int:
        return self.counts["splits"][split]["rows"]

    def record_files(self, split: str) -> list[str]:
        """TFRecord shards of a split, in order."""
        if split not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}. Received: {split!r}")
        found = [*self.layout.records.glob(f"{split}-*.tfrecord"), *self.layout.records.glob(f"{split}-*.tfrecord.gz")]
        files = sorted(map(str, found))
        # Every shard names their number: train-00000-of-00004.tfrecord.
        expected = int(files[0].rsplit("-of-", 1)[1].split(".")[0]) if files else 1
        if len(files) != expected:
            raise ArtifactError(
                f"{self.path} has lost records of split {split!r}. Received: {len(files)} shards of {expected}. "
                "Build the dataset again"
            )
        return files


class WorkDir:
    """What one training run leaves: config, lineage, checkpoints, events, history, best weights, evaluations."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.trained_on = self.path / "trained_on.json"
        self.lineage = self.path / "lineage.json"
        self.history = self.path / "history.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.calibration = self.path / "calibration.json"
        self.report = self.path / "report.html"
        self.prequential = self.path / "prequential.json"
        self.days = self.path / "days.json"
        self.days_report = self.path / "days.html"
        self.success = self.path / _SUCCESS

    def evaluation(self, split: str) -> pathlib.Path:
        return self.path / f"evaluation_{split}.json"

    def weights_of(self, epoch: int) -> pathlib.Path:
        """Prefix of the files with the weights of an epoch that was the best so far."""
        return self.path / "best_weights" / f"weights-{epoch}"

    @property
    def weights_files(self) -> dict[int, list[pathlib.Path]]:
        """Epoch -> what ``weights_of`` it is there: files, and directories of writes that were killed."""
        files: dict[int, list[pathlib.Path]] = {}
        for path in self.weights_of(0).parent.glob("weights-*"):
            epoch = int(re.match(r"weights-(\d+)", path.name)[1])
            files.setdefault(epoch, []).append(path)
        return files

    @property
    def best_weights(self) -> pathlib.Path:
        """Prefix of the best epoch's weights: the last that was the best so far."""
        return self.weights_of(max(self.weights_files, default=0))

    @contextlib.contextmanager
    def exclusive(self, *, wait: bool = False) -> Iterator[None]:
        """Holds the directory for one process; two would overwrite each other's checkpoints.

        Args:
          wait: until another process that holds it lets go.

        Raises:
          ArtifactError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                raise ArtifactError(
                    f"only one process may train in a work directory. Received: {self.path}, which another one holds. "
                    "Wait for it, or choose another --work_dir"
                ) from error
            yield

    @property
    def has_checkpoint(self) -> bool:
        return (self.checkpoints / "checkpoint").is_file()

    @property
    def is_complete(self) -> bool:
        return self.success.is_file()

    def mark_complete(self, fingerprint: str) -> None:
        """Writes ``_SUCCESS``; the last thing that a run does."""
        fingerprints = {
            "dataset_fingerprint": self.resolved_config["dataset_fingerprint"],
            "work_fingerprint": fingerprint,
        }
        write_json(self.success, fingerprints)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over what a finished run has become, see ``checkpoints.work_fingerprint``."""
        return read_json(self.success)["work_fingerprint"]

    @property
    def resolved_config(self) -> dict[str, Any]:
        return read_json(self.config)

    def require_finished(self) -> None:
        """Raises ArtifactError for a run that has not finished."""
        if not self.is_complete:
            raise _incomplete("work", self.path, "Run `python -m pipelines.train` (again) first")

    def require_complete(self, dataset: DatasetDir) -> None:
        """Refuses a run that has not finished, or that was trained on another dataset.

        Raises:
          ArtifactError: names what was received and what to do.
        """
        self.require_finished()
        self.require_same_dataset(dataset)

    def require_same_dataset(self, dataset: DatasetDir) -> None:
        trained_on = self.resolved_config["dataset_fingerprint"]
        if trained_on != dataset.fingerprint:
            raise ArtifactError(
                f"{self.path} was trained on another dataset. Received: {dataset.path} with fingerprint "
                f"{dataset.fingerprint}. Allowed: {trained_on}"
            )
