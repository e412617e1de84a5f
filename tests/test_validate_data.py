"""The command that checks data: served requests, days and splits, its report and its exit status."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import yaml
from commands import run_command

import feature_specs
from clsd_tf.data.request_files import read_rows
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.statistics.data_checks import contrast, find_anomalies
from clsd_tf.statistics.data_statistics import read_data_statistics
from clsd_tf.statistics.report import SUMMARY_HEADINGS, anomaly_rows, render_data_report, summary_rows, top_values
from clsd_tf.storage.files import read_json
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.public_data.feed import FeedConfig, simulate_feed
from pipelines.validate_data import statistics_of_requests

FACTS = {"dataset": "<b>d</b>", "spec": "s", "min_group_users": 20, "left_out": ["user_id"]}


def validate(dataset, *arguments):
    return run_command("pipelines.validate_data", f"--dataset_dir={dataset.path}", *arguments)


@pytest.fixture(scope="module")
def statistics(feed_dataset):
    return read_data_statistics(feed_dataset.layout.data_statistics)


def test_statistics_of_a_build_are_those_of_its_rows(feed_dataset, statistics):
    assert list(statistics) == ["train", "validation", "test"]
    for split, part in statistics.items():
        counted = feed_dataset.counts["splits"][split]
        assert (part.rows[0], part.clicks[0]) == (counted["rows"], counted["clicks"])
        for (group, label), rows in list(zip(part.segments, part.rows.tolist(), strict=True))[1:]:
            assert rows == counted["groups"][group][label]["rows"]
    assert set(statistics["train"].columns) == {entry.name for entry in feed_dataset.spec.raw_inputs}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_served_requests_of_the_test_split_look_like_it(feed_dataset, statistics, tmp_path, suffix):
    rows = pa.parquet.read_table(feed_dataset.layout.serving_sample)
    path = tmp_path / f"served{suffix}"
    if suffix == ".parquet":
        pa.parquet.write_table(rows, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()), encoding="utf-8")
    served = statistics_of_requests(path, feed_dataset.spec)
    assert served.rows[0] == rows.num_rows
    assert not served.has_labels
    ages = [age for age in rows.column("age").to_pylist() if age is not None]
    assert served.columns["age"].numbers.mean[0] == pytest.approx(np.mean(ages))
    assert served.users[0].estimate == len(set(rows.column("user_id").to_pylist()))
    skew = contrast("test", statistics["test"], "served", served, feed_dataset.spec)
    assert skew.anomalies == ()


def test_skew_between_training_data_and_requests_is_found(feed_dataset, statistics, tmp_path):
    rows = pa.parquet.read_table(feed_dataset.layout.serving_sample)
    minutes = pa.array(rows.column("duration_seconds").to_numpy() / 60)  # Another unit than in training.
    rows = rows.set_column(rows.column_names.index("duration_seconds"), "duration_seconds", minutes)
    rows = rows.set_column(rows.column_names.index("device"), "device", pa.nulls(rows.num_rows, pa.string()))
    pa.parquet.write_table(rows, tmp_path / "served.parquet")
    served = statistics_of_requests(tmp_path / "served.parquet", feed_dataset.spec)
    found = contrast("train", statistics["train"], "served", served, feed_dataset.spec).anomalies
    overall = {(anomaly.column, anomaly.kind) for anomaly in found if not anomaly.group}
    assert overall >= {
        ("duration_seconds", "jensen_shannon"),
        ("duration_seconds", "mean_change"),
        ("device", "missing_change"),
    }
    assert not {column for column, _ in overall} - {"duration_seconds", "device", "recent_items"}


def test_requests_without_rows_or_columns_are_refused(feed_dataset, tmp_path):
    rows = pa.parquet.read_table(feed_dataset.layout.serving_sample)
    pa.parquet.write_table(rows.slice(0, 0), tmp_path / "empty.parquet")
    pa.parquet.write_table(rows.drop_columns(["device"]), tmp_path / "narrow.parquet")
    with pytest.raises(ValueError, match=r"must have rows. Received: .*empty.parquet"):
        statistics_of_requests(tmp_path / "empty.parquet", feed_dataset.spec)
    with pytest.raises(ValueError, match=r"narrow\.parquet, batch from row 1: .*Missing: device"):
        statistics_of_requests(tmp_path / "narrow.parquet", feed_dataset.spec)
    with pytest.raises(ValueError, match="files end in"):
        list(read_rows(tmp_path / "served.txt"))


def test_page_shows_every_part_and_no_user_and_escapes_what_it_shows(feed_dataset, statistics):
    entry = contrast("train", statistics["train"], "test", statistics["test"], feed_dataset.spec)
    page = render_data_report(statistics, [entry], {entry.title: entry.anomalies}, FACTS)
    assert page.count("<svg") == 3  # Distributions and two user groups.
    assert "train: 3,200 rows" in page
    assert "The served requests leave out user_id." in page
    assert "&lt;b&gt;d&lt;/b&gt;" in page
    assert "<b>d</b>" not in page
    assert "<script" not in page
    assert "user_id" not in top_values(statistics["train"])


def test_tables_by_hand(feed_dataset, statistics):
    spec_content = feed_dataset.spec.model_dump(mode="json")
    for column in spec_content["tables"]["user"]["columns"]:
        if column["name"] == "age":
            column["expect"] = {"max": 20}
    spec = parse_spec(spec_content, "feed")
    found = find_anomalies(statistics["train"], spec.expectations)
    oldest = statistics["train"].columns["age"].numbers.maximum
    assert anomaly_rows({"train": found}) == [["train", "age", "all rows", "above_max", oldest, 20.0]]
    summaries = [dict(zip(SUMMARY_HEADINGS, row, strict=True)) for row in summary_rows(statistics["train"])]
    age = next(summary for summary in summaries if summary["column"] == "age")
    assert (age["max"], age["missing"], age["distinct"]) == (oldest, 0, 53)
    value, rows, click_rate = top_values(statistics["train"])["device"][0]
    assert rows == max(statistics["train"].columns["device"].values.rows[:, 0])
    assert isinstance(value, str)
    assert 0 < click_rate < 1


def test_command_reports_drift_between_days_and_fails_when_asked(feed_dataset, tmp_path):
    other = tmp_path / "raw"
    simulate_feed(FeedConfig(num_rows=2000, num_users=60, num_items=20, seed=4), other)
    users = pa.csv.read_csv(other / "users.csv")
    ages = pa.array([99] * users.num_rows)
    pa.csv.write_csv(users.set_column(users.column_names.index("age"), "age", ages), other / "users.csv")
    yesterday = tmp_path / "yesterday"
    build_dataset(feature_specs.get_spec("simulated_feed"), BuildConfig(input_dir=str(other)), yesterday)
    report_dir = tmp_path / "report"
    flags = [f"--baseline_dir={yesterday}", f"--requests={feed_dataset.layout.serving_sample}", "--fail_on=anomaly"]
    failed = validate(feed_dataset, *flags, f"--report_dir={report_dir}")
    assert failed.returncode == 1
    assert "error:" not in failed.stderr
    assert "Drift baseline train → train" in failed.stdout
    report = read_json(report_dir / "data_report.json")
    contrasts = ["train → validation", "train → test", "train → served", "baseline train → train"]
    assert sorted(report["drift"]) == sorted(contrasts)
    drifted = {entry["column"] for entry in report["anomalies"]["baseline train → train"]}
    assert "age" in drifted
    assert "<svg" in (report_dir / "data_report.html").read_text()


def test_command_succeeds_without_anomalies_under_the_limits_of_another_spec(feed_dataset, tmp_path):
    content = feed_dataset.spec.model_dump(mode="json")
    content["drift"] = dict.fromkeys(content["drift"])  # Nothing is limited.
    (tmp_path / "loose.yaml").write_text(yaml.safe_dump(content))
    flags = [f"--spec={tmp_path / 'loose.yaml'}", f"--report_dir={tmp_path / 'report'}", "--fail_on=anomaly"]
    done = validate(feed_dataset, *flags)
    assert done.returncode == 0, done.stderr
    assert "no anomalies" in done.stdout


def test_command_refuses_expectations_that_the_build_kept_no_statistics_for(feed_dataset, tmp_path):
    content = feed_dataset.spec.model_dump(mode="json")
    columns = (column for table in content["tables"].values() if table for column in table["columns"])
    next(column for column in columns if column["name"] == "duration_seconds")["expect"] = {"values": ["30"]}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(content))
    refused = validate(feed_dataset, f"--spec={tmp_path / 'new.yaml'}", f"--report_dir={tmp_path / 'report'}")
    assert refused.returncode != 0
    assert "column 'duration_seconds'" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "report").exists()
