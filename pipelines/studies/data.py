"""Datasets of a study: fetched, simulated or read from the user's directories, and built once each."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import feature_specs
from clsd_tf.spec.feature_spec import FeatureSpec, parse_spec
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.public_data.feed import simulate_feed
from pipelines.public_data.movielens import fetch
from pipelines.studies.config import StudyData


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """One dataset of a study, which may still have to be built.

    Attributes:
      data: as the study declares it.
      seed: of a simulated feed, of which there is one for each seed; None for data that all seeds share.
      study_dir: directory of the study.
      given_dataset_dir: dataset directory of the user's; None if the study builds one.
      given_input_dir: directory of the user's tables; None if the study fetches or simulates them.
    """

    data: StudyData
    seed: int | None
    study_dir: pathlib.Path
    given_dataset_dir: pathlib.Path | None
    given_input_dir: pathlib.Path | None

    @property
    def _directory(self) -> pathlib.Path:
        name = self.data.name if self.seed is None else f"{self.data.name}_seed_{self.seed}"
        return self.study_dir / "data" / name

    @property
    def dataset_dir(self) -> pathlib.Path:
        return self.given_dataset_dir or self._directory / "dataset"

    @property
    def truth(self) -> str | None:
        """Ground truth of a simulated feed: path of a Parquet file; None where it is not known."""
        is_ours = self.data.simulate is not None and self.given_dataset_dir is None and self.given_input_dir is None
        return str(self._directory / "raw" / "truth.parquet") if is_ours else None

    def prepare(self) -> None:
        """Fetches or simulates the tables and builds the dataset, unless they are there.

        Raises:
          ArtifactError: what is there was made from another declaration.
        """
        self.require_same_source()
        if self.dataset_dir.exists():
            return
        if self._source_file.exists() and read_json(self._source_file) != self._source:
            shutil.rmtree(self._directory / "raw", ignore_errors=True)  # Of an attempt that never became a dataset.
        self._source_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._source_file, self._source)
        raw_dir = self._raw_dir()
        build_dataset(study_spec(self.data), BuildConfig(input_dir=str(raw_dir)), self.dataset_dir)

    @property
    def _source_file(self) -> pathlib.Path:
        return self._directory / "source.json"

    @property
    def _source(self) -> dict[str, Any]:
        """Origin of the dataset, as far as the study declares it; the user's own tables by name and size."""
        simulated = self.data.simulate.model_dump(mode="json") if self.data.simulate is not None else None
        source = {"spec_fingerprint": study_spec(self.data).fingerprint, "simulate": simulated, "seed": self.seed}
        if self.given_input_dir is not None:
            files = sorted(path for path in self.given_input_dir.iterdir() if path.is_file())
            source["input_bytes"] = {path.name: path.stat().st_size for path in files}
        return source

    def require_same_source(self) -> None:
        """Refuses a dataset that was made from another declaration than the study's.

        Raises:
          ArtifactError: says so.
        """
        if self.given_dataset_dir is not None:
            given = DatasetDir(self.given_dataset_dir)
            if self.data.spec is not None and given.spec.fingerprint != study_spec(self.data).fingerprint:
                raise ArtifactError(
                    f"the dataset given for {self.data.name!r} must be built with the spec that the study declares. "
                    f"Received: {given.path}, of the spec {given.spec.name!r}. Allowed: {self.data.spec!r} with split "
                    f"{self.data.split or 'as it is'}. Build it again, or leave out --dataset_dir={self.data.name}"
                )
        elif self.dataset_dir.exists() and self._source_file.exists() and read_json(self._source_file) != self._source:
            raise ArtifactError(
                f"{self._directory} was made from another declaration of {self.data.name!r}, or from other tables. "
                "Received: a study that changed. Choose another --study_dir, or remove this one and the runs on it"
            )

    def _raw_dir(self) -> pathlib.Path:
        if self.given_input_dir is not None:
            return self.given_input_dir
        raw_dir = self._directory / "raw"
        if self.data.simulate is not None:
            if not raw_dir.exists():
                simulate_feed(self.data.simulate.model_copy(update={"seed": self.seed}), raw_dir)
            return raw_dir
        if not raw_dir.exists():
            fetch(raw_dir)
        return raw_dir


def study_spec(data: StudyData) -> FeatureSpec:
    """The feature spec of a dataset, with the study's changes of its split.

    Args:
      data: whose ``spec`` is not None.

    Returns:
      The spec to build by.

    Raises:
      SpecError: the split is not one.
    """
    spec = feature_specs.get_spec(data.spec)
    if not data.split:
        return spec
    content: dict[str, Any] = spec.model_dump(mode="json")
    content["split"] |= data.split
    return parse_spec(content, f"{data.name}: {data.spec} with another split")


def prepared_data(
    data: StudyData,
    seed: int,
    study_dir: pathlib.Path,
    dataset_dirs: Mapping[str, pathlib.Path],
    input_dirs: Mapping[str, pathlib.Path],
) -> PreparedData:
    """Finds the dataset of a cell, whether it is built already or not.

    Args:
      data: as the study declares it.
      seed: of the cell.
      study_dir: directory of the study.
      dataset_dirs: name of a dataset -> dataset directory of the user's.
      input_dirs: name of an input -> directory of the user's tables.

    Returns:
      The dataset; ``prepare`` builds it unless it is there.

    Raises:
      ValueError: the tables are the user's own, and nothing says where they are.
    """
    source = data.input or data.name
    if data.spec is None and data.name not in dataset_dirs:
        raise ValueError(
            f"data set {data.name!r} has no spec to build it by. Received: no dataset for it. "
            f"Add --dataset_dir={data.name}=<dataset directory>"
        )
    is_given = data.name in dataset_dirs or source in input_dirs
    if not (data.fetch or data.simulate or is_given):
        raise ValueError(
            f"the tables of data set {data.name!r} are not part of the study. Received: no directory for it. "
            f"Add --input_dir={source}=<directory with the tables of {data.spec}>"
        )
    is_simulated = data.simulate is not None and data.name not in dataset_dirs
    return PreparedData(
        data, seed if is_simulated else None, study_dir, dataset_dirs.get(data.name), input_dirs.get(source)
    )
