"""Builds a dataset directory: three Beam pipelines with plain checks between them.

1. join: read, check, join profile and item tables, derive histories -> Parquet
2. fit: split, count, vocabularies and statistics on the training split only
3. encode: the one transform -> TFRecord shards

Between the pipelines the driver looks at small JSON results, so that bad input ends with an ordinary error as soon as
the step that meets it is done, and nothing is published unless every step succeeded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import hashlib
import itertools
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from clsd_tf.artifacts import SPLITS, DatasetLayout, read_json, staged_directory, write_json
from clsd_tf.console import step
from clsd_tf.features import FeatureSpec, NumericFeature
from clsd_tf.model_inputs import NumericStatistics, Statistics
from pipelines import fitting, results, sources, transforms
from pipelines.splits import TimeHistogram, split_cut_offs

_BYTES_PER_PARTITION = 64 << 20


class BadInputError(ValueError):
    """Source data that breaks a rule; nothing was published."""


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """How a dataset is built.

    Attributes:
      input_dir: what the spec's table paths are relative to; for TFDS the ``data_dir`` (empty: the TFDS default).
      max_bad_fraction: the largest share of bad rows of a table, in [0, 1].
      rows_per_shard: a split gets ceil(rows / rows_per_shard) shards; a worker holds one shard in memory.
      compressed: GZIP the shards.
      beam_arguments: pipeline options for Beam, for example ``["--runner=FlinkRunner"]``.
    """

    input_dir: str
    max_bad_fraction: float = 0.01
    rows_per_shard: int = 250_000
    compressed: bool = False
    beam_arguments: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1]. Received: {self.max_bad_fraction}")
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1. Received: {self.rows_per_shard}")
        check_beam_arguments(self.beam_arguments)


def build_dataset(spec: FeatureSpec, config: BuildConfig, output_dir: pathlib.Path) -> dict[str, Any]:
    """Builds ``output_dir`` and returns its counts.

    Raises:
      FileExistsError: ``output_dir`` is there already.
      FileNotFoundError: a table's files are missing.
      BadInputError: too many bad rows, duplicate profiles, an empty table or split, a constant label, an empty
        vocabulary. The bad rows seen so far are kept beside ``output_dir``, as ``<output_dir>.dead_letter.jsonl``.
    """
    with staged_directory(output_dir) as staging, _kept_dead_letter(staging, output_dir):
        build = _Build(spec, config, staging)
        counts = build.join_and_fit()
        with step("encode: transform -> TFRecord shards") as say:
            build.encode(counts)
            say(f"{sum(counts['splits'][split]['rows'] for split in SPLITS):,} rows")
        build.finish(counts)
    return counts


def inspect_data(
    spec: FeatureSpec, config: BuildConfig, scratch_dir: pathlib.Path
) -> tuple[dict[str, Any], Statistics]:
    """Joins and fits without writing a dataset: what a build would find.

    Raises:
      As ``build_dataset``; bad rows are kept as ``<spec name>.dead_letter.jsonl`` in the current directory.
    """
    build = _Build(spec, config, scratch_dir)
    with _kept_dead_letter(scratch_dir, pathlib.Path(spec.name)):
        counts = build.join_and_fit()
    return counts, Statistics.from_json(build.layout.statistics.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _kept_dead_letter(staging: pathlib.Path, output_dir: pathlib.Path) -> Iterator[None]:
    """When a build fails, saves the bad rows from the staging directory, which is about to be removed."""
    try:
        yield
    except BadInputError as error:
        found = DatasetLayout(staging).dead_letter
        if not found.exists():
            raise
        kept = output_dir.with_name(f"{output_dir.name}.dead_letter.jsonl")
        for attempt in itertools.count(2):
            if not kept.exists():
                break
            kept = output_dir.with_name(f"{output_dir.name}.dead_letter-{attempt}.jsonl")
        shutil.move(found, kept)
        raise BadInputError(f"{error}. The bad rows are in {kept}") from error


class _Build:
    """One build in its staging directory."""

    def __init__(self, spec: FeatureSpec, config: BuildConfig, staging: pathlib.Path):
        self.spec = spec
        self.config = config
        self.layout = DatasetLayout(staging)
        self._file_names: dict[tuple[str, int], str] = {}  # (role, file index) -> name
        self._joined = staging / "joined"
        self._numeric = staging / "numeric"
        for directory in (self.layout.vocabularies, self.layout.records, self._joined, self._numeric):
            directory.mkdir()
        self.layout.spec.write_text(spec.to_json(), encoding="utf-8")

    def _pipeline(self) -> beam.Pipeline:
        options = PipelineOptions(list(self.config.beam_arguments))
        runner = options.view_as(StandardOptions).runner
        if runner in (None, "DirectRunner"):
            # DirectRunner's in-process engine by name: "DirectRunner" would first try to download another one.
            return beam.Pipeline(runner=FnApiRunner(), options=options)
        return beam.Pipeline(options=options)

    def join_and_fit(self) -> dict[str, Any]:
        with step("join: read, check, join profiles, derive histories") as say:
            joined, times = self._join()
            say(f"{joined['tables']['log']['rows']:,} rows")
        with step("fit: split, vocabularies and statistics on the training split") as say:
            counts = {**joined, **self._fit(times)}
            say(", ".join(f"{split} {counts['splits'][split]['rows']:,}" for split in SPLITS))
        return counts

    # --- 1. join

    def _join(self) -> tuple[dict[str, Any], TimeHistogram]:
        read = self._readers()
        result, histogram = self.layout.root / "join.json", self.layout.root / "times.json"
        with self._pipeline() as pipeline:
            batches = [pipeline | f"Read_{index}" >> reader for index, reader in enumerate(read)]
            checked = batches | "AllBatches" >> beam.Flatten() | "CheckRows" >> transforms.CheckRows(self.spec)
            joined = checked.rows | "JoinTables" >> transforms.JoinTables(self.spec, self._joined, self._num_partitions)
            counts = (checked.counts, joined.counts) | "AllCounts" >> beam.Flatten()
            _ = checked.bad_rows | "DeadLetter" >> transforms.WriteDeadLetter(self.layout.dead_letter)
            _ = (
                counts
                | "SumCounts" >> beam.CombineGlobally(results.MergeCounts())
                | "WriteCounts" >> results.WriteJson(result)
            )
            _ = (
                joined.times
                | "Times" >> beam.CombineGlobally(transforms.MergeTimeHistograms())
                | "TimesToJson" >> beam.Map(TimeHistogram.to_dict)
                | "WriteTimes" >> results.WriteJson(histogram)
            )
        found = _nest_join_counts(read_json(result), [role for role, _ in self.spec.tables.items()])
        self._check_tables(found, read_json(result))
        return found, TimeHistogram(**read_json(histogram))

    def _readers(self) -> list[beam.PTransform]:
        files = []
        readers: list[beam.PTransform] = []
        log_bytes = 0
        for role, table in self.spec.tables.items():
            if table.format == "tfds":
                builder = _tfds_builder(table.path, self.config.input_dir)
                readers.append(transforms.ReadTfds(builder, "+".join(builder.info.splits), self.spec))
                log_bytes = sum(split.num_bytes for split in builder.info.splits.values())
                continue
            found = sources.list_files(table, role, self.config.input_dir)
            self._file_names |= {(role, file.index): file.name for file in found}
            files += found
            if role == "log":
                log_bytes = sum(sources.size_in_bytes(file) for file in found)
        self._num_partitions = 1 + log_bytes // _BYTES_PER_PARTITION
        return [*readers, transforms.ReadTables(files, self.spec)] if files else readers

    def _check_tables(self, found: dict[str, Any], raw_counts: Mapping[str, int]) -> None:
        for role, entry in found["tables"].items():
            if not entry["rows"]:
                raise BadInputError(f"a table must have rows. Received: tables.{role} with 0 rows. Allowed: at least 1")
            bad = sum(entry["bad"].values())
            if bad > self.config.max_bad_fraction * entry["rows"]:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(entry["bad"].items()))
                raise BadInputError(
                    f"too many bad rows in tables.{role}. Received: {bad:,} of {entry['rows']:,} ({reasons}). "
                    f"Allowed: max_bad_fraction={self.config.max_bad_fraction:g}"
                )
            if bad == entry["rows"]:
                raise BadInputError(f"a table must have good rows. Received: tables.{role} with {bad:,} bad rows only")
        for name, count in raw_counts.items():
            if "/duplicates/" in name:
                role, _, *row_ids = name.split("/")
                places = " and ".join(self._place(role, int(row_id)) for row_id in row_ids)
                raise BadInputError(
                    f"a key of tables.{role} must be unique. Received: {places} with the same "
                    f"{dict(self.spec.tables.items())[role].key} ({count:,} such row(s)). Remove the duplicates"
                )

    def _place(self, role: str, row_id: int) -> str:
        return f"row {sources.row_number(row_id)} of {self._file_names[role, sources.file_index(row_id)]}"

    # --- 2. fit

    def _fit(self, histogram: TimeHistogram) -> dict[str, Any]:
        cut_offs = split_cut_offs(self.spec.split, histogram) if self.spec.split.rule == "time" else []
        self._cut_offs = cut_offs
        path = self.layout.root / "fit.json"
        with self._pipeline() as pipeline:
            rows = pipeline | "ReadJoined" >> transforms.ReadJoined(self._joined_files(), self.spec, cut_offs)
            train = rows | "OnlyTrain" >> beam.Filter(lambda row: row[0] == 0) | "TrainTables" >> beam.Values()
            _ = rows | "CountSplits" >> fitting.CountSplits(self.spec) | "WriteCounts" >> results.WriteJson(path)
            _ = train | "WriteFitted" >> fitting.WriteFitted(self.spec, self.layout, self._numeric)
        splits = _nest_split_counts(read_json(path), self.spec)
        self._check_splits(splits, cut_offs)
        self._write_statistics()
        moments = [_iso_time(cut_off) for cut_off in cut_offs]
        names = ("validation_from", "test_from", "until")
        return {"splits": splits, "split_rule": self.spec.split.rule, **dict(zip(names, moments, strict=False))}

    def _joined_files(self) -> list[str]:
        return sorted(str(path) for path in self._joined.glob("*.parquet"))

    def _check_splits(self, splits: dict[str, Any], cut_offs: list[int]) -> None:
        for name, entry in splits.items():
            sizes = ", ".join(f"{split} {splits[split]['rows']:,}" for split in SPLITS)
            if not entry["rows"]:
                raise BadInputError(
                    f"every split must have rows. Received: {sizes}, with rule {self.spec.split.rule} and cut-offs "
                    f"{[_iso_time(cut_off) for cut_off in cut_offs]}. Change the spec's split"
                )
            if entry["clicks"] in (0, entry["rows"]):
                raise BadInputError(
                    f"the label must not be constant. Received: {entry['clicks']:,} clicks in {entry['rows']:,} rows "
                    f"of {name}, by label `{self.spec.label}`. Allowed: both values in every split"
                )

    def _write_statistics(self) -> None:
        lengths = {}
        for name, rule in self.spec.vocabularies.items():
            path = self.layout.vocabulary(name)
            lengths[name] = len(path.read_text(encoding="utf-8").split("\n")) - 1 if path.exists() else 0
            if not lengths[name]:
                raise BadInputError(
                    f"the vocabulary of {name!r} is empty. Received: no value with min_count={rule.min_count} in the "
                    "training split. Lower min_count, or use hash_buckets"
                )
        numeric = {}
        for feature in self.spec.features:
            if isinstance(feature, NumericFeature):
                path = self._numeric / f"{feature.name}.json"
                if not path.exists():
                    raise BadInputError(
                        f"numeric feature {feature.name!r} has no value in the training split. Received: column "
                        f"{feature.column!r} with only missing values. Remove the feature"
                    )
                entry = read_json(path)
                numeric[feature.name] = NumericStatistics(**{**entry, "boundaries": tuple(entry["boundaries"])})
        self.layout.statistics.write_text(Statistics(lengths, numeric).to_json(), encoding="utf-8")

    # --- 3. encode

    def encode(self, counts: Mapping[str, Any]) -> None:
        num_rows = {split: counts["splits"][split]["rows"] for split in SPLITS}
        num_shards = {split: -(-rows // self.config.rows_per_shard) for split, rows in num_rows.items()}
        written = self.layout.root / "written.json"
        with self._pipeline() as pipeline:
            rows = pipeline | "ReadJoined" >> transforms.ReadJoined(self._joined_files(), self.spec, self._cut_offs)
            _ = (
                rows
                | "EncodeShards" >> transforms.EncodeShards(self.spec, self.layout, num_shards, self.config.compressed)
                | "AllShards" >> beam.combiners.ToList()
                | "WriteShards" >> results.WriteJson(written)
            )
            _ = rows | "ServingSample" >> transforms.WriteServingSample(
                self.spec, self.layout.serving_sample, num_rows["test"]
            )
        self._check_shards(read_json(written), num_rows, num_shards)

    def _check_shards(
        self, written: list[dict[str, Any]], num_rows: dict[str, int], num_shards: dict[str, int]
    ) -> None:
        """Every row must be written; a shard that got none becomes an empty file, so that their number is right."""
        received = {split: sum(shard["rows"] for shard in written if shard["split"] == split) for split in SPLITS}
        if received != num_rows:
            raise RuntimeError(f"rows were lost while encoding. Received: {received}. Expected: {num_rows}")
        for split in SPLITS:
            for index in range(num_shards[split]):
                path = self.layout.shard(split, index, num_shards[split], self.config.compressed)
                if not path.exists():
                    transforms.write_records(path, [], self.config.compressed)
        digests = sorted(f"{shard['split']}-{shard['shard']} {shard['digest']}" for shard in written)
        self._records_digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Removes intermediate files and marks the directory complete."""
        for directory in (self._joined, self._numeric):
            shutil.rmtree(directory)
        for name in ("join.json", "times.json", "fit.json", "written.json"):
            (self.layout.root / name).unlink()
        for leftover in self.layout.records.glob("*.incomplete"):  # Of attempts that a runner gave up.
            leftover.unlink()
        write_json(self.layout.counts, {**counts, "records_digest": self._records_digest})
        self.layout.mark_complete(self.spec)


