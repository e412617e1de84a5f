"""Checks a feature spec against data, without writing a dataset.

Example:
  clsd check-spec --spec=movielens_100k --input_dir=demo/raw
  clsd check-spec --print_json_schema > feature_spec.schema.json   # for completion in editors
"""

import json
import pathlib
import tempfile

from absl import flags

import feature_specs
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.statistics.data_statistics import DataStatistics, read_data_statistics
from clsd_tf.storage.dataset_dir import SPLITS, DatasetLayout
from feature_specs.overrides import override_source
from pipelines.beam.dataset import BuildConfig, inspect_data

_SPEC = flags.DEFINE_string("spec", None, "Name of a feature spec, or path of a YAML file.")
_INPUT_DIR = flags.DEFINE_string("input_dir", "", "Directory that the spec's table paths are relative to.")
_SOURCE = flags.DEFINE_string("source", None, "Log to read instead of the spec's: a path, or tfds:<name>.")
_MAX_BAD_FRACTION = flags.DEFINE_float("max_bad_fraction", 0.01, "More bad rows than this fail the check.", 0.0, 1.0)
_PRINT_JSON_SCHEMA = flags.DEFINE_bool("print_json_schema", False, "Print the spec format's JSON Schema and stop.")


def main(argv) -> None:
    if _PRINT_JSON_SCHEMA.value:
        print(json.dumps(FeatureSpec.model_json_schema(), indent=1))
        return
    if _SPEC.value is None:
        raise ValueError(f"--spec is required. Received: none. Known names: {', '.join(feature_specs.spec_names())}")
    spec = override_source(feature_specs.get_spec(_SPEC.value), _SOURCE.value)
    config = BuildConfig(_INPUT_DIR.value, max_bad_fraction=_MAX_BAD_FRACTION.value, beam_arguments=tuple(argv[1:]))
    with tempfile.TemporaryDirectory() as scratch:
        layout = DatasetLayout(pathlib.Path(scratch))
        counts, statistics = inspect_data(spec, config, layout.root)
        train = read_data_statistics(layout.data_statistics)["train"]
    _print_tables(spec, counts)
    _print_groups(spec, train.merge_small_groups())
    _print_features(spec, statistics)
    console.console.print(f"[green]ok[/] {spec.name}, fingerprint {spec.fingerprint}")


def _print_tables(spec: FeatureSpec, counts) -> None:
    rows = [
        (
            role,
            entry["rows"],
            sum(entry["bad"].values()),
            None if role == "log" else counts.get(f"{role}_profile_missing", 0),
        )
        for role, entry in counts["tables"].items()
    ]
    console.print_table("Tables", ["table", "rows", "bad rows", "log rows without profile"], rows)
    rows = [
        (split, entry["rows"], entry["clicks"] / entry["rows"], entry["intense"] / entry["rows"])
        for split, entry in ((split, counts["splits"][split]) for split in SPLITS)
    ]
    label = f"Splits by {counts['split_rule']}; click: {spec.label}; intense: {spec.intensity_label or 'not declared'}"
    console.print_table(label, ["split", "rows", "click rate", "intense rate"], rows)


def _print_groups(spec: FeatureSpec, train: DataStatistics) -> None:
    for group in spec.user_groups:
        rows = [
            (label, int(rows), clicks / rows)
            for (name, label), rows, clicks in zip(train.segments, train.rows, train.clicks, strict=True)
            if name == group.name
        ]
        console.print_table(f"User group {group.name} (train)", ["group", "rows", "click rate"], rows)


def _print_features(spec: FeatureSpec, statistics) -> None:
    inputs = spec.model_inputs(statistics.vocabulary_lengths)
    rows = [(entry.name, entry.vocabulary_size, entry.max_values or 1) for entry in inputs.categorical]
    console.print_table("Ids", ["feature", "vocabulary size", "values"], rows)
    rows = [(name, entry.mean, entry.std, entry.minimum, entry.maximum) for name, entry in statistics.numeric.items()]
    if rows:
        console.print_table("Numbers (train)", ["feature", "mean", "std", "min", "max"], rows)


if __name__ == "__main__":
    console.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
