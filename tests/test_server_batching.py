"""Dynamic batching: who runs with whom, who is refused, and whose failure is whose."""

import asyncio
import math
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_calls import model_spec, outputs, predict_request, prediction_stub, refused, slow_request, wait_until
from tiny_servables import examples, rank_request, save_tiny

from export.server.batching import BatchingOptions, SignatureQueue, version_options
from export.server.errors import RequestError
from export.server.loaded_version import LoadedVersion
from export.server.local_server import LocalServer
from export.server.metrics import Metrics
from export.server.model_threads import ModelThreads

OPTIONS = BatchingOptions(max_batch_size=4, batch_timeout_seconds=0.0, max_enqueued_batches=2)
MAX_BYTES = 1 << 20
SLOW_STEPS = 20_000  # Long enough for the requests behind it to queue.


@pytest.fixture(scope="module")
def servable_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("servables")
    save_tiny(path, "tiny", 1, scale=0.5)
    return path


@pytest.fixture(scope="module")
def version(servable_dir):
    return LoadedVersion(servable_dir / "tiny" / "1", "tiny")


class Recorded(LoadedVersion):
    """A real version that remembers the rows of every call."""

    def run(self, signature_name, inputs):
        self.calls.append(len(next(iter(inputs.values()))))
        return super().run(signature_name, inputs)


@pytest.fixture
def recorded(servable_dir):
    result = Recorded(servable_dir / "tiny" / "1", "tiny")
    result.calls = []
    return result


def run_together(
    version, signature, requests, options=OPTIONS, deadlines=None, blocked=True, max_request_bytes=MAX_BYTES
):
    """Results of requests that arrive while the only thread is busy with another signature."""

    async def run():
        threads = ModelThreads(1)
        metrics = Metrics()
        queue = SignatureQueue(version, version.signatures[signature], options, max_request_bytes, threads, metrics)
        blocker = SignatureQueue(version, version.signatures["slow"], options, MAX_BYTES, threads, metrics)
        block = {"x": np.float32([0]), "steps": np.int64([SLOW_STEPS])}
        first = [blocker.run(block, 1, math.inf)] if blocked else []
        rest = [
            queue.run(inputs, len(next(iter(inputs.values()))), deadline)
            for inputs, deadline in zip(requests, deadlines or [math.inf] * len(requests), strict=True)
        ]
        results = await asyncio.gather(*first, *rest, return_exceptions=True)
        threads.close()
        return results[len(first) :]

    return asyncio.run(run())


def raw(x, count_lengths=1):
    rows = len(x)
    counts = np.ones([rows, count_lengths], np.int64)
    return {"x": np.float32(x), "names": np.array([b"a"] * rows, object), "counts": counts}


def test_requests_that_wait_run_as_one_batch_and_get_their_own_rows(recorded):
    results = run_together(recorded, "serving_default", [{"examples": examples(float(x))} for x in range(4)])
    assert [result["ctr"].tolist() for result in results] == [[0.0], [0.5], [1.0], [1.5]]
    assert recorded.calls == [1, 4]


def test_a_batch_is_never_larger_than_the_limit_and_a_larger_request_runs_in_slices(recorded):
    sizes = [2, 1, 2, 10]
    options = BatchingOptions(4, 0.0, 10)
    requests = [{"examples": examples(*range(size))} for size in sizes]
    results = run_together(recorded, "serving_default", requests, options)
    assert [len(result["ctr"]) for result in results] == sizes
    assert results[3]["ctr"].tolist() == [0.5 * x for x in range(10)]
    assert recorded.calls == [1, 3, 2, 4, 4, 2]


def test_a_request_whose_outputs_depend_on_all_rows_runs_whole(recorded):
    assert not recorded.signatures["rank"].is_sliceable
    sizes = [3, 1, 2, 1, 1, 1]
    requests = np.array([rank_request(*range(size)) for size in sizes], object)
    (result,) = run_together(recorded, "rank", [{"requests": requests}])
    assert result["ctr"].tolist() == [
        [*[0.5 * x for x in reversed(range(size))], *[-1.0] * (3 - size)] for size in sizes
    ]
    assert recorded.calls == [1, 6]


def test_bytes_limit_what_is_joined_and_what_waits(recorded):
    def request(text):
        return raw([1.0]) | {"names": np.array([text], object)}

    options = BatchingOptions(100, 0.0, 10)
    large = [request(b"a" * 400)] * 12
    results = run_together(recorded, "predict_raw", large, options, max_request_bytes=1000)
    codes = [result.code if isinstance(result, RequestError) else None for result in results]
    assert codes == [None] * 9 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3  # 9 * (400 + 20) bytes are 4000 at most.
    assert recorded.calls == [1, 2, 2, 2, 2, 1]  # Two at a time are 1000 at most.