def _tfds_builder(name: str, data_dir: str):
    import tensorflow_datasets as tfds  # Slow to import, and only needed here.

    builder = tfds.builder(name, data_dir=data_dir or None)
    if not builder.is_prepared():
        builder.download_and_prepare()
    return builder


def check_beam_arguments(arguments: Sequence[str]) -> None:
    """Refuses flags that neither a command nor Beam knows: Beam itself would drop them with a log line.

    Raises:
      ValueError: names the unknown flags.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    pending = [PipelineOptions]
    while pending:
        options = pending.pop()
        pending += options.__subclasses__()
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(
            f"unknown flags. Received: {' '.join(unknown)}. Allowed: the flags that --help lists, and Beam's options"
        )


def _nest_join_counts(counts: Mapping[str, int], roles: list[str]) -> dict[str, Any]:
    tables: dict[str, Any] = {role: {"rows": counts.get(f"{role}/rows", 0), "bad": {}} for role in roles}
    missing = {}
    for name, count in counts.items():
        role, _, rest = name.partition("/")
        if rest.startswith("bad/"):
            tables[role]["bad"][rest.removeprefix("bad/")] = count
        elif name.endswith("_profile_missing"):
            missing[name] = count
    return {"tables": tables, **missing}


def _nest_split_counts(counts: Mapping[str, int], spec: FeatureSpec) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        rows, clicks = counts.get(f"{split}/rows", 0), counts.get(f"{split}/clicks", 0)
        groups = {
            group.name: {
                label: {
                    kind: counts.get(f"{split}/group/{group.name}/{label}/{kind}", 0) for kind in ("rows", "clicks")
                }
                for label in group.labels
            }
            for group in spec.user_groups
        }
        splits[split] = {"rows": rows, "clicks": clicks, "intense": counts.get(f"{split}/intense", 0), "groups": groups}
    return splits


def _iso_time(microseconds: int) -> str:
    return dt.datetime.fromtimestamp(microseconds / 1e6, dt.timezone.utc).isoformat()
