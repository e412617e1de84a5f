"""Scores files of any size with a servable: one Beam pipeline with RunInference.

Files are cut into slices, slices are read, checked and scored side by side, a batch of rows at a time, in Arrow and
TensorFlow. A batch becomes a Parquet file whose name says where its rows stand, so that files sorted by name hold the
rows in the order of the input, whatever the engine.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf
from apache_beam.ml.inference.base import ModelHandler, RunInference

from clsd_tf.commands.console import step
from clsd_tf.serving.servable import LocalServable
from clsd_tf.spec.model_inputs import RawInput
from clsd_tf.spec.tables import Table
from clsd_tf.storage.files import read_json, staged_directory, write_json
from pipelines.beam import ingest
from pipelines.beam.dead_letters import kept_dead_letter, merge_dead_letters, write_dead_letter
from pipelines.beam.engines import check_beam_arguments, make_pipeline
from pipelines.beam.provenance import code_versions
from pipelines.beam.results import WriteTogether
from pipelines.beam.scoring_input import ADDED, ROLE, declare_input, find_files, split_rows
from pipelines.beam.shuffle_files import temporary_name
from pipelines.rows.outcome import BadInputError
from pipelines.sources import RawBatch, SourceFile

_ROWS_PER_CALL = 4096  # Of the model: larger batches are no faster and need more memory.
_COUNTS = "counts"


@dataclasses.dataclass(frozen=True)
class PlacedRows:
    """Rows of one file, the first of which has the number ``first_row``; ``len`` is their number."""

    file_index: int
    first_row: int
    rows: pa.Table

    def __len__(self) -> int:
        return self.rows.num_rows


class ServableHandler(ModelHandler[PlacedRows, PlacedRows, LocalServable]):
    """Lets RunInference add ``ctr`` and ``servable_version`` to rows; one servable per process.

    Args:
      path: of a version, as workers see it.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = str(path)

    def load_model(self) -> LocalServable:
        return LocalServable(pathlib.Path(self._path))

    def run_inference(
        self, batch: PlacedRows, model: LocalServable, inference_args: dict[str, Any] | None = None
    ) -> list[PlacedRows]:
        """Scores one batch.

        Args:
          batch: of any length; its columns hold the raw inputs, typed.
          model: of ``load_model``.
          inference_args: not used.

        Returns:
          The same rows, once, with ``ctr``, float32, and ``servable_version``, int64, behind their columns.
        """
        raw = batch.rows.select([entry.name for entry in model.raw_inputs])
        calls = [raw.slice(start, _ROWS_PER_CALL) for start in range(0, len(batch), _ROWS_PER_CALL)]
        ctr = np.concatenate([model.score_typed(rows) for rows in calls])
        version = pa.array([model.version] * len(batch), pa.int64())
        rows = batch.rows
        for name, values in zip(ADDED, (pa.array(ctr), version), strict=True):
            rows = rows.append_column(name, values)
        return [dataclasses.replace(batch, rows=rows)]

    def should_skip_batching(self) -> bool:
        return True  # Rows come in batches already.

    def get_num_bytes(self, batch: PlacedRows) -> int:
        return batch.rows.nbytes  # By default the batch would be pickled to see how long that is.

    def get_metrics_namespace(self) -> str:
        return "predict"


class _SplitRowsFn(beam.DoFn):
    """Raw batches -> ``PlacedRows`` and counts; bad rows go to files of the dead letter."""

    def __init__(self, table: Table, raw_inputs: Sequence[RawInput], dead_letter_dir: pathlib.Path):
        self._table = table
        self._raw_inputs = raw_inputs
        self._dead_letter_dir = str(dead_letter_dir)

    def process(self, batch: RawBatch) -> Iterator:
        rows, numbers, bad_rows = split_rows(batch, self._table, self._raw_inputs)
        counts = Counter(read=rows.num_rows + sum(row.lines for row in bad_rows))
        for row in bad_rows:
            counts[f"bad/{row.reason}"] += row.lines
        if batch.unreadable:
            counts[f"unreadable/{batch.file.name}: {batch.unreadable}"] += 1
        if bad_rows:
            write_dead_letter(bad_rows, batch.file, self._dead_letter_dir)
        yield beam.pvalue.TaggedOutput(_COUNTS, counts)
        if rows.num_rows:
            yield PlacedRows(batch.file.index, int(numbers[0]), rows)


def _write_rows(placed: PlacedRows, directory: str) -> Counter:
    """Writes a file under a name that a second attempt writes again; returns its number of rows."""
    path = f"{directory}/part-{placed.file_index:05d}-{placed.first_row:012d}.parquet"
    temporary = temporary_name(path)
    pa.parquet.write_table(placed.rows, temporary)
    tf.io.gfile.rename(temporary, path, overwrite=True)
    return Counter(scored=len(placed))


