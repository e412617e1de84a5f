"""What the benchmarks rest on: the log is what its spec says, processes are measured whole, peers do the same work."""

import csv
import hashlib
import sys
import time

import apache_beam as beam
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import build_per_row, process_tree, wide_log
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.spec.feature_spec import load_spec
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir
from pipelines.beam.dataset import BuildConfig, build_dataset

NUM_ROWS = 3000


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    return wide_log.cached_log(tmp_path_factory.mktemp("logs"), num_rows=NUM_ROWS, num_columns=12)


# --- The log ---------------------------------------------------------------------------------------------------------


def test_the_wide_log_has_the_rows_and_columns_that_its_spec_declares(log_dir):
    spec = load_spec(log_dir / wide_log.SPEC)
    assert spec == wide_log.wide_spec(12)
    with (log_dir / wide_log.LOG).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == NUM_ROWS
    assert list(rows[0]) == spec.tables.log.column_names
    assert len(spec.tables.log.columns) == 12
    parsers = {"int64": int, "float": float, "string": str}
    for column in spec.tables.log.columns:
        assert all(parsers[column.type](row[column.name]) != "" for row in rows)
    times = [int(row["time_ms"]) for row in rows]
    assert times == sorted(times)


def test_the_wide_log_is_the_same_each_time(log_dir, tmp_path):
    wide_log.write_log(tmp_path / "again.csv", NUM_ROWS, 12)
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "again.csv", log_dir / wide_log.LOG)}
    assert len(digests) == 1


def test_a_finished_log_is_not_made_again(log_dir):
    before = (log_dir / wide_log.LOG).stat().st_mtime_ns
    assert wide_log.cached_log(log_dir.parent, num_rows=NUM_ROWS, num_columns=12) == log_dir
    assert (log_dir / wide_log.LOG).stat().st_mtime_ns == before


def test_the_wide_log_refuses_fewer_columns_than_it_needs():
    with pytest.raises(ValueError, match=r"at least 8 columns\. Received: 7"):
        wide_log.wide_spec(7)


# --- Measuring -------------------------------------------------------------------------------------------------------


def test_memory_and_cpu_of_children_are_measured():
    # The grandchild holds 200 MiB and computes for half a second; its parents do nothing.
    work = (
        "import time; held = bytearray(b'x') * (200 << 20); end = time.process_time() + 0.5\n"
        "while time.process_time() < end: pass\n"
        "time.sleep(0.5)"
    )
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    usage = process_tree.measure([sys.executable, "-c", middle])
    assert 200 < usage.peak_mib < 300
    assert 0.45 < usage.cpu_seconds(usage.begin, usage.end) < 2.0
    assert usage.end - usage.begin >= 1.0


def test_cpu_time_between_two_moments_is_interpolated():
    samples = tuple(process_tree.Sample(moment, spent, 0) for moment, spent in [(10.0, 1.0), (12.0, 5.0), (13.0, 5.5)])
    usage = process_tree.Usage(10.0, 13.0, samples)
    assert usage.cpu_seconds(11.0, 12.5) == pytest.approx(5.25 - 3.0)


def test_processes_of_others_are_not_measured():
    big = process_tree.subprocess.Popen([sys.executable, "-c", "x = bytearray(b'x') * (300 << 20); input()"], stdin=-1)
    try:
        time.sleep(0.5)
        usage = process_tree.measure([sys.executable, "-c", "import time; time.sleep(0.3)"])
        assert usage.peak_mib < 100
    finally:
        big.communicate(b"\n")


def test_a_measured_command_that_fails_says_what_it_printed():
    with pytest.raises(process_tree.CommandFailedError, match=r"(?s)ended with status 3.*no rows here"):
        process_tree.measure([sys.executable, "-c", "print('no rows here'); raise SystemExit(3)"])


# --- The peer --------------------------------------------------------------------------------------------------------


def columns_of(path, names):
    """{name: values in file order} of a TFRecord file."""
    found = {name: [] for name in names}
    for serialized in tf.data.TFRecordDataset(path).as_numpy_iterator():
        feature = tf.train.Example.FromString(serialized).features.feature
        for name in names:
            found[name] += getattr(feature[name], feature[name].WhichOneof("kind")).value
    return {name: np.array(values) for name, values in found.items()}


def per_row_columns(log_dir, directory, names):
    """{split: {name: values}}; not by Beam's sink, which needs a package that only the benchmark installs."""
    spec = load_spec(log_dir / wide_log.SPEC)

    def write(serialized, path):
        with tf.io.TFRecordWriter(path) as writer:
            for example in serialized:
                writer.write(example)

    with beam.Pipeline(runner=build_per_row.FnApiRunner()) as pipeline:
        rows = build_per_row.read_rows(pipeline, spec, log_dir / wide_log.LOG)
        for name, encoded in build_per_row.encoded_splits(rows, spec).items():
            together = encoded | f"Together_{name}" >> beam.combiners.ToList()
            _ = together | f"Write_{name}" >> beam.Map(write, str(directory / name))
    return {split: columns_of(str(directory / split), names) for split in SPLITS}


def test_the_per_row_pipeline_learns_and_encodes_what_the_project_does(log_dir, tmp_path):
    spec = load_spec(log_dir / wide_log.SPEC)
    names = ["label", "event_time", *(feature.name for feature in spec.features)]
    peer = per_row_columns(log_dir, tmp_path, names)
    build_dataset(spec, BuildConfig(input_dir=str(log_dir)), tmp_path / "dataset")
    dataset = DatasetDir(tmp_path / "dataset")
    for split in SPLITS:
        own = read_columns(dataset, split, names)
        assert len(set(own["event_time"].tolist())) == len(own["event_time"]) > 0
        own_order, peer_order = np.argsort(own["event_time"]), np.argsort(peer[split]["event_time"])
        for name in names:
            np.testing.assert_allclose(peer[split][name][peer_order], own[name][own_order], 1e-5, 1e-6, err_msg=name)
    assert np.mean(peer["test"]["item_id_input"] == 1) > 0.05  # Items that training has not seen.
