"""One pipeline on every engine: the same records, byte for byte, and the same counts.

The last engine is how Flink and Spark run a job: a job server and a pool of workers in processes of their own, which
know nothing of the driver but the pipeline that it submits.
"""

import contextlib
import hashlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import apache_beam as beam
import pytest

import feature_specs
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import read_json
from pipelines.beam import dataset as build_module
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.beam.engines import EvenReshuffle, make_pipeline
from pipelines.beam.results import WriteTogether
from pipelines.public_data.feed import FeedConfig, simulate_feed

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "raw"
    simulate_feed(FeedConfig(num_rows=3000, num_users=150, num_items=60, seed=5), path)
    return path


@pytest.fixture(scope="module")
def build_with(raw_dir, tmp_path_factory):
    """Beam's arguments -> the dataset; many small shards, so that work is spread."""

    def build(*beam_arguments):
        path = tmp_path_factory.mktemp("built") / "dataset"
        config = BuildConfig(input_dir=str(raw_dir), rows_per_shard=500, beam_arguments=beam_arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "_BYTES_PER_PARTITION", 20_000)  # Some ten partitions, as of a large log.
            build_dataset(feature_specs.get_spec("simulated_feed"), config, path)
        return DatasetDir(path)

    return build


@pytest.fixture(scope="module")
def in_memory(build_with):
    return build_with("--direct_num_workers=1", "--direct_running_mode=in_memory")


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def server(module, *arguments, port, log):
    """A Beam server in a process group of its own that accepts connections on ``port`` until the block ends."""
    # The worker pool starts its workers as `python`; they need this interpreter's packages and the project.
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=output,
            stderr=output,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            wait_for(port, process, log)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(port, process, log):
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def portable_arguments(tmp_path_factory):
    """Beam's arguments for a running job server and worker pool."""
    logs = tmp_path_factory.mktemp("servers")
    job_port, worker_port = free_port(), free_port()
    jobs = server(
        "apache_beam.runners.portability.local_job_service_main",
        f"--port={job_port}",
        f"--staging_dir={logs / 'staging'}",
        port=job_port,
        log=logs / "jobs.log",
    )
    workers = server(
        "apache_beam.runners.worker.worker_pool_main",
        f"--service_port={worker_port}",
        port=worker_port,
        log=logs / "workers.log",
    )
    with jobs, workers:
        yield (
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{job_port}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{worker_port}",
        )


def digests(dataset):
    """File name -> SHA-256 of everything that readers of a dataset use."""
    files = [path for path in sorted(dataset.path.rglob("*")) if path.parent.name in ("records", "vocabularies")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same(dataset, expected):
    assert dataset.fingerprint == expected.fingerprint
    assert digests(dataset) == digests(expected)
    assert dataset.counts == expected.counts
    assert read_json(dataset.path / "statistics.json") == read_json(expected.path / "statistics.json")


def test_the_default_engine_builds_the_same_dataset(build_with, in_memory):
    assert len(in_memory.record_files("train")) == 5  # 2,400 rows.
    assert_same(build_with(), in_memory)


def test_threads_build_the_same_dataset(build_with, in_memory):
    assert_same(build_with("--direct_num_workers=2", "--direct_running_mode=multi_threading"), in_memory)


@pytest.mark.long
def test_processes_build_the_same_dataset(build_with, in_memory):
    assert_same(build_with("--direct_num_workers=2", "--direct_running_mode=multi_processing"), in_memory)


def test_a_job_server_with_a_worker_pool_builds_the_same_dataset(build_with, in_memory, portable_arguments):
    assert_same(build_with(*portable_arguments), in_memory)


class SlowToPickle:
    """Takes longer to pickle than Beam's threads wait before they send what they have written so far."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        time.sleep(1.3)
        return SlowToPickle, (self.number,)


def test_elements_that_are_slow_to_pickle_arrive_whole(tmp_path):
    with make_pipeline(("--direct_num_workers=2", "--direct_running_mode=multi_threading")) as pipeline:
        elements = pipeline | beam.Create([(number, number) for number in range(2)]) | "Deal" >> EvenReshuffle()
        slow = elements | beam.Map(SlowToPickle)
        _ = slow | WriteTogether(tmp_path / "numbers.json", lambda found: sorted(entry.number for entry in found))
    assert read_json(tmp_path / "numbers.json") == [0, 1]
