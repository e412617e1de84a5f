"""What the serving benchmark rests on: it sees wrong answers, refusals, recovery, memory and failures of a swap."""

import concurrent.futures
import os
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from feed_servables import RAW_INPUTS, save_feed_model
from tiny_servables import example, save_tiny

from benchmarks.serving_load import Checked, Probe, overload, peak_memory, swap
from clsd_tf.data.examples import encode_raw_rows
from export.clients.serving_client import ServingClient
from export.clients.transport import Endpoint, ServingError
from export.server.batching import BatchingOptions
from export.server.local_server import LocalServer


def requests_of(*xs):
    """One request for each x, and the answer of a tiny model whose scale is 1."""
    return [([example(x)], np.array([x], np.float32)) for x in xs]


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory):
    """Answers a row of the user "slow" in some 50 ms, one after the other; one more may wait."""
    path = tmp_path_factory.mktemp("slow")
    save_feed_model(path, 1, 0.02)
    options = BatchingOptions(max_batch_size=1, max_enqueued_batches=1)
    with LocalServer(path, batching=options, num_threads=1) as server:
        yield server


def test_an_overloaded_server_refuses_answers_rightly_and_recovers(slow_server):
    row = pa.table({"age": [30], "price": [0.5], "recent": [["a"]], "user": ["slow"]})
    requests = [(encode_raw_rows(row, RAW_INPUTS), np.array([0.02 * 35.5], np.float32))]
    endpoint = Endpoint(slow_server.grpc_address, "feed", max_attempts=1)
    found = overload(endpoint, requests, os.getpid(), num_clients=16, seconds=1.0, capacity_seconds=0.5)
    assert found.wrong == 0
    assert set(found.load.codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert found.sent_per_second == sum(found.load.codes.values()) / 1.0
    assert found.sent_per_second > 1.5 * found.capacity_per_second
    assert 0 < found.recovery_seconds < 1
    assert found.peak_mib >= found.before_mib > 100


def test_a_swap_under_load_fails_no_request_and_a_version_that_does_not_load_is_seen(tmp_path):
    old = save_tiny(tmp_path, "tiny", 1)
    requests, new = requests_of(0.1, 0.2, 0.3), tmp_path / "tiny" / "2"
    with LocalServer(tmp_path, poll_seconds=0.05) as server:
        endpoint = Endpoint(server.grpc_address, "tiny", max_attempts=1)
        found = swap(endpoint, requests, old, new, num_clients=4, seconds=2.0, rate_per_second=50)
        assert (found.failed, found.served, found.load.codes["OK"] + found.load.unsent) == (0, (2,), 100)
        (tmp_path / "broken").mkdir()
        newer = tmp_path / "tiny" / "3"
        found = swap(endpoint, requests, tmp_path / "broken", newer, num_clients=4, seconds=0.5, rate_per_second=50)
        assert (found.failed, found.served) == (0, (2,))
        elsewhere = Endpoint(server.grpc_address, "tiny", version=1, max_attempts=1)
        with ServingClient(elsewhere) as client, pytest.raises(ServingError, match="NOT_FOUND"):
            client.score_examples(requests[0][0])


def test_every_wrong_answer_counts(tmp_path):
    save_tiny(tmp_path, "tiny", 1)
    right, wrong = requests_of(0.25)[0], ([example(0.25)], np.array([0.2501], np.float32))
    undefined = ([example(float("nan"))], np.array([0.25], np.float32))
    with (
        LocalServer(tmp_path) as server,
        ServingClient(Endpoint(server.grpc_address, "tiny")) as client,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        send = Checked(client)
        list(threads.map(send, [right, wrong, undefined] * 50))
    assert send.wrong == 100


def test_recovery_counts_from_the_end_of_sending_to_the_first_good_answer():
    end = time.monotonic() + 0.2

    def send():
        if 0 < time.monotonic() - end < 0.3:
            raise ServingError("RESOURCE_EXHAUSTED", "full")

    with Probe(send) as probe:  # Its good answers before the end do not count.
        assert 0.3 <= probe.seconds_to_answer(end) < 0.6


def test_memory_is_no_longer_watched_after_an_error():
    before = threading.active_count()

    def fail():
        with peak_memory(os.getpid()):
            assert threading.active_count() == before + 1
            raise RuntimeError("load failed")

    with pytest.raises(RuntimeError, match="load failed"):
        fail()
    assert threading.active_count() == before