def test_only_rows_of_equal_shapes_are_joined(recorded):
    options = BatchingOptions(4, 0.0, 10)
    requests = [raw([1.0], 2), raw([2.0], 3), raw([3.0], 2), raw([4.0], 3)]
    results = run_together(recorded, "predict_raw", requests, options)
    assert [result["ctr"].tolist() for result in results] == [[0.5], [1.0], [1.5], [2.0]]
    assert [result["count_sums"].tolist() for result in results] == [[2], [3], [2], [3]]
    assert recorded.calls == [1, 2, 2]


def test_a_request_that_fails_does_not_fail_its_neighbours(version):
    requests = [{"examples": examples(1.0)}, {"examples": np.array([b"broken"], object)}, {"examples": examples(3.0)}]
    good, broken, other = run_together(version, "serving_default", requests)
    assert (good["ctr"].tolist(), other["ctr"].tolist()) == ([0.5], [1.5])
    assert isinstance(broken, tf.errors.InvalidArgumentError)


def test_a_request_without_rows_gets_no_rows(version):
    empty, other = run_together(version, "serving_default", [{"examples": examples()}, {"examples": examples(1.0)}])
    assert empty["ctr"].tolist() == []
    assert other["ctr"].tolist() == [0.5]


def test_a_full_queue_refuses_and_the_waiting_requests_are_answered(version):
    results = run_together(version, "serving_default", [{"examples": examples(float(x))} for x in range(10)])
    assert [isinstance(result, RequestError) for result in results] == [False] * 8 + [True] * 2
    assert results[9].code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert results[7]["ctr"].tolist() == [3.5]


def test_a_request_with_more_rows_than_can_ever_wait_is_the_clients_error(version):
    largest, larger = run_together(version, "serving_default", [{"examples": examples(*range(n))} for n in (8, 9)])
    assert len(largest["ctr"]) == 8
    assert larger.code == grpc.StatusCode.INVALID_ARGUMENT  # Not RESOURCE_EXHAUSTED: to try again is no use.
    assert "may have 8 rows, max_batch_size times max_enqueued_batches. Received: 9" in str(larger)


def test_a_request_whose_deadline_passed_in_the_queue_is_not_run(recorded):
    soon = time.monotonic() + 0.001
    late, other = run_together(
        recorded,
        "serving_default",
        [{"examples": examples(1.0)}, {"examples": examples(2.0)}],
        deadlines=[soon, math.inf],
    )
    assert late.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert other["ctr"].tolist() == [1.0]
    assert recorded.calls == [1, 1]


def test_rows_wait_for_others_as_long_as_the_timeout_says(recorded):
    options = BatchingOptions(max_batch_size=2, batch_timeout_seconds=0.2, max_enqueued_batches=10)
    start = time.monotonic()
    run_together(recorded, "serving_default", [{"examples": examples(1.0)}] * 3, options, blocked=False)
    assert recorded.calls == [2, 1]  # A full batch goes at once; the last row waits for company that does not come.
    assert time.monotonic() - start > 0.2


def test_signatures_without_a_free_batch_dimension_run_alone(tmp_path):
    module = tf.Module()
    module.f = tf.function(lambda x: {"y": 2.0 * x}, input_signature=[tf.TensorSpec([2], tf.float32, "x")])
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": module.f})
    version = LoadedVersion(tmp_path / "1", "fixed")
    assert not version.signatures["serving_default"].is_batchable

    async def run():
        threads = ModelThreads(1)
        queue = SignatureQueue(version, version.signatures["serving_default"], OPTIONS, MAX_BYTES, threads, Metrics())
        results = await asyncio.gather(*(queue.run({"x": np.float32([x, x])}, 1, math.inf) for x in range(5)))
        threads.close()
        return results

    assert [result["y"].tolist() for result in asyncio.run(run())] == [[2.0 * x, 2.0 * x] for x in range(5)]


def test_the_file_of_a_version_sets_limits_that_flags_override(tmp_path):
    assert version_options(tmp_path, BatchingOptions()) == BatchingOptions(1000, 0.0, 64)
    file = tmp_path / "batching_params.pbtxt"
    file.write_text("max_batch_size { value: 64 } batch_timeout_micros { value: 2000 }")
    assert version_options(tmp_path, BatchingOptions()) == BatchingOptions(64, 0.002, 64)
    assert version_options(tmp_path, BatchingOptions(max_batch_size=8)) == BatchingOptions(8, 0.002, 64)
    file.write_text("max_batch_size: 64")
    with pytest.raises(ValueError, match=r"batching_params\.pbtxt must be a BatchingParameters"):
        version_options(tmp_path, BatchingOptions())


