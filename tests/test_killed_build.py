"""A build that is killed, at any moment, leaves nothing that a reader takes for a dataset, and can be run again.

Builds run in processes of their own, forked from a server that has imported TensorFlow and Beam but not used them, so
that a kill takes a second. SIGKILL leaves a process no moment to clean up.
"""

import contextlib
import hashlib
import os
import pathlib
import random
import shutil
import signal
import time

import pytest
from commands import FORK_SERVER

import feature_specs
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.public_data.feed import FeedConfig, simulate_feed


def build(raw_dir: str, output: str) -> None:
    os.setsid()  # A process group of its own, to be killed with all that the engine starts.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    spec = feature_specs.get_spec("simulated_feed")
    build_dataset(spec, BuildConfig(input_dir=raw_dir, rows_per_shard=500), pathlib.Path(output))


@pytest.fixture(scope="module")
def processes():
    warm_up = FORK_SERVER.Process(target=os.getpid)
    warm_up.start()
    warm_up.join()
    return FORK_SERVER


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("killed") / "raw"
    simulate_feed(FeedConfig(num_rows=3000, num_users=150, num_items=60, seed=6), path)
    return path


@pytest.fixture(scope="module")
def unkilled(processes, raw_dir, tmp_path_factory):
    """(dataset, seconds of its build)."""
    output = tmp_path_factory.mktemp("unkilled") / "dataset"
    process = processes.Process(target=build, args=(str(raw_dir), str(output)))
    start = time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0
    return DatasetDir(output), time.monotonic() - start


def kill_after(seconds, processes, raw_dir, output):
    process = processes.Process(target=build, args=(str(raw_dir), str(output)))
    process.start()
    process.join(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def digests(dataset):
    """File name -> SHA-256 of all that readers of a dataset use."""
    files = [path for path in dataset.path.rglob("*") if path.parent.name in ("records", "vocabularies")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same(dataset, expected):
    assert dataset.fingerprint == expected.fingerprint
    assert dataset.counts == expected.counts
    assert digests(dataset) == digests(expected)


@pytest.mark.parametrize("num_kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_a_build_killed_at_any_moment_leaves_no_dataset_and_can_be_run_again(
    processes, raw_dir, unkilled, tmp_path, num_kills
):
    expected, seconds = unkilled
    output = tmp_path / "dataset"
    numbers = random.Random(7)
    moments = [seconds * (k + numbers.random()) / num_kills for k in range(num_kills)]
    interrupted, left_something = [], 0
    for moment in numbers.sample(moments, num_kills):  # Each build meets what the killed ones before it have left.
        kill_after(moment, processes, raw_dir, output)
        if output.exists():  # It was done before it was killed.
            assert_same(DatasetDir(output), expected)
            shutil.rmtree(output)
        else:
            interrupted.append(moment)
        left_something += any(tmp_path.iterdir())
        for left in tmp_path.iterdir():
            with pytest.raises(ArtifactError):
                DatasetDir(left)
    assert len(interrupted) >= num_kills / 4
    assert left_something >= num_kills / 4  # So many were killed while they wrote.
    build_dataset(
        feature_specs.get_spec("simulated_feed"), BuildConfig(input_dir=str(raw_dir), rows_per_shard=500), output
    )
    assert_same(DatasetDir(output), expected)
    assert list(tmp_path.iterdir()) == [output]  # What killed builds left is gone.
