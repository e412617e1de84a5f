"""Checks the data of a dataset directory: expectations of its spec, drift and skew.

Example:
  clsd validate-data --dataset_dir=demo/dataset
  clsd validate-data --dataset_dir=today --baseline_dir=yesterday --requests=served.parquet \\
      --fail_on=anomaly

Compares validation and test rows with training rows; with --baseline_dir training rows with those of another dataset
(another day); with --requests training rows with served requests: a file of raw inputs (.csv, .jsonl, .parquet) as
`clsd predict` reads, or a directory of such files: of what `clsd serve` logs, a model's directory,
<request_log_dir>/<model>. Raw inputs that a log declares to leave out (the user's key) are named and not compared; any
other raw input without a column is an error. Writes data_report.json and data_report.html to --report_dir. The spec
declares what is expected: `expect` of a column, and `drift`. With --fail_on=anomaly the exit status is 1 if there is
one.
"""

import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from absl import flags

import feature_specs
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.data.hashing import hash_keys
from clsd_tf.data.request_files import left_out_inputs, read_rows, row_files, typed_rows
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.model_inputs import RawInput
from clsd_tf.statistics.data_checks import Contrast, contrast, find_anomalies
from clsd_tf.statistics.data_statistics import DataStatistics, read_data_statistics
from clsd_tf.statistics.report import (
    ANOMALY_HEADINGS,
    DRIFT_HEADINGS,
    SUMMARY_HEADINGS,
    anomaly_rows,
    drift_rows,
    render_data_report,
    summary_rows,
    top_values,
)
from clsd_tf.statistics.small_groups import MIN_GROUP_USERS
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, write_json, write_text

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory to check.", required=True)
_BASELINE_DIR = flags.DEFINE_string("baseline_dir", None, "Dataset directory of another day, to compare with.")
_REQUESTS = flags.DEFINE_string(
    "requests",
    None,
    "Served requests: a .csv, .jsonl or .parquet file, or a directory of them, as a model's in a request log.",
)
_SPEC = flags.DEFINE_string("spec", None, "Spec whose expectations and limits to use instead of the dataset's own.")
_REPORT_DIR = flags.DEFINE_string(
    "report_dir", None, "Where the report goes; the dataset's name + _report if not given."
)
_FAIL_ON = flags.DEFINE_enum("fail_on", "nothing", ["nothing", "anomaly"], "What makes the exit status 1.")
SERVED = "served"


def read_statistics(dataset: DatasetDir) -> dict[str, DataStatistics]:
    """Reads the statistics of a dataset.

    Args:
      dataset: complete.

    Returns:
      Split -> its statistics.

    Raises:
      ArtifactError: the dataset has none.
    """
    path = dataset.layout.data_statistics
    if not path.is_file():
        raise ArtifactError(f"{dataset.path} has no {path.name}. Build the dataset again with this version of clsd_tf")
    return read_data_statistics(path)


def statistics_of_requests(path: pathlib.Path, spec: FeatureSpec) -> DataStatistics:
    """Statistics of served requests, without clicks.

    Args:
      path: file of raw inputs, or directory of such files; those that a file declares to leave out have no statistics.
      spec: of the dataset that requests are compared with.

    Returns:
      Of all rows; with users where the files have their key.

    Raises:
      ValueError: no rows, or a raw input without a column.
    """
    files = row_files(path)
    left_out = left_out_inputs(files)
    raw_inputs = [entry for entry in spec.raw_inputs if entry.name not in left_out]
    parts = [
        DataStatistics.of(_with_users(rows, spec), spec, left_out)
        for file in files
        for rows in _typed_batches(file, raw_inputs)
    ]
    if not parts:
        raise ValueError(f"--requests must have rows. Received: {path} with none")
    return functools.reduce(DataStatistics.merge, parts)


def _typed_batches(file: pathlib.Path, raw_inputs: Sequence[RawInput]) -> Iterator[pa.Table]:
    num_rows = 0
    for rows in read_rows(file):
        try:
            yield typed_rows(rows, raw_inputs)
        except ValueError as error:
            raise ValueError(f"{file}, batch from row {num_rows + 1}: {error}") from error
        num_rows += rows.num_rows


def _with_users(rows: pa.Table, spec: FeatureSpec) -> pa.Table:
    hashes = pa.nulls(rows.num_rows, pa.int64())
    if spec.user_key in rows.column_names:
        users = rows.column(spec.user_key).cast(pa.string())
        hashes = pc.if_else(users.is_valid(), pa.array(hash_keys(users.fill_null(""))), hashes)
    return rows.append_column("user_hash", hashes)


def compare_all(
    parts: dict[str, DataStatistics], baseline: dict[str, DataStatistics] | None, spec: FeatureSpec
) -> list[Contrast]:
    """Contrasts training rows with validation, test and served rows, and with the baseline's training rows.

    Args:
      parts: of the dataset by split, and of served requests.
      baseline: of another dataset by split, if any.
      spec: whose limits of drift hold.

    Returns:
      A contrast per part that training rows are compared with.
    """
    train = parts["train"]
    contrasts = [contrast("train", train, name, part, spec) for name, part in parts.items() if name != "train"]
    if baseline is not None:
        contrasts.append(contrast("baseline train", baseline["train"], "train", train, spec))
    return contrasts


def main(argv) -> None:
    dataset = DatasetDir(_DATASET_DIR.value)
    spec = feature_specs.get_spec(_SPEC.value) if _SPEC.value else dataset.spec
    report_dir = pathlib.Path(_REPORT_DIR.value or f"{dataset.path}_report")
    left_out: list[str] = []
    with console.step("check data"):
        parts = read_statistics(dataset)
        if _REQUESTS.value:
            parts[SERVED] = statistics_of_requests(pathlib.Path(_REQUESTS.value), dataset.spec)
            left_out = [name for name in parts["train"].columns if name not in parts[SERVED].columns]
        baseline = read_statistics(DatasetDir(_BASELINE_DIR.value)) if _BASELINE_DIR.value else None
        contrasts = compare_all(parts, baseline, spec)
    expectations = {SERVED: {name: value for name, value in spec.expectations.items() if name not in left_out}}
    anomalies = {name: find_anomalies(part, expectations.get(name, spec.expectations)) for name, part in parts.items()}
    anomalies |= {entry.title: list(entry.anomalies) for entry in contrasts}
    facts = {"dataset": str(dataset.path), "spec": spec.name, "min_group_users": MIN_GROUP_USERS, "left_out": left_out}
    report_dir.mkdir(parents=True, exist_ok=True)
    write_json(report_dir / "data_report.json", _json_report(facts, parts, contrasts, anomalies))
    write_text(report_dir / "data_report.html", render_data_report(parts, contrasts, anomalies, facts))
    _print(parts, contrasts, anomalies)
    if left_out:
        console.console.print(f"served requests leave out {', '.join(left_out)}: not compared", soft_wrap=True)
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
