"""The second pipeline of a build: shuffled rows -> joined rows, split and summed up.

A unit is a run of user partitions, worked off one after the other. It joins profiles and histories, drops duplicates,
finds each row's split, writes the rows to shuffle files in buckets, and sums up what is to be learned from them. When
all units are done, their summaries are merged in the order of the units.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.utils import shared

from clsd_tf.data.hashing import mix_row_ids
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.statistics.data_statistics import write_data_statistics
from clsd_tf.statistics.sketches import COUNT_SCHEMA, TopValues
from clsd_tf.storage.dataset_dir import SPLITS, DatasetLayout
from pipelines.beam import results
from pipelines.beam.engines import EvenReshuffle
from pipelines.beam.shuffle_files import ShuffleFileWriter, read_partition, write_batches
from pipelines.rows.checks import parsed_schema
from pipelines.rows.duplicates import without_duplicates
from pipelines.rows.fitting import FitSummary
from pipelines.rows.joins import Profiles, join_rows
from pipelines.rows.splits import split_indices
from pipelines.rows.vocabularies import VocabularyCounts, rank
from pipelines.sources import ROW_ID

# Bounds the summaries that meet on one worker at the end, however long the log is; and how many workers can join.
MAX_UNITS = 32
_MAX_PENDING_COUNTS = 16  # Merged together: one by one, the total would be gone through each time.
_SHARD_SEED = 101


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Where encoded rows go: each split has buckets of its own, and a bucket becomes a shard.

    Attributes:
      num_shards: of each split.
    """

    num_shards: Mapping[str, int]

    @property
    def total(self) -> int:
        """Buckets of all splits."""
        return sum(self.num_shards.values())

    def of_rows(self, row_ids: np.ndarray, splits: np.ndarray) -> np.ndarray:
        """Finds the bucket of each row, by a hash of its id, so that a shard is a sample of its split.

        Args:
          row_ids: int64 [num_rows].
          splits: indices in ``SPLITS``, int [num_rows].

        Returns:
          int64 [num_rows], in [0, total).
        """
        sizes = np.array([self.num_shards[split] for split in SPLITS], np.uint64)
        first = np.append(0, np.cumsum(sizes)[:-1]).astype(np.uint64)
        return (first[splits] + mix_row_ids(row_ids, _SHARD_SEED) % sizes[splits]).astype(np.int64)

    def shards(self) -> Iterator[tuple[str, int, int]]:
        """(split, shard, bucket) of each."""
        bucket = 0
        for split in SPLITS:
            for shard in range(self.num_shards[split]):
                yield split, shard, bucket
                bucket += 1


@dataclasses.dataclass(frozen=True)
class JoinPlan:
    """Settings that every worker of the second pipeline knows.

    Attributes:
      files: shuffle files by table.
      num_partitions: of users.
      cut_offs: event times in microseconds, see ``split_indices``.
      buckets: where rows go.
      directory: where shuffle files and counts of vocabularies are written.
      grow_from: directory of the dataset whose vocabularies go on, if any.
    """

    spec: FeatureSpec
    files: Mapping[str, Sequence[str]]
    num_partitions: int
    cut_offs: Sequence[int]
    buckets: Buckets
    directory: pathlib.Path
    grow_from: pathlib.Path | None

    def units(self) -> list[tuple[int, list[int]]]:
        """(unit, its partitions)."""
        parts = np.array_split(np.arange(self.num_partitions), min(self.num_partitions, MAX_UNITS))
        return [(unit, partitions.tolist()) for unit, partitions in enumerate(parts)]

    def vocabulary_path(self, unit: int) -> str:
        """Names the file that holds the counts of ``unit``.

        Returns:
          A path, whether or not it is there.
        """
        return str(self.directory / f"vocabularies-{unit:05d}.arrow")


class JoinAndFit(beam.PTransform):
    """Writes joined rows to shuffle files and fits.

    Gives the paths of the shuffle files, and (vocabulary, by how much its counts may be too low).
    """

    def __init__(self, plan: JoinPlan, layout: DatasetLayout, summary_path: pathlib.Path):
        super().__init__()
        self._plan = plan
        self._layout = layout
        self._summary_path = summary_path

    def expand(self, pipeline):
        plan, layout, path = self._plan, self._layout, self._summary_path
        done = (
            pipeline
            | "Units" >> beam.Create(list(enumerate(plan.units())))
            | "ReshuffleUnits" >> EvenReshuffle()
            | "Join" >> beam.ParDo(_JoinFn(plan)).with_outputs("files", "units", main="summaries")
        )
        _ = done.summaries | "FitSummary" >> results.WriteTogether(
            path, lambda summaries: _merge_summaries(summaries, layout)
        )
        errors = (
            pipeline
            | "Vocabularies" >> beam.Create(list(enumerate(plan.spec.vocabularies)))
            | "ReshuffleVocabularies" >> EvenReshuffle()
            | "FitVocabulary"
            >> beam.Map(
                lambda name, units: _fit_vocabulary(name, sorted(units), plan, layout), beam.pvalue.AsList(done.units)
            )
        )
        return done.files, errors


