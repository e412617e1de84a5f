"""Builds a dataset directory from raw logs and profile tables with Apache Beam.

Example:
  clsd build --spec=movielens_100k --input_dir=demo/raw --dataset_dir=demo/dataset

Reads the tables that the spec declares, checks every row (bad ones go to dead_letter.parquet with their reason), joins
user profiles and item tables as of the event's time, derives histories without looking ahead, splits, counts
vocabularies on the training split only, applies the one transform and writes TFRecords of tf.Example. The directory
appears under its name only when it is complete; manifest.json says from what it was built. Flags that are not listed
here go to Beam, for example --runner=FlinkRunner; by default DirectRunner uses all cores.
"""

import pathlib

from absl import flags

import feature_specs
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.storage.dataset_dir import SPLITS
from feature_specs.overrides import override_source, override_split_rule
from pipelines.beam.dataset import BuildConfig, build_dataset

_SPEC = flags.DEFINE_string("spec", None, "Name of a feature spec, or path of a YAML file.", required=True)
_INPUT_DIR = flags.DEFINE_string("input_dir", "", "Directory that the spec's table paths are relative to.")
_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Directory to write; must not exist.", required=True)
_SOURCE = flags.DEFINE_string("source", None, "Log to read instead of the spec's: a path, or tfds:<name>.")
_SPLIT_RULE = flags.DEFINE_enum(
    "split_rule", None, ["time", "random", "user", "last_n_per_user"], "Overrides the spec's split rule."
)
_GROW_FROM = flags.DEFINE_string(
    "grow_from",
    None,
    "Dataset directory, say of the day before, whose vocabularies and scales go on: ids and numbers "
    "keep their meaning.",
)
_MAX_BAD_FRACTION = flags.DEFINE_float("max_bad_fraction", 0.01, "More bad rows than this fail the job.", 0.0, 1.0)
_ROWS_PER_SHARD = flags.DEFINE_integer("rows_per_shard", 250_000, "About how many rows a TFRecord file holds.", 1)
_COMPRESS = flags.DEFINE_bool("compress", False, "GZIP the TFRecord files.")


def resolve_spec() -> FeatureSpec:
    """The spec that the flags name, with what they override."""
    spec = feature_specs.get_spec(_SPEC.value)
    return override_split_rule(override_source(spec, _SOURCE.value), _SPLIT_RULE.value)


def main(argv) -> None:
    config = BuildConfig(
        input_dir=_INPUT_DIR.value,
        max_bad_fraction=_MAX_BAD_FRACTION.value,
        rows_per_shard=_ROWS_PER_SHARD.value,
        compressed=_COMPRESS.value,
        grow_from=pathlib.Path(_GROW_FROM.value) if _GROW_FROM.value else None,
        beam_arguments=tuple(argv[1:]),
    )
    dataset_dir = pathlib.Path(_DATASET_DIR.value)
    counts = build_dataset(resolve_spec(), config, dataset_dir)
    rows = [
        (split, entry["rows"], entry["clicks"] / entry["rows"], entry["first_event"], entry["last_event"])
        for split, entry in ((split, counts["splits"][split]) for split in SPLITS)
    ]
    console.print_table("Dataset", ["split", "rows", "click rate", "first event", "last event"], rows)
    console.console.print(_what_became_of_rows(counts), soft_wrap=True)
    console.console.print(f"dataset in {dataset_dir}", soft_wrap=True)


def _what_became_of_rows(counts) -> str:
    found = counts["accounting"]
    parts = [f"{found['read']:,} rows read = {found['written']:,} written"]
    parts += [
        f"{found[name]:,} {name.replace('_', ' ')}" for name in ("dead_lettered", "duplicates_dropped", "left_out")
    ]
    return " + ".join(parts)


if __name__ == "__main__":
    console.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
