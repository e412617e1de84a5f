"""Builds a dataset directory: three Beam pipelines with plain checks between them.

1. ingest: read, check -> shuffle files, partitioned by user
2. join and fit: profiles, histories, splits; vocabularies and statistics -> shuffle files, by shard
3. encode: the one transform -> TFRecord shards

Between the pipelines the driver looks at small JSON results, so that bad input ends with an ordinary error as soon as
the step that meets it is done, and nothing is published unless every step succeeded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import apache_beam as beam

from clsd_tf.commands.console import step
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.model_inputs import NumericStatistics, Statistics
from clsd_tf.statistics.sketches import Histogram
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir, DatasetLayout
from clsd_tf.storage.files import read_json, staged_directory, write_json
from pipelines.beam import encoding, ingest, joining, results
from pipelines.beam.dead_letters import kept_dead_letter, merge_dead_letters
from pipelines.beam.engines import check_beam_arguments, make_pipeline
from pipelines.beam.inputs import list_inputs
from pipelines.beam.provenance import check_same_salt, write_manifest
from pipelines.rows import outcome
from pipelines.rows.checks import user_id_salt
from pipelines.rows.fitting import fitted_numbers
from pipelines.rows.outcome import BadInputError
from pipelines.rows.splits import expected_rows, split_cut_offs
from pipelines.rows.vocabularies import check_compatible, previous_numbers

_BYTES_PER_PARTITION = 16 << 20
_MAX_PARTITIONS = 4096  # Every shuffle file has a part for each: beyond 64 GB of log partitions grow instead.


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """Settings of a build.

    Attributes:
      input_dir: what the spec's table paths are relative to; for TFDS the ``data_dir`` (empty: the TFDS default).
      max_bad_fraction: the largest share of bad rows of a table, in [0, 1].
      rows_per_shard: a split gets about rows / rows_per_shard shards; a worker holds one shard in memory.
      compressed: GZIP the shards.
      grow_from: a dataset directory whose ids and numbers keep their meaning: its vocabularies are continued, also
        beyond ``max_size``, and its statistics of numeric features stay as they were fitted.
      beam_arguments: pipeline options for Beam, for example ``["--runner=FlinkRunner"]``.
    """

    input_dir: str
    max_bad_fraction: float = 0.01
    rows_per_shard: int = 250_000
    compressed: bool = False
    grow_from: pathlib.Path | None = None
    beam_arguments: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1]. Received: {self.max_bad_fraction}")
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1. Received: {self.rows_per_shard}")
        check_beam_arguments(self.beam_arguments)


def build_dataset(spec: FeatureSpec, config: BuildConfig, output_dir: pathlib.Path) -> dict[str, Any]:
    """Builds a dataset directory.

    Args:
      spec: of the dataset.
      config: settings that are not part of the spec.
      output_dir: to write; appears under its name only when it is complete.

    Returns:
      The content of counts.json: rows of tables and splits, what became of them, and the records' digest.

    Raises:
      FileExistsError: ``output_dir`` is there already.
      FileNotFoundError: a table's files are missing.
      RuntimeError: a file system cannot be reached.
      ValueError: a table's file cannot be read or lacks a declared column.
      SpecError: ``config.grow_from`` gives ids another meaning than ``spec``.
      BadInputError: a file that cannot be read to its end, too many bad rows, duplicate profiles (or events, where the
        spec says so), an empty table or split, a constant label, an empty vocabulary. The bad rows seen so far are kept
        beside ``output_dir``, as ``<output_dir>.dead_letter.parquet``.
    """
    output_dir = output_dir.absolute()  # Workers may have another working directory.
    with (
        staged_directory(output_dir) as staging,
        kept_dead_letter(DatasetLayout(staging).dead_letter, output_dir),
    ):
        build = _Build(spec, config, staging)
        build.ingest()
        build.join_and_fit()
        build.encode()
        build.finish()
    return build.counts


def inspect_data(
    spec: FeatureSpec, config: BuildConfig, scratch_dir: pathlib.Path
) -> tuple[dict[str, Any], Statistics]:
    """Joins and fits without writing a dataset.

    Args:
      spec: of the dataset.
      config: as for a build.
      scratch_dir: empty directory for vocabularies, statistics and intermediate files.

    Returns:
      The counts of a build so far, and the statistics that were fitted.

    Raises:
      As ``build_dataset``; bad rows are kept as ``<spec name>.dead_letter.parquet`` in the current directory.
    """
    with kept_dead_letter(DatasetLayout(scratch_dir).dead_letter, pathlib.Path(spec.name)):
        build = _Build(spec, config, scratch_dir)
        build.ingest()
        build.join_and_fit()
    return build.counts, Statistics.from_json(build.layout.statistics.read_text(encoding="utf-8"))


class _Build:
    """One build in its staging directory.

    Attributes:
      layout: of the staging directory.
      counts: what the steps so far found; becomes counts.json.
    """

    def __init__(self, spec: FeatureSpec, config: BuildConfig, staging: pathlib.Path):
        self.spec = spec
        self.config = config
        self.layout = DatasetLayout(staging)
        self.counts: dict[str, Any] = {}
        self._salt = user_id_salt(spec)
        self._previous_numbers: dict[str, NumericStatistics] = {}
        self._grown_from: str | None = None
        if config.grow_from:
            previous = DatasetDir(config.grow_from)
            check_compatible(spec, previous.spec)
            check_same_salt(previous.layout, spec, self._salt)
            self._previous_numbers = previous_numbers(previous, spec)
            self._grown_from = previous.fingerprint
        self._scratch = staging / "scratch"
        self._seconds: dict[str, float] = {}
        for directory in (self.layout.vocabularies, self.layout.records, self._scratch):
            directory.mkdir()
        self.layout.spec.write_text(spec.to_json(), encoding="utf-8")

    def _pipeline(self) -> beam.Pipeline:
        return make_pipeline(self.config.beam_arguments)

    @contextlib.contextmanager
    def _step(self, name: str, what: str, progress_text: Callable[[], str]):
        start = time.monotonic()
        with step(f"{name}: {what}", progress_text) as say:
            yield say
        self._seconds[name] = time.monotonic() - start

    # --- 1. ingest

    def ingest(self) -> None:
        with self._step("ingest", "read and check rows", self._ingested) as say:
            self._ingest()
            say(f"{self.counts['tables']['log']['rows']:,} rows")

    def _ingest(self) -> None:
        by_user, dead_letters = self._directory("by_user"), self._directory("dead_letters")
        self._inputs = list_inputs(self.spec, self.config.input_dir)
        self._num_partitions = self._partitions_for(self._inputs.num_bytes)
        with self._pipeline() as pipeline:
            batches, inputs = [], []
            if self._inputs.files:
                tables = dict(self.spec.tables.items())
                read, found = pipeline | "Read" >> ingest.ReadTables(self._inputs.files, tables)
                batches, inputs = [read], [found]
            if self._inputs.tfds_builder:
                batches.append(pipeline | "ReadTfds" >> ingest.ReadTfds(self._inputs.tfds_builder, self.spec))
            checked = (
                batches
                | "AllBatches" >> beam.Flatten()
                | "CheckRows" >> ingest.CheckRows(self.spec, self._salt, dead_letters)
            )
            rows = checked.rows | "Shuffle" >> ingest.WriteShuffleFiles(self.spec, by_user, self._num_partitions)
            for found in inputs:
                self._collect("inputs", found)
            self._collect("files", rows.files)
            self._collect("counts", checked.counts, ingest.merge_counts)
            self._collect("times", rows.times, ingest.merge_times)
        merge_dead_letters(dead_letters, self.layout.dead_letter)
        roles = [role for role, _ in self.spec.tables.items()]
        self.counts["tables"] = outcome.table_counts(self._collected("counts", {}), roles)
        outcome.require_good_tables(self.counts["tables"], self.config.max_bad_fraction)
        self._times = Histogram.from_dict(read_json(self._result("times")))
        self._by_user: dict[str, list[str]] = {}
        for role, path in sorted(self._collected("files", [])):
            self._by_user.setdefault(role, []).append(path)

    def _partitions_for(self, num_bytes: int) -> int:
        """So many that a partition with its histories, which repeat events, fits a worker well."""
        history_length = sum(feature.values_per_row for feature in self.spec.features if feature.is_list)
        return min(_MAX_PARTITIONS, 1 + num_bytes * (1 + history_length // 16) // _BYTES_PER_PARTITION)

    # --- 2. join and fit

    def join_and_fit(self) -> None:
        what = "profiles, histories, splits; vocabularies and statistics of train"
        with self._step("join and fit", what, self._joined) as say:
            self._join_and_fit()
            say(", ".join(f"{split} {self.counts['splits'][split]['rows']:,}" for split in SPLITS))

    def _join_and_fit(self) -> None:
        cut_offs = split_cut_offs(self.spec.split, self._times) if self.spec.split.rule == "time" else []
        expected = expected_rows(self.spec.split, cut_offs, self._times)
        self._buckets = joining.Buckets(
            {split: max(1, -(-expected[split] // self.config.rows_per_shard)) for split in SPLITS}
        )
        plan = joining.JoinPlan(
            spec=self.spec,
            files=self._by_user,
            num_partitions=self._num_partitions,
            cut_offs=cut_offs,
            buckets=self._buckets,
            directory=self._directory("by_shard"),
            grow_from=self.config.grow_from and self.config.grow_from.absolute(),
        )
        self._num_units = len(plan.units())
        with self._pipeline() as pipeline:
            joined, errors = pipeline | "JoinAndFit" >> joining.JoinAndFit(plan, self.layout, self._result("summary"))
            self._collect("joined", joined)
            self._collect("vocabularies", errors)
        summary = read_json(self._result("summary"))
        outcome.require_unique_keys(summary["counts"], self.spec, self._inputs.names)
        self.counts |= outcome.split_counts(summary, self.spec, cut_offs)
        self.counts["vocabulary_count_errors"] = dict(self._collected("vocabularies", []))
        outcome.require_usable_splits(self.counts, self.spec)
        self.counts["accounting"] = outcome.account(self.counts, summary["counts"])
        self._write_statistics(summary["numeric"])
        shutil.rmtree(self._scratch / "by_user")

    def _write_statistics(self, numeric: Mapping[str, Any]) -> None:
        lengths = {}
        for name, rule in self.spec.vocabularies.items():
            lengths[name] = len(self.layout.vocabulary(name).read_bytes().split(b"\n")) - 1
            if not lengths[name]:
                raise BadInputError(
                    f"the vocabulary of {name!r} is empty. Received: no value with min_count={rule.min_count} in the "
                    "training split. Lower min_count, or use hash_buckets"
                )
        fitted = fitted_numbers(self.spec, numeric, self._previous_numbers)
        self.layout.statistics.write_text(Statistics(lengths, fitted).to_json(), encoding="utf-8")

    # --- 3. encode

    def encode(self) -> None:
        with self._step("encode", "transform -> TFRecord shards", self._encoded) as say:
            self._encode()
            say(f"{self.counts['accounting']['written']:,} rows")

    def _encode(self) -> None:
        files = sorted(self._collected("joined", []))
        num_rows = {split: self.counts["splits"][split]["rows"] for split in SPLITS}
        with self._pipeline() as pipeline:
            shards = pipeline | "EncodeShards" >> encoding.EncodeShards(
                self.spec,
                self.layout,
                files,
                self._buckets,
                num_test_rows=num_rows["test"],
                compressed=self.config.compressed,
            )
            self._collect("shards", shards)
        written = self._collected("shards", [])
        received = {split: sum(shard["rows"] for shard in written if shard["split"] == split) for split in SPLITS}
        if received != num_rows:
            raise RuntimeError(f"rows were lost while encoding. Received: {received}. Expected: {num_rows}")
        digests = sorted(f"{shard['split']}-{shard['shard']} {shard['digest']}" for shard in written)
        self.counts["records_digest"] = hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def finish(self) -> None:
        """Removes intermediate files, writes the manifest and marks the directory complete."""
        inputs = sorted(self._collected("inputs", []), key=lambda entry: (entry["table"], entry.pop("index")))
        shutil.rmtree(self._scratch)
        for leftover in self.layout.records.glob("*.incomplete"):  # Of attempts that a runner gave up.
            leftover.unlink()
        write_json(self.layout.counts, self.counts)
        write_manifest(
            self.layout,
            self.spec,
            grown_from=self._grown_from,
            salt=self._salt,
            inputs=inputs,
            counts=self.counts,
            seconds=self._seconds,
        )
        self.layout.mark_complete(self.spec)

    # --- progress

    def _ingested(self) -> str:
        return f"{sum(path.stat().st_size for path in self._scratch.glob('by_user/*.arrow')) >> 20:,} MiB"

    def _joined(self) -> str:
        done = len(list(self._scratch.glob("by_shard/vocabularies-*.arrow")))
        return f"{done:,} of {self._num_units:,} units of users"

    def _encoded(self) -> str:
        return f"{len(list(self.layout.records.glob('*.tfrecord*[!e]'))):,} of {self._buckets.total:,} shards"

    # --- results of a pipeline

    def _directory(self, name: str) -> pathlib.Path:
        path = self._scratch / name
        path.mkdir()
        return path

    def _result(self, name: str) -> pathlib.Path:
        return self._scratch / f"{name}.json"

    def _collect(self, name: str, elements: beam.PCollection, merge: Callable = list) -> None:
        _ = elements | f"Write_{name}" >> results.WriteTogether(self._result(name), merge)

    def _collected(self, name: str, default: Any) -> Any:
        """Value that ``_collect`` has written, or the default where there were no elements."""
        path = self._result(name)
        return read_json(path) if path.exists() else default