def score_files(
    servable_path: pathlib.Path,
    pattern: str,
    output_dir: pathlib.Path,
    *,
    file_format: str | None = None,
    max_bad_fraction: float = 0.01,
    beam_arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores all rows of the files that match; ``output_dir`` appears when it is whole.

    It holds ``scores/part-*.parquet`` with the columns of the input, ctr and servable_version; ``manifest.json``; and
    ``dead_letter.parquet`` with file, row and reason of each row that could not be scored, if there are any.

    Args:
      servable_path: directory of a version, or of a model, whose largest version is taken; workers read it, too.
      pattern: path of the files, may be a glob.
      output_dir: must not exist; workers write to it, so it must be a path that they share.
      file_format: as in a spec; by default what the first file's name or its first lines say.
      max_bad_fraction: the largest share of bad rows, in [0, 1].
      beam_arguments: pipeline options for Beam.

    Returns:
      The manifest.

    Raises:
      FileExistsError: ``output_dir`` is there already.
      FileNotFoundError: no servable, or no file.
      ValueError: columns that do not fit the servable, or unknown Beam flags.
      BadInputError: no rows, too many bad ones, or a file that cannot be read to its end. The bad rows are kept beside
        ``output_dir``, as ``<output_dir>.dead_letter.parquet``.
    """
    check_beam_arguments(beam_arguments)
    start = time.monotonic()
    output_dir = output_dir.absolute()  # Workers may have another working directory.
    servable = LocalServable(servable_path.absolute())
    files = find_files(pattern)
    table = declare_input(files, servable.raw_inputs, file_format)
    with staged_directory(output_dir) as staging:
        layout = _Layout(staging)
        with kept_dead_letter(layout.dead_letter, output_dir), step(f"score {len(files):,} file(s)", layout.progress):
            with make_pipeline(beam_arguments) as pipeline:
                _score(pipeline, files, table, servable, layout)
            merge_dead_letters(layout.dead_letters, layout.dead_letter, ("file", "row", "reason", "lines"))
            rows, bad_rows = _account(_collected(layout.counts, {}), max_bad_fraction)
        inputs = sorted(read_json(layout.inputs), key=lambda entry: entry["index"])
        manifest = {
            "servable": {
                "model_name": servable.path.resolve().parent.name,
                "version": servable.version,
                "fingerprint": servable.fingerprint(),
            },
            "inputs": [{name: entry[name] for name in ("file", "bytes", "sha256")} for entry in inputs],
            "rows": rows,
            "bad_rows": bad_rows,
            "code": code_versions(),
            "scored_at": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 3),
        }
        layout.remove_intermediate()
        write_json(layout.manifest, manifest)
    return manifest


class _Layout:
    """Names in a directory of scores."""

    def __init__(self, root: pathlib.Path):
        self.scores = root / "scores"
        self.manifest = root / "manifest.json"
        self.dead_letter = root / "dead_letter.parquet"
        self._scratch = root / "scratch"
        self.dead_letters = self._scratch / "dead_letters"
        self.counts = self._scratch / "counts.json"
        self.inputs = self._scratch / "inputs.json"
        for directory in (self.scores, self.dead_letters):
            directory.mkdir(parents=True)

    def progress(self) -> str:
        return f"{len(list(self.scores.glob('*.parquet'))):,} batches of rows"

    def remove_intermediate(self) -> None:
        shutil.rmtree(self._scratch)
        for leftover in self.scores.glob("*.incomplete"):  # Of attempts that a runner gave up.
            leftover.unlink()


def _score(
    pipeline: beam.Pipeline, files: Sequence[SourceFile], table: Table, servable: LocalServable, layout: _Layout
) -> None:
    """Adds all steps to a pipeline: its counts and what it read are files of the layout."""
    batches, inputs = pipeline | "Read" >> ingest.ReadTables(files, {ROLE: table})
    split = _SplitRowsFn(table, servable.raw_inputs, layout.dead_letters)
    checked = batches | "SplitRows" >> beam.ParDo(split).with_outputs(_COUNTS, main="rows")
    written = (
        checked.rows
        | "Score" >> RunInference(ServableHandler(servable.path))
        | "WriteRows" >> beam.Map(_write_rows, str(layout.scores))
    )
    counts = (checked[_COUNTS], written) | "AllCounts" >> beam.Flatten()
    _ = counts | "Counts" >> WriteTogether(layout.counts, ingest.merge_counts)
    _ = inputs | "Inputs" >> WriteTogether(layout.inputs, list)


def _collected(path: pathlib.Path, default: Any) -> Any:
    """Value that the pipeline wrote, or the default where there was nothing to write."""
    return read_json(path) if path.exists() else default


def _account(counts: Mapping[str, int], max_bad_fraction: float) -> tuple[dict[str, int], dict[str, int]]:
    """({read, scored, bad}, bad rows by reason).

    Raises:
      BadInputError: by the rules of ``score_files``.
      RuntimeError: rows are unaccounted for.
    """
    unreadable = _ending(counts, "unreadable/")
    if unreadable:
        raise BadInputError(f"a file must be readable to its end. Received: {min(unreadable)}")
    bad_rows = _ending(counts, "bad/")
    rows = {"read": counts.get("read", 0), "scored": counts.get("scored", 0), "bad": sum(bad_rows.values())}
    if not rows["read"]:
        raise BadInputError("--input must have rows. Received: 0 rows")
    if rows["bad"] > max_bad_fraction * rows["read"] or rows["bad"] == rows["read"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad_rows.items())
        raise BadInputError(
            f"too many rows that cannot be scored. Received: {rows['bad']:,} of {rows['read']:,} ({reasons}). "
            f"Allowed: max_bad_fraction={max_bad_fraction:g}, and not all"
        )
    if rows["read"] != rows["scored"] + rows["bad"]:
        raise RuntimeError(f"rows were lost. Received: {rows}. Expected: read = scored + bad")
    return rows, bad_rows


def _ending(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    """The counts whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): counts[name] for name in sorted(counts) if name.startswith(prefix)}
