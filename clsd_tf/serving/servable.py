"""The embedded way to call a servable: load it here, score batches of raw rows."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
import tensorflow as tf

from clsd_tf.data.examples import arrow_to_tensors, bounded_batches
from clsd_tf.data.hashing import file_sha256
from clsd_tf.data.request_files import typed_rows
from clsd_tf.serving.versions import version_number, versions_on_disk
from clsd_tf.spec.model_inputs import RawInput

_DTYPES: Mapping[tf.DType, Literal["string", "int64", "float"]] = {
    tf.string: "string",
    tf.int64: "int64",
    tf.float32: "float",
}
_SCORING_PARTS = ("saved_model.pb", "variables", "assets")  # What else lies there decides no score.


class LocalServable:
    """A SavedModel with a ``predict_raw`` signature, loaded into this process.

    Args:
      path: a version directory, or the directory of a model, whose largest version is taken.

    Attributes:
      path: of the version.
      raw_inputs: what a row is made of.

    Raises:
      FileNotFoundError: no version there.
      ValueError: the version has no ``predict_raw``.
    """

    def __init__(self, path: pathlib.Path):
        self.path = version_directory(path)
        self._loaded = tf.saved_model.load(str(self.path))  # Kept: it owns the variables of the signature.
        signatures = self._loaded.signatures
        if "predict_raw" not in signatures:
            raise ValueError(
                f"rows are scored by the signature predict_raw. Received: {self.path} with "
                f"{', '.join(sorted(signatures)) or 'none'}. Export it with `python -m export.main`"
            )
        self._predict_raw = signatures["predict_raw"]
        specs = self._predict_raw.structured_input_signature[1]
        self.raw_inputs = tuple(
            RawInput(name, _DTYPES[spec.dtype], is_list=spec.shape.rank == 2) for name, spec in sorted(specs.items())
        )

    def score(self, rows: pa.Table) -> np.ndarray:
        """Scores rows of any types, read by the rules of the build: text, numbers and lists become the declared types.

        Args:
          rows: a column per raw input, maybe among others; a null or "" is a missing value.

        Returns:
          ctr, float32 [num_rows].

        Raises:
          ValueError: a raw input has no column, or a value that does not fit its type.
        """
        return self.score_typed(typed_rows(rows, self.raw_inputs))

    def score_typed(self, rows: pa.Table) -> np.ndarray:
        """Scores rows of the declared types.

        Args:
          rows: as ``request_files.typed_rows`` gives them.

        Returns:
          ctr, float32 [num_rows].
        """
        scores = [
            self._predict_raw(**arrow_to_tensors(batch, self.raw_inputs))["ctr"].numpy()
            for batch in bounded_batches(rows, self.raw_inputs)
        ]
        return np.concatenate(scores)

    @property
    def version(self) -> int | None:
        """The version that the directory's name says; None if it says none."""
        return version_number(self.path.resolve().name)

    def fingerprint(self) -> str:
        """Returns 16 hex digits over the names and bytes of all files that decide a score."""
        digest = hashlib.sha256()
        for file in sorted(self.path.rglob("*")):
            place = file.relative_to(self.path)
            if file.is_file() and place.parts[0] in _SCORING_PARTS:
                digest.update(f"{place.as_posix()} {file_sha256(file)}\n".encode())
        return digest.hexdigest()[:16]


def version_directory(path: pathlib.Path) -> pathlib.Path:
    """Finds the version to load.

    Args:
      path: a version directory, which is returned as it is, or that of a model, whose largest version is taken.

    Returns:
      A directory with a SavedModel.

    Raises:
      FileNotFoundError: no version there.
    """
    if (path / "saved_model.pb").is_file():
        return path
    versions = [child for child in versions_on_disk(path).values() if (child / "saved_model.pb").is_file()]
    if not versions:
        raise FileNotFoundError(
            f"a servable is a directory with saved_model.pb, or with numbered versions. Received: {path}"
        )
    return versions[-1]
