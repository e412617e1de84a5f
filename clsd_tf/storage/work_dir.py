"""The work directory: what a training run leaves.

A killed run must be able to resume, so it is written in place and gets ``_SUCCESS`` last.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import SUCCESS, ArtifactError, incomplete, lock, read_json, write_json


class WorkDir:
    """The files of one training run: config, lineage, checkpoints, events, history, best weights, evaluations.

    Args:
      path: of the directory, which need not exist yet.
    """

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
        self.success = self.path / SUCCESS

    def __repr__(self) -> str:
        return f"WorkDir({str(self.path)!r}: {self._state})"

    @property
    def _state(self) -> str:
        if self.is_complete:
            return f"complete, fingerprint {self.fingerprint}"
        return "not finished" if self.config.is_file() else "not started"

    def evaluation(self, split: str) -> pathlib.Path:
        """Names the file with the measures of a ``split``.

        Returns:
          A path, whether or not it is there.
        """
        return self.path / f"evaluation_{split}.json"

    def weights_of(self, epoch: int) -> pathlib.Path:
        """Names the files with the weights of ``epoch``, one that was the best so far.

        Returns:
          The prefix that they share.
        """
        return self.path / "best_weights" / f"weights-{epoch}"

    @property
    def weights_files(self) -> dict[int, list[pathlib.Path]]:
        """Epoch -> what ``weights_of`` it is there: files, and directories of writes that were killed."""
        files: dict[int, list[pathlib.Path]] = {}
        for path in self.weights_of(0).parent.glob("weights-*"):
            epoch = int(re.findall(r"\d+", path.name)[0])
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

        Yields:
          Once, while it is held.

        Raises:
          ArtifactError: another process holds it, or this platform has no locks.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                lock(file, wait=wait)
            except OSError as error:
                raise ArtifactError(
                    f"only one process may train in a work directory. Received: {self.path}, which another one holds. "
                    "Wait for it, or choose another --work_dir"
                ) from error
            yield

    @property
    def has_checkpoint(self) -> bool:
        """True if there is one to resume from."""
        return (self.checkpoints / "checkpoint").is_file()

    @property
    def is_complete(self) -> bool:
        """True if the run has finished."""
        return self.success.is_file()

    def mark_complete(self, fingerprint: str) -> None:
        """Writes ``_SUCCESS``; the last thing that a run does.

        Args:
          fingerprint: of what the run has become, 16 hex digits.
        """
        fingerprints = {
            "dataset_fingerprint": self.resolved_config["dataset_fingerprint"],
            "work_fingerprint": fingerprint,
        }
        write_json(self.success, fingerprints)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over what a finished run has become, see ``training.best_epoch.work_fingerprint``."""
        return read_json(self.success)["work_fingerprint"]

    @property
    def resolved_config(self) -> dict[str, Any]:
        """The run's settings (``train``) and the ``dataset_fingerprint`` of what it was trained on."""
        return read_json(self.config)

    def require_finished(self) -> None:
        """Refuses a run that has not finished.

        Raises:
          ArtifactError: names the directory and what to do.
        """
        if not self.is_complete:
            raise incomplete("work", self.path, "Run `python -m pipelines.train` (again) first")

    def require_complete(self, dataset: DatasetDir) -> None:
        """Refuses a run that has not finished, or that was trained on another dataset than ``dataset``.

        Raises:
          ArtifactError: names what was received and what to do.
        """
        self.require_finished()
        self.require_same_dataset(dataset)

    def require_same_dataset(self, dataset: DatasetDir) -> None:
        """Refuses a run that was trained on another dataset than ``dataset``.

        Raises:
          ArtifactError: names both fingerprints.
        """
        trained_on = self.resolved_config["dataset_fingerprint"]
        if trained_on != dataset.fingerprint:
            raise ArtifactError(
                f"{self.path} was trained on another dataset. Received: {dataset.path} with fingerprint "
                f"{dataset.fingerprint}. Allowed: {trained_on}"
            )