def test_the_server_refuses_quickly_under_overload_and_recovers(servable_dir):
    options = BatchingOptions(max_batch_size=1, max_enqueued_batches=4)
    with (
        LocalServer(servable_dir, batching=options, num_threads=1) as server,
        prediction_stub(server.grpc_address) as stub,
    ):
        stub.Predict(slow_request(1.0, 1))
        refusals = []

        def call(_):
            start = time.monotonic()
            try:
                return outputs(stub.Predict(slow_request(1.0, 3000), timeout=30))["ctr"].tolist()
            except grpc.RpcError as error:
                refusals.append((error.code(), time.monotonic() - start))
                return None

        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(call, range(200)))

        answered = [result for result in results if result is not None]
        assert 0 < len(answered) < len(results)
        assert answered == [[0.5]] * len(answered)
        assert {code for code, _ in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert np.median([seconds for _, seconds in refusals]) < 0.5
        assert outputs(stub.Predict(slow_request(2.0, 1)))["ctr"].tolist() == [1.0]  # And it goes on.


def test_a_client_whose_deadline_passes_leaves_the_queue(servable_dir):
    with LocalServer(servable_dir, num_threads=1) as server, prediction_stub(server.grpc_address) as stub:
        stub.Predict(slow_request(1.0, 1))
        running = stub.Predict.future(slow_request(1.0, 40_000), timeout=30)
        request = predict_request(model_spec("tiny"), examples=examples(1.0))
        start = time.monotonic()
        assert refused(stub.Predict, request, timeout=0.05)[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - start < 1.0
        assert outputs(running.result())["ctr"].tolist() == [0.5]
        assert outputs(stub.Predict(request, timeout=10))["ctr"].tolist() == [0.5]
        with urllib.request.urlopen(f"http://{server.rest_address}/metrics", timeout=10) as response:
            text = response.read().decode()
        # Only the second request ran.
        assert 'clsd_batch_rows_sum{model="tiny",signature="serving_default"} 1.0' in text
        assert 'clsd_queued_rows{model="tiny",signature="serving_default"} 0.0' in text


def test_rows_that_wait_for_two_versions_of_a_model_count_together(version):
    metrics = Metrics()

    async def run():
        threads = ModelThreads(1)
        slow = SignatureQueue(version, version.signatures["slow"], OPTIONS, MAX_BYTES, threads, metrics)
        block = asyncio.ensure_future(slow.run({"x": np.float32([0]), "steps": np.int64([SLOW_STEPS])}, 1, math.inf))
        await asyncio.sleep(0)
        queues = [
            SignatureQueue(version, version.signatures["serving_default"], OPTIONS, MAX_BYTES, threads, metrics)
            for _ in range(2)
        ]
        waiting = [asyncio.ensure_future(queue.run({"examples": examples(1.0)}, 1, math.inf)) for queue in queues]
        await asyncio.sleep(0)
        told = metrics.exposition().decode()
        await asyncio.gather(block, *waiting)
        threads.close()
        return told

    labels = '{model="tiny",signature="serving_default"}'
    assert f"clsd_queued_rows{labels} 2.0" in asyncio.run(run())
    assert f"clsd_queued_rows{labels} 0.0" in metrics.exposition().decode()


def test_a_thousand_vanished_requests_of_different_shapes_are_cleared_away(version):
    async def run():
        threads = ModelThreads(1)
        options = BatchingOptions(1000, 0.0, 10)
        queue = SignatureQueue(version, version.signatures["predict_raw"], options, MAX_BYTES, threads, Metrics())
        blocker = asyncio.ensure_future(queue.run(raw([1.0]), 1, math.inf))
        gone = [asyncio.ensure_future(queue.run(raw([1.0], length), 1, math.inf)) for length in range(2, 1500)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await blocker
        last = await queue.run(raw([2.0]), 1, math.inf)
        threads.close()
        return last["ctr"].tolist()

    assert asyncio.run(run()) == [1.0]


def test_threads_end_with_the_server(servable_dir):
    before = threading.active_count()
    with LocalServer(servable_dir):
        pass
    wait_until(lambda: threading.active_count() <= before)
    assert threading.active_count() <= before
