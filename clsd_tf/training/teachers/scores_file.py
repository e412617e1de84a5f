"""The teacher ``scores``: scores from anywhere, in a file with a row for each training row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.storage.files import ArtifactError
from clsd_tf.training.teachers.job import TeacherJob

_COLUMNS = {"row_id": pa.int64(), "score": pa.float64()}


def scores_file(job: TeacherJob) -> RowValues:
    """Reads ``row_id`` and ``score`` of every training row from a Parquet file.

    Args:
      job: names the file.

    Returns:
      Scores in the order of the training records, NaN where the file has none (null or NaN).

    Raises:
      ArtifactError: the file cannot be read or lacks a column, names a row twice, misses a training row or has one
        that is none, or a score is outside of [0, 1].
    """
    (path,) = job.files
    row_ids, scores = _read(path)
    wanted = input_pipeline.read_columns(job.dataset, "train", ["row_id"])["row_id"]
    order = np.argsort(row_ids)
    row_ids, scores = row_ids[order], scores[order]
    _require(path, len(np.unique(row_ids)) == len(row_ids), "names each row once", "a row twice")
    missing, more = np.setdiff1d(wanted, row_ids).size, np.setdiff1d(row_ids, wanted).size
    received = f"{missing:,} training rows without a score, {more:,} scores of other rows"
    _require(path, not missing and not more, "has a score for each training row, and no other", received)
    known = scores[~np.isnan(scores)]
    out_of_range = int(((known < 0) | (known > 1)).sum())
    _require(path, not out_of_range, "holds scores in [0, 1]", f"{out_of_range:,} outside of it")
    return RowValues(wanted, scores[np.searchsorted(row_ids, wanted)].astype(np.float32))


def _read(path: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        table = pyarrow.parquet.read_table(path, columns=list(_COLUMNS))
        columns = {name: table.column(name).cast(dtype) for name, dtype in _COLUMNS.items()}
    except (OSError, KeyError, pa.ArrowException) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ArtifactError(
            "teacher scores are a Parquet file with the columns row_id (int64) and score (float). "
            f"Received: {path}: {first_line}"
        ) from error
    _require(path, not columns["row_id"].null_count, "names a row for each score", "scores without row_id")
    return columns["row_id"].to_numpy(), columns["score"].to_numpy()


def _require(path: str, holds: bool, rule: str, received: str) -> None:
    if not holds:
        raise ArtifactError(f"a file of teacher scores {rule}. Received: {path} with {received}")
