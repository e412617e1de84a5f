"""Lineage: the dataset that a run was trained on, and the runs that its weights come from."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from clsd_tf.spec.feature_spec import FeatureSpec, meaning_differences, parse_spec
from clsd_tf.spec.model_inputs import ModelInputs, Statistics
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir

_SEEN = ("train", "validation")  # Weights come from the one, early stopping and calibration from the other.


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """Length in bytes and SHA-256 of a file, or of its beginning."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: pathlib.Path, num_bytes: int | None = None) -> FileDigest:
        """Digests a file.

        Args:
          path: of the file.
          num_bytes: its first ones alone; None for all.

        Returns:
          Size and SHA-256.
        """
        content = path.read_bytes()[:num_bytes]
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """Facts that give the weights of a run their meaning, kept beside them: its dataset may be gone when they are read.

    Attributes:
      spec: of the dataset.
      statistics: of the dataset.
      vocabularies: name -> digest of the vocabulary's file.
    """

    spec: FeatureSpec
    statistics: Statistics
    vocabularies: Mapping[str, FileDigest]

    @classmethod
    def of(cls, dataset: DatasetDir) -> TrainedOn:
        """Notes what gives weights their meaning that are trained on ``dataset``.

        Returns:
          Spec, statistics and digests of vocabularies.
        """
        names = dataset.spec.vocabularies
        digests = {name: FileDigest.of(dataset.layout.vocabulary(name)) for name in names}
        return cls(dataset.spec, dataset.statistics, digests)

    @classmethod
    def read(cls, work_dir: WorkDir) -> TrainedOn:
        """Reads what a finished run says.

        Args:
          work_dir: of the run.

        Returns:
          As ``of`` its dataset.

        Raises:
          ArtifactError: the run has not finished.
        """
        work_dir.require_finished()
        found = read_json(work_dir.trained_on)
        return cls(
            parse_spec(found["spec"], str(work_dir.trained_on)),
            Statistics.from_json(json.dumps(found["statistics"])),
            {name: FileDigest(**entry) for name, entry in found["vocabularies"].items()},
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "spec": self.spec.model_dump(mode="json"),
            "statistics": dataclasses.asdict(self.statistics),
            "vocabularies": {name: dataclasses.asdict(entry) for name, entry in self.vocabularies.items()},
        }

    @property
    def inputs(self) -> ModelInputs:
        return self.spec.model_inputs(self.statistics.vocabulary_lengths)

    def require_same_meaning(self, dataset: DatasetDir) -> None:
        """Checks that ids and numbers of ``dataset`` mean what they meant to the run; vocabularies may have grown.

        Raises:
          ArtifactError: names what differs.
        """
        problems = [
            *self._label_difference(dataset),
            *meaning_differences(dataset.spec, self.spec),
            *_input_differences(dataset.inputs, self.inputs),
            *self._number_differences(dataset),
            *self._vocabulary_differences(dataset),
        ]
        if problems:
            raise ArtifactError(
                "a model goes on with a dataset that means the same by its inputs. Received: "
                f"{dataset.path}, where these differ:\n  " + "\n  ".join(problems) + "\nBuild the dataset with the "
                "same features and --grow_from the dataset of the earlier run, or train anew"
            )

    def _label_difference(self, dataset: DatasetDir) -> list[str]:
        new, old = dataset.spec.label, self.spec.label
        return [] if new == old else [f"label. Received: {new!r}. Allowed: {old!r}"]

    def _number_differences(self, dataset: DatasetDir) -> list[str]:
        new, old = dataset.statistics.numeric, self.statistics.numeric
        return [
            f"statistics of {name}. Received: {new[name]}. Allowed: {old[name]}"
            for name in old
            if name in new and new[name] != old[name]
        ]

    def _vocabulary_differences(self, dataset: DatasetDir) -> list[str]:
        lengths = dataset.statistics.vocabulary_lengths
        return [
            f"vocabulary of {name}. Received: {lengths[name]:,} values. "
            f"Allowed: the {self.statistics.vocabulary_lengths[name]:,} of the run in their order, and new ones behind"
            for name, digest in self.vocabularies.items()
            if name in lengths and FileDigest.of(dataset.layout.vocabulary(name), digest.num_bytes) != digest
        ]


def _input_differences(new: ModelInputs, old: ModelInputs) -> list[str]:
    found, known = _inputs_by_name(new), _inputs_by_name(old)
    problems = [
        f"input {name}. Received: {found.get(name)}. Allowed: {known.get(name)}"
        for name in sorted(found.keys() | known.keys())
        if found.get(name) != known.get(name)
    ]
    if not problems and list(found) != list(known):
        problems = [f"order of inputs. Received: {', '.join(found)}. Allowed: {', '.join(known)}"]
    return problems


def _inputs_by_name(inputs: ModelInputs) -> dict[str, Any]:
    categorical = {entry.name: dataclasses.replace(entry, vocabulary_size=0) for entry in inputs.categorical}
    numeric = dict.fromkeys(inputs.numeric, "a number")
    return {**categorical, **numeric, **{group.name: group for group in inputs.groups}}


def lineage(dataset: DatasetDir, init_from: WorkDir | None) -> dict[str, Any]:
    """The content of lineage.json.

    Args:
      dataset: what a run trains on.
      init_from: the finished run of its warm start; None for a run that begins anew.

    Returns:
      ``run``: fingerprint of the dataset, number of training rows, and first and last event that the run sees, in
      training or validation (ISO, UTC). ``ancestors``: the same of the runs before it, oldest first, with the
      fingerprints of their work directories.
    """
    splits = dataset.counts["splits"]
    run = {
        "dataset_fingerprint": dataset.fingerprint,
        "rows": splits["train"]["rows"],
        "first_event": min((splits[split]["first_event"] for split in _SEEN), key=dt.datetime.fromisoformat),
        "last_event": max((splits[split]["last_event"] for split in _SEEN), key=dt.datetime.fromisoformat),
    }
    if init_from is None:
        return {"run": run, "ancestors": []}
    init_from.require_finished()
    earlier = read_json(init_from.lineage)
    parent = {"work_fingerprint": init_from.fingerprint, **earlier["run"]}
    return {"run": run, "ancestors": [*earlier["ancestors"], parent]}


def require_unseen(work_dir: WorkDir, dataset: DatasetDir) -> None:
    """Checks that all rows of a dataset are later than any that a finished run, or one before it, has seen.

    Args:
      work_dir: of the run.
      dataset: of the rows.

    Raises:
      ArtifactError: names the two moments.
    """
    chain = read_json(work_dir.lineage)
    seen_until = max((run["last_event"] for run in (*chain["ancestors"], chain["run"])), key=dt.datetime.fromisoformat)
    first = min((entry["first_event"] for entry in dataset.counts["splits"].values()), key=dt.datetime.fromisoformat)
    if dt.datetime.fromisoformat(first) <= dt.datetime.fromisoformat(seen_until):
        raise ArtifactError(
            "progressive validation measures a model on events later than all it has seen. Received: "
            f"{dataset.path}, whose events begin at {first}. Allowed: after {seen_until}, the last event that "
            f"{work_dir.path} has seen"
        )
