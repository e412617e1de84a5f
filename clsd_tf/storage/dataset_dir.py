"""The dataset directory: one class knows its file names, one reads it.

It is written to a temporary sibling and renamed, and is complete only when ``_SUCCESS`` is there: readers refuse
anything incomplete or changed.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

from clsd_tf.spec.feature_spec import FeatureSpec, parse_spec
from clsd_tf.spec.model_inputs import ModelInputs, Statistics
from clsd_tf.spec.validation import SpecError
from clsd_tf.storage.files import SUCCESS, ArtifactError, incomplete, read_json, write_json

SPLITS = ("train", "validation", "test")


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
        self.success = root / SUCCESS

    def vocabulary(self, name: str) -> pathlib.Path:
        """Names the file of the vocabulary ``name``: a value a line, in the order of ids.

        Returns:
          A path, whether or not it is there.
        """
        return self.vocabularies / f"{name}.txt"

    def vocabulary_values(self, name: str) -> list[str]:
        """Reads the vocabulary ``name``.

        Returns:
          Its values in the order of their ids; [] if there is none of this name.
        """
        path = self.vocabulary(name)
        # Not str.splitlines: a value may hold the characters that only Python takes for line breaks.
        return path.read_bytes().decode().split("\n")[:-1] if path.exists() else []

    def shard(self, split: str, index: int, num_shards: int, compressed: bool) -> pathlib.Path:
        """Names a file of records.

        Args:
          split: of the rows.
          index: of the file within the split, from 0.
          num_shards: files of the split.
          compressed: by gzip.

        Returns:
          A path, whether or not it is there.
        """
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
        """Writes ``_SUCCESS``, which names ``spec`` by its fingerprint; the last thing a writer does."""
        write_json(self.success, {"spec_fingerprint": spec.fingerprint, "dataset_fingerprint": self.fingerprint()})


class DatasetDir:
    """Reader of a complete dataset directory.

    Args:
      path: of the directory.

    Raises:
      ArtifactError: no such directory, no ``_SUCCESS``, or contents that differ from what was written.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.layout = DatasetLayout(self.path)
        if not self.layout.success.is_file():
            raise incomplete("dataset", self.path, "Run `python -m pipelines.build_dataset` first")
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

    def __repr__(self) -> str:
        counts = self.counts["splits"]
        rows = ", ".join(f"{counts[split]['rows']:,} {split}" for split in SPLITS)
        return f"DatasetDir({str(self.path)!r}: {rows} rows, fingerprint {self.fingerprint})"

    def _read_spec(self) -> FeatureSpec:
        try:
            return parse_spec(read_json(self.layout.spec), str(self.layout.spec))
        except (SpecError, json.JSONDecodeError) as error:
            raise ArtifactError(f"{error}. Build the dataset again with this version of clsd_tf") from error

    def _check(self, what: str, expected: str, received: str) -> None:
        if expected != received:
            raise ArtifactError(
                f"{self.path}: the {what} was changed after the directory was written. Received: fingerprint "
                f"{received}. Allowed: {expected}, as in {SUCCESS}. Build the dataset again"
            )

    @property
    def record_kinds(self) -> tuple[str, ...]:
        """Kinds of records that it holds: a ``row`` for each event."""
        return ("row",)

    @property
    def teacher_scores(self) -> pathlib.Path:
        """Where teachers keep their scores: the one thing that is added to a complete directory."""
        return self.layout.teacher_scores

    @property
    def counts(self) -> dict[str, Any]:
        """Counts of rows and what became of them: per split, per table, and in all."""
        return read_json(self.layout.counts)

    def num_rows(self, split: str) -> int:
        """Counts the rows of a ``split``, those of sample weight 0 included.

        Returns:
          Their number, as the build counted them.
        """
        return self.counts["splits"][split]["rows"]

    def record_files(self, split: str) -> list[str]:
        """Finds the TFRecord shards of a ``split``.

        Returns:
          Paths, in order.

        Raises:
          ValueError: an unknown split.
          ArtifactError: a shard is missing.
        """
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