class _JoinFn(beam.DoFn):
    def __init__(self, plan: JoinPlan):
        self._plan = plan
        self._shared = shared.Shared()

    def setup(self):
        """Tables by item, once per process."""
        plan = self._plan
        roles = plan.spec.item_tables
        self._items = self._shared.acquire(lambda: _Tables([_profiles(role, 0, plan) for role in roles]))

    def process(self, unit: tuple[int, list[int]]) -> Iterator:
        number, partitions = unit
        plan = self._plan
        writer = ShuffleFileWriter(plan.directory, plan.buckets.total)
        summary, vocabularies = FitSummary.empty(), [_no_counts(plan.spec)]
        for partition in partitions:
            joined, counts = self._join(partition)
            by_split = _by_split(joined, plan)
            counts["left_out"] = _num_rows(joined) - sum(map(_num_rows, by_split.values()))
            summary = summary.merge(FitSummary.of(counts, by_split, plan.spec))
            if "train" in by_split:
                vocabularies.append(VocabularyCounts.of(by_split["train"], plan.spec))
            if len(vocabularies) == _MAX_PENDING_COUNTS:
                vocabularies = [VocabularyCounts.merge_all(vocabularies)]
            for path in _shuffle(by_split, plan.buckets, writer):
                yield beam.pvalue.TaggedOutput("files", path)
        for path in writer.flush():
            yield beam.pvalue.TaggedOutput("files", path)
        _write_counts(plan.vocabulary_path(number), VocabularyCounts.merge_all(vocabularies), plan.spec)
        yield number, summary
        yield beam.pvalue.TaggedOutput("units", number)

    def _join(self, partition: int) -> tuple[pa.Table | None, Counter]:
        plan = self._plan
        by_user = plan.spec.user_tables
        profiles = [*(_profiles(role, partition, plan) for role in by_user), *self._items.profiles]
        counts = Counter()
        for profile in profiles:
            repeated, places = profile.duplicate_rows()
            # Every partition sees the whole tables by item: count their duplicates once.
            if repeated and (profile.role in by_user or partition == 0):
                counts[f"{profile.role}/duplicates/{places[0]}/{places[1]}"] += repeated
        events = pa.concat_tables(read_partition(plan.files["log"], partition))
        if not events.num_rows:
            return None, counts
        events, duplicates = without_duplicates(events, plan.spec)
        joined, missing = join_rows(events, profiles, plan.spec)
        return joined, counts + duplicates + missing


@dataclasses.dataclass
class _Tables:
    """Profiles of tables by item; a class of its own, since only such can be shared by the threads of a worker."""

    profiles: list[Profiles]


def _profiles(role: str, partition: int, plan: JoinPlan) -> Profiles:
    """A partition of a profile table; without a row it is empty, not absent."""
    table = dict(plan.spec.tables.items())[role]
    schema = parsed_schema(table)
    parts = [part.select(schema.names) for part in read_partition(plan.files.get(role, []), partition)]
    return Profiles(role, table.key, pa.concat_tables([schema.empty_table(), *parts]), table.valid_from)


def _by_split(joined: pa.Table | None, plan: JoinPlan) -> dict[str, pa.Table]:
    """The rows of each split that has any."""
    if joined is None:
        return {}
    indices = split_indices(plan.spec.split, plan.cut_offs, joined)
    found = {split: np.flatnonzero(indices == index) for index, split in enumerate(SPLITS)}
    return {split: joined.take(pa.array(rows)) for split, rows in found.items() if len(rows)}


def _num_rows(table: pa.Table | None) -> int:
    return 0 if table is None else table.num_rows


def _shuffle(by_split: Mapping[str, pa.Table], buckets: Buckets, writer: ShuffleFileWriter) -> Iterator[str]:
    for split, table in by_split.items():
        row_ids = table.column(ROW_ID).to_numpy()
        splits = np.full(table.num_rows, SPLITS.index(split))
        yield from writer.add(table, buckets.of_rows(row_ids, splits))


# --- Merging, when all units are done --------------------------------------------------------------------------------


def _merge_summaries(summaries: Iterable[tuple[int, FitSummary]], layout: DatasetLayout) -> dict[str, Any]:
    """Writes the data statistics; gives the rest."""
    in_order = sorted(summaries, key=lambda numbered: numbered[0])
    merged = functools.reduce(FitSummary.merge, (summary for _, summary in in_order))
    write_data_statistics(layout.data_statistics, merged.statistics)
    return merged.to_dict()


def _fit_vocabulary(name: str, units: Sequence[int], plan: JoinPlan, layout: DatasetLayout) -> tuple[str, float]:
    """Writes a vocabulary; gives its name and by how much its counts may be too low."""
    merged = VocabularyCounts.merge_all(_read_counts(plan.vocabulary_path(unit), name, plan.spec) for unit in units)
    previous = DatasetLayout(plan.grow_from).vocabulary_values(name) if plan.grow_from else []
    values = rank(merged.values[name], plan.spec.vocabularies[name], previous)
    results.write_lines(str(layout.vocabulary(name)), values)
    return name, merged.errors(plan.spec)[name]


def _no_counts(spec: FeatureSpec) -> VocabularyCounts:
    empty = COUNT_SCHEMA.empty_table()
    return VocabularyCounts({name: TopValues(empty, rule.max_tracked) for name, rule in spec.vocabularies.items()})


def _write_counts(path: str, counts: VocabularyCounts, spec: FeatureSpec) -> None:
    """A record batch per vocabulary; the errors of counts stand in the schema's metadata."""
    found = [counts.values[name] for name in spec.vocabularies]
    errors = {name: str(entry.error) for name, entry in counts.values.items()}
    batches = (entry.table.combine_chunks().to_batches() for entry in found)
    write_batches(path, COUNT_SCHEMA.with_metadata(errors), (batch[0] if batch else None for batch in batches))


def _read_counts(path: str, name: str, spec: FeatureSpec) -> VocabularyCounts:
    """The counts of one vocabulary."""
    [table] = read_partition([path], list(spec.vocabularies).index(name))
    error = int(table.schema.metadata[name.encode()])
    limit = spec.vocabularies[name].max_tracked
    return VocabularyCounts({name: TopValues(table.replace_schema_metadata(None), limit, error)})
