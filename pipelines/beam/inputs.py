"""Input files of a build: what is there to read, and how large it is."""

from __future__ import annotations

import dataclasses
from typing import Any

from clsd_tf.spec.feature_spec import FeatureSpec
from pipelines import sources
from pipelines.beam.ingest import tfds_files


@dataclasses.dataclass(frozen=True)
class BuildInputs:
    """Inputs of a build.

    Attributes:
      files: of all tables but those of TensorFlow Datasets.
      names: (table, index of a file) -> the file's name.
      num_bytes: of the tables that are partitioned by user; of compressed files about what they hold.
      tfds_builder: of the log, if it is a TensorFlow Datasets name; None otherwise.
    """

    files: list[sources.SourceFile]
    names: dict[tuple[str, int], str]
    num_bytes: int
    tfds_builder: Any = None


def list_inputs(spec: FeatureSpec, input_dir: str) -> BuildInputs:
    """Finds the files of all tables of a spec and checks their columns.

    Args:
      spec: declares the tables.
      input_dir: what their paths are relative to; for TensorFlow Datasets the ``data_dir`` (empty: its default), to
        which a data set that is not there is downloaded.

    Returns:
      The files in the order of the spec's tables.

    Raises:
      FileNotFoundError, RuntimeError, ValueError: as ``sources.list_files``.
    """
    files: list[sources.SourceFile] = []
    names: dict[tuple[str, int], str] = {}
    builder, num_bytes = None, 0
    for role, table in spec.tables.items():
        if table.format == "tfds":
            builder = _tfds_builder(table.path, input_dir)
            num_bytes += sum(split.num_bytes for split in builder.info.splits.values())
            names |= {(role, index): name for index, name in enumerate(tfds_files(builder))}
            continue
        found = sources.list_files(table, role, input_dir)
        files += found
        names |= {(role, file.index): file.name for file in found}
        if role == "log" or role in spec.user_tables:
            num_bytes += sum(sources.size_in_bytes(file, table) for file in found)
    return BuildInputs(files, names, num_bytes, builder)


def _tfds_builder(name: str, data_dir: str):
    import tensorflow_datasets as tfds  # Slow to import, and only needed here.

    builder = tfds.builder(name, data_dir=data_dir or None)
    if not builder.is_prepared():
        builder.download_and_prepare()
    return builder
