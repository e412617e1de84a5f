"""Checks the data of a dataset directory: expectations of its spec, drift and skew; JSON, tables and an HTML page.

Example:
  python -m pipelines.validate_data --dataset_dir=demo/dataset
  python -m pipelines.validate_data --dataset_dir=today --baseline_dir=yesterday --requests=served.parquet \
      --fail_on=anomaly

Compares validation and test rows with training rows; with --baseline_dir training rows with those of another dataset
(another day); with --requests training rows with served requests: a file of raw inputs (.csv, .jsonl, .parquet) as
export.predict reads. Writes data_report.json and data_report.html to --report_dir. The spec declares what is expected:
`expect` of a column, and `drift`. With --fail_on=anomaly the exit status is 1 if there is one.
"""

import functools
import pathlib
import sys

import pyarrow as pa
import pyarrow.compute as pc
from absl import flags

import feature_specs
from clsd_tf import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.artifacts import ArtifactError, DatasetDir, write_json, write_text
from clsd_tf.data_checks import Contrast, contrast, find_anomalies
from clsd_tf.data_report import (
    ANOMALY_HEADINGS,
    DRIFT_HEADINGS,
    SUMMARY_HEADINGS,
    anomaly_rows,
    drift_rows,
    render_data_report,
    summary_rows,
    top_values,
)
from clsd_tf.data_statistics import DataStatistics, read_data_statistics
from clsd_tf.features import FeatureSpec
from clsd_tf.hashing import hash_keys
from clsd_tf.request_files import read_rows, typed_rows
from clsd_tf.small_groups import MIN_GROUP_USERS

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory to check.", required=True)
_BASELINE_DIR = flags.DEFINE_string("baseline_dir", None, "Dataset directory of another day, to compare with.")
_REQUESTS = flags.DEFINE_string("requests", None, "Served requests: .csv, .jsonl or .parquet of raw inputs.")
_SPEC = flags.DEFINE_string("spec", None, "Spec whose expectations and limits to use instead of the dataset's own.")
_REPORT_DIR = flags.DEFINE_string(
    "report_dir", None, "Where the report goes; the dataset's name + _report if not given."
)
_FAIL_ON = flags.DEFINE_enum("fail_on", "nothing", ["nothing", "anomaly"], "What makes the exit status 1.")
SERVED = "served"


def read_statistics(dataset: DatasetDir) -> dict[str, DataStatistics]:
    """Split -> its statistics."""
    path = dataset.layout.data_statistics
    if not path.is_file():
        raise ArtifactError(f"{dataset.path} has no {path.name}. Build the dataset again with this version of clsd_tf")
    return read_data_statistics(path)


def statistics_of_requests(path: pathlib.Path, spec: FeatureSpec) -> DataStatistics:
    """Statistics of a file of served requests; without clicks, and with users where the user key is a raw input."""
    parts, num_rows = [], 0
    for rows in read_rows(path):
        try:
            typed = typed_rows(rows, spec.raw_inputs)
        except ValueError as error:
            raise ValueError(f"{path}, batch from row {num_rows + 1}: {error}") from error
        parts.append(DataStatistics.of(_with_users(typed, spec), spec))
        num_rows += rows.num_rows
    if not parts:
        raise ValueError(f"--requests must have rows. Received: {path} with none")
    return functools.reduce(DataStatistics.merge, parts)


def _with_users(rows: pa.Table, spec: FeatureSpec) -> pa.Table:
    hashes = pa.nulls(rows.num_rows, pa.int64())
    if spec.user_key in rows.column_names:
        users = rows.column(spec.user_key).cast(pa.string())
        hashes = pc.if_else(users.is_valid(), pa.array(hash_keys(users.fill_null(""))), hashes)
    return rows.append_column("user_hash", hashes)


def compare_all(
    parts: dict[str, DataStatistics], baseline: dict[str, DataStatistics] | None, spec: FeatureSpec
) -> list[Contrast]:
    """Training rows against validation, test and served rows, and against the baseline's training rows."""
    train = parts["train"]
    contrasts = [contrast("train", train, name, part, spec) for name, part in parts.items() if name != "train"]
    if baseline is not None:
        contrasts.append(contrast("baseline train", baseline["train"], "train", train, spec))
    return contrasts


def main(argv) -> None:
    dataset = DatasetDir(_DATASET_DIR.value)
    spec = feature_specs.get_spec(_SPEC.value) if _SPEC.value else dataset.spec
    report_dir = pathlib.Path(_REPORT_DIR.value or f"{dataset.path}_report")
    with console.step("check data"):
        parts = read_statistics(dataset)
        if _REQUESTS.value:
            parts[SERVED] = statistics_of_requests(pathlib.Path(_REQUESTS.value), dataset.spec)
        baseline = read_statistics(DatasetDir(_BASELINE_DIR.value)) if _BASELINE_DIR.value else None
        contrasts = compare_all(parts, baseline, spec)
    anomalies = {name: find_anomalies(part, spec.expectations) for name, part in parts.items()}
    anomalies |= {entry.title: list(entry.anomalies) for entry in contrasts}
    facts = {"dataset": str(dataset.path), "spec": spec.name, "min_group_users": MIN_GROUP_USERS}
    report_dir.mkdir(parents=True, exist_ok=True)
    write_json(report_dir / "data_report.json", _json_report(facts, parts, contrasts, anomalies))
    write_text(report_dir / "data_report.html", render_data_report(parts, contrasts, anomalies, facts))
    _print(parts, contrasts, anomalies)
    console.console.print(f"{report_dir}/data_report.json and {report_dir}/data_report.html", soft_wrap=True)
    if _FAIL_ON.value == "anomaly" and any(anomalies.values()):
        sys.exit(1)


def _json_report(facts, parts: dict[str, DataStatistics], contrasts: list[Contrast], anomalies) -> dict:
    return {
        **facts,
        "anomalies": {where: [vars(found) for found in entries] for where, entries in anomalies.items()},
        "drift": {entry.title: [vars(drift) for drift in entry.measures] for entry in contrasts},
        "columns": {
            name: {row[0]: dict(zip(SUMMARY_HEADINGS[1:], row[1:], strict=True)) for row in summary_rows(part)}
            for name, part in parts.items()
        },
        "top_values": {name: top_values(part) for name, part in parts.items()},
    }


def _print(parts: dict[str, DataStatistics], contrasts: list[Contrast], anomalies) -> None:
    for name, part in parts.items():
        console.print_table(f"Columns of {name}: {int(part.rows[0]):,} rows", SUMMARY_HEADINGS, summary_rows(part))
    for entry in contrasts:
        console.print_table(f"Drift {entry.title}", DRIFT_HEADINGS, drift_rows(entry))
    rows = anomaly_rows(anomalies)
    if rows:
        console.print_table("Anomalies", ANOMALY_HEADINGS, rows)
    console.console.print(f"[red]{len(rows)} anomalies[/]" if rows else "[green]no anomalies[/]")


if __name__ == "__main__":
    console.run(main)
