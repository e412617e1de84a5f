"""The local server over real gRPC: answers, refusals, hostile tensors, health, stopping."""

import base64
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from grpc_calls import model_spec, outputs, predict_request, prediction_stub, refused, slow_request, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    input_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    regression_pb2,
)
from tiny_servables import example, examples, rank_request, save_tiny

from export.servable.warmup import WARMUP_FILE
from export.server.local_server import LocalServer
from export.server.version_manager import VersionState

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def servable_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("servables")
    save_tiny(path, "tiny", 7, scale=0.5)
    _save_shared_input(path / "shared" / "1")
    return path


@pytest.fixture(scope="module")
def server(servable_dir):
    with LocalServer(servable_dir, max_request_bytes=1 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server):
    with prediction_stub(server.grpc_address) as result:
        yield result


def _save_shared_input(path):
    """A TF 1 SavedModel, whose signatures read one placeholder: what MultiInference is made for."""
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None])
        x = tf.io.parse_example(serialized, {"x": tf.io.FixedLenFeature([], tf.float32)})["x"]
        info = v1.saved_model.build_tensor_info
        inputs = {"inputs": info(serialized)}
        signatures = {
            "classify": v1.saved_model.build_signature_def(
                inputs, {"scores": info(tf.stack([1.0 - x, x], axis=1))}, "tensorflow/serving/classify"
            ),
            "regress": v1.saved_model.build_signature_def(
                inputs, {"outputs": info(2.0 * x)}, "tensorflow/serving/regress"
            ),
        }
        x, factor = v1.placeholder(tf.float32, [None]), v1.placeholder(tf.float32, [None])
        signatures["defaults"] = v1.saved_model.build_signature_def(
            {"x": info(x), "factor": info(factor)}, {"y": info(factor * x)}, "tensorflow/serving/predict"
        )
        signatures["defaults"].defaults["factor"].CopyFrom(tf.make_tensor_proto([2.0]))
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()


def _input(*xs, context=None):
    parsed = [tf.train.Example.FromString(example(x)) for x in xs]
    if context is None:
        return input_pb2.Input(example_list=input_pb2.ExampleList(examples=parsed))
    with_context = input_pb2.ExampleListWithContext(examples=parsed, context=context)
    return input_pb2.Input(example_list_with_context=with_context)


def test_predict_answers_with_the_model_version_and_signature(stub):
    response = stub.Predict(predict_request(model_spec("tiny"), examples=examples(0.5, 1.0)))

    np.testing.assert_array_equal(outputs(response)["ctr"], np.float32([0.25, 0.5]))
    assert response.model_spec == model_spec("tiny", "serving_default", version=7)
    assert list(response.outputs["ctr"].float_val) == [0.25, 0.5]  # Where TF Serving puts values by default.


def test_predict_reads_and_writes_every_kind_of_tensor(stub):
    request = predict_request(
        model_spec("tiny", "predict_raw"),
        x=np.float32([1.0, 3.0]),
        names=np.array([b"a", b"\xff\x00b"], object),
        counts=np.int64([[1, 2, 3], [4, 5, 2**62]]),
    )

    answer = outputs(stub.Predict(request))

    np.testing.assert_array_equal(answer["ctr"], np.float32([0.5, 1.5]))
    assert answer["names"].tolist() == [b"a", b"\xff\x00b"]
    assert answer["name_lengths"].tolist() == [1, 3]
    assert answer["count_sums"].tolist() == [6, 9 + 2**62]


def test_an_output_filter_selects_outputs(stub):
    request = predict_request(
        model_spec("tiny", "predict_raw"),
        x=np.float32([1.0]),
        names=np.array([b"a"], object),
        counts=np.int64([[1]]),
    )
    request.output_filter.append("name_lengths")
    assert list(stub.Predict(request).outputs) == ["name_lengths"]

    request.output_filter[:] = ["name_lengths", "nothing"]
    code, message = refused(stub.Predict, request)
    assert code == INVALID_ARGUMENT
    assert "nothing" in message


def test_values_repeat_the_last_one_as_in_tensorflow(stub):
    request = predict_request(
        model_spec("tiny", "predict_raw"), names=np.array([b"a"] * 3, object), counts=np.int64([[1]] * 3)
    )
    text_format.Parse("dtype: DT_FLOAT tensor_shape { dim { size: 3 } } float_val: 1 float_val: 2", request.inputs["x"])
    assert outputs(stub.Predict(request))["ctr"].tolist() == [0.5, 1.0, 1.0]


def test_classify_and_regress(stub):
    classified = stub.Classify(
        classification_pb2.ClassificationRequest(model_spec=model_spec("tiny", "classify"), input=_input(0.5, 1.0))
    )
    regressed = stub.Regress(
        regression_pb2.RegressionRequest(model_spec=model_spec("tiny", "regress"), input=_input(0.5, 1.0))
    )

    rows = [[(one.label, one.score) for one in row.classes] for row in classified.result.classifications]
    assert rows == [[("no_click", 0.75), ("click", 0.25)], [("no_click", 0.5), ("click", 0.5)]]
    assert [one.value for one in regressed.result.regressions] == [0.25, 0.5]
    assert classified.model_spec == model_spec("tiny", "classify", version=7)


def test_the_context_fills_in_what_an_example_lacks(stub):
    context = tf.train.Example.FromString(example(1.0))
    request_input = _input(0.5, context=context)
    request_input.example_list_with_context.examples.add()  # Has no x of its own.

    response = stub.Regress(
        regression_pb2.RegressionRequest(model_spec=model_spec("tiny", "regress"), input=request_input)
    )

    assert [one.value for one in response.result.regressions] == [0.25, 0.5]


def test_a_context_is_not_copied_without_limit(stub):
    context = tf.train.Example()
    context.features.feature["note"].bytes_list.value.append(b"n" * 10_000)
    request_input = _input(*[1.0] * 200, context=context)
    request = regression_pb2.RegressionRequest(model_spec=model_spec("tiny", "regress"), input=request_input)
    code, message = refused(stub.Regress, request)
    assert code == INVALID_ARGUMENT
    assert "input 'inputs' may take 1,048,576 bytes" in message


def test_inputs_with_defaults_may_be_left_out(stub):
    answer = outputs(stub.Predict(predict_request(model_spec("shared", "defaults"), x=np.float32([3.0]))))
    assert answer["y"].tolist() == [6.0]
    given = predict_request(model_spec("shared", "defaults"), x=np.float32([3.0]), factor=np.float32([5.0]))
    assert outputs(stub.Predict(given))["y"].tolist() == [15.0]
    code, message = refused(stub.Predict, predict_request(model_spec("shared", "defaults"), factor=np.float32([5.0])))
    assert code == INVALID_ARGUMENT
    assert "missing ['x']" in message


@pytest.mark.parametrize("content", [b"user-4711 is no message", b"\x0a\x05ab", rank_request(1.0)[:-1]])
def test_a_request_of_rank_that_is_no_message_is_the_clients_error(server, stub, content):
    code, message = refused(stub.Predict, predict_request(model_spec("tiny", "rank"), requests=[content]))
    assert code == INVALID_ARGUMENT
    assert "cannot read input 'requests'" in message
    assert "4711" not in message
    body = {"signature_name": "rank", "instances": [{"b64": base64.b64encode(content).decode()}]}
    url = f"http://{server.rest_address}/v1/models/tiny:predict"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url, json.dumps(body).encode(), timeout=10)
    assert caught.value.code == 400
    assert "cannot read input 'requests'" in json.load(caught.value)["error"]


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (model_spec(""), INVALID_ARGUMENT),
        (model_spec("absent"), grpc.StatusCode.NOT_FOUND),
        (model_spec("tiny", version=8), grpc.StatusCode.NOT_FOUND),
        (model_spec("tiny", label="stable"), INVALID_ARGUMENT),
        (model_spec("tiny", "absent"), grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_what_is_not_served_has_the_code_of_tf_serving(stub, spec, code):
    assert refused(stub.Predict, predict_request(spec, examples=examples(1.0)))[0] == code


@pytest.mark.parametrize(
    ("signature", "code"),
    [
        ("absent", INVALID_ARGUMENT),  # Predict says FAILED_PRECONDITION here.
        ("predict_raw", INVALID_ARGUMENT),  # Three inputs.
        ("serving_default", grpc.StatusCode.FAILED_PRECONDITION),  # One input with another name.
    ],
)
def test_signatures_that_cannot_classify(stub, signature, code):
    request = classification_pb2.ClassificationRequest(model_spec=model_spec("tiny", signature), input=_input(1.0))
    assert refused(stub.Classify, request)[0] == code
    regression = regression_pb2.RegressionRequest(model_spec=request.model_spec, input=request.input)
    assert refused(stub.Regress, regression)[0] == code


def test_no_examples_are_refused(stub):
    request = regression_pb2.RegressionRequest(model_spec=model_spec("tiny", "regress"), input=_input())
    assert refused(stub.Regress, request) == (
        INVALID_ARGUMENT,
        "the input of Classify and Regress has at least one example. Received: none",
    )


@pytest.mark.parametrize(
    ("serialized", "word"),
    [(b"user-4711 is no example", "'examples'"), (tf.train.Example().SerializeToString(), "feature 'x'")],
)
def test_an_example_that_the_model_cannot_read_is_not_quoted(stub, serialized, word):
    request = predict_request(model_spec("tiny"), examples=np.array([serialized], object))

    code, message = refused(stub.Predict, request)

    assert code == INVALID_ARGUMENT
    assert word in message
    assert "4711" not in message
    assert "/" not in message


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"x": np.float32([1])}, "missing ['counts', 'names']"),
        ({"x": np.float32([1]), "names": [b"a"], "counts": np.int64([[1]]), "more": [1]}, "more"),
        ({"x": np.float64([1]), "names": [b"a"], "counts": np.int64([[1]])}, "'x' has dtype DT_FLOAT"),
        ({"x": np.float32([[1]]), "names": [b"a"], "counts": np.int64([[1]])}, "'x' has shape [-1]"),
        ({"x": np.float32(1), "names": [b"a"], "counts": np.int64([[1]])}, "'x' has shape [-1]"),
        ({"x": np.float32([1, 2]), "names": [b"a"], "counts": np.int64([[1]])}, "0th dimension"),
    ],
)
def test_inputs_that_do_not_fit_the_signature_are_refused(stub, inputs, word):
    code, message = refused(stub.Predict, predict_request(model_spec("tiny", "predict_raw"), **inputs))
    assert code == INVALID_ARGUMENT
    assert word in message


@pytest.mark.parametrize(
    "malformed",
    [
        "tensor_shape { dim { size: -1 } } float_val: 1",
        "tensor_shape { unknown_rank: true } float_val: 1",
        "tensor_shape { dim { size: 2 } } tensor_content: 'abc'",
        "tensor_shape { dim { size: 1 } } float_val: [1, 2]",
        "tensor_shape { dim { size: 4611686018427387904 } } float_val: 1",
        "tensor_shape { dim { size: 4294967296 } dim { size: 4294967296 } } float_val: 1",
        "tensor_shape { dim { size: 0 } dim { size: 4611686018427387904 } }",
        "tensor_shape { dim { size: 1000000 } } float_val: 1",  # 4 MB of a 1 MiB limit.
        "tensor_shape { dim { size: 1 } } string_val: 'a'",
    ],
)
def test_malformed_tensors_are_refused_by_name(stub, malformed):
    request = predict_request(model_spec("tiny", "predict_raw"), names=[b"a"], counts=np.int64([[1]]))
    request.inputs["x"].CopyFrom(text_format.Parse(f"dtype: DT_FLOAT {malformed}", tensor_pb2.TensorProto()))
    if "string_val" in malformed:
        request.inputs["x"].dtype = 7

    code, message = refused(stub.Predict, request)

    assert code == INVALID_ARGUMENT
    assert "input 'x'" in message


@pytest.mark.parametrize(
    "malformed",
    [
        "tensor_shape { dim { size: 2 } } tensor_content: 'ab'",
        "tensor_shape { dim { size: 200000 } } string_val: 'a'",  # Pointers alone pass 1 MiB.
        f"tensor_shape {{ dim {{ size: 1000 }} }} string_val: '{'a' * 10_000}'",
    ],
)
def test_strings_do_not_grow_beyond_the_limit(stub, malformed):
    request = predict_pb2.PredictRequest(model_spec=model_spec("tiny"))
    text_format.Parse(f"dtype: DT_STRING {malformed}", request.inputs["examples"])
    code, message = refused(stub.Predict, request)
    assert code == INVALID_ARGUMENT
    assert "input 'examples'" in message


def test_a_request_beyond_the_limit_is_refused(stub):
    request = predict_request(model_spec("tiny"), examples=np.array([b"a" * (1 << 20)], object))
    assert refused(stub.Predict, request)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_multi_inference_answers_signatures_that_share_a_tensor(stub):
    request = inference_pb2.MultiInferenceRequest(input=_input(0.25))
    request.tasks.add(model_spec=model_spec("shared", "classify"), method_name="tensorflow/serving/classify")
    request.tasks.add(model_spec=model_spec("shared", "regress"), method_name="tensorflow/serving/regress")

    first, second = stub.MultiInference(request).results

    assert [one.score for one in first.classification_result.classifications[0].classes] == [0.75, 0.25]
    assert second.regression_result.regressions[0].value == 0.5
    assert second.model_spec == model_spec("shared", "regress", version=1)


@pytest.mark.parametrize(
    ("tasks", "code", "word"),
    [
        ([], INVALID_ARGUMENT, "at least one task"),
        ([("tiny", "regress", "regress"), ("shared", "regress", "regress")], INVALID_ARGUMENT, "same model"),
        ([("tiny", "regress", "regress")] * 2, INVALID_ARGUMENT, "different signatures"),
        ([("tiny", "regress", "rank")], grpc.StatusCode.UNIMPLEMENTED, "method_name"),
        # TensorFlow 2 gives each signature a placeholder of its own, and TF Serving feeds only one.
        ([("tiny", "regress", "regress"), ("tiny", "classify", "classify")], INVALID_ARGUMENT, "same tensor"),
    ],
)
def test_multi_inference_refuses_what_tf_serving_refuses(stub, tasks, code, word):
    request = inference_pb2.MultiInferenceRequest(input=_input(0.25))
    for name, signature, method in tasks:
        request.tasks.add(model_spec=model_spec(name, signature), method_name=f"tensorflow/serving/{method}")
    answered_code, message = refused(stub.MultiInference, request)
    assert answered_code == code
    assert word in message


def test_metadata_is_the_signatures_of_the_saved_model(stub, servable_dir):
    request = get_model_metadata_pb2.GetModelMetadataRequest(
        model_spec=model_spec("tiny"), metadata_field=["signature_def"]
    )
    response = stub.GetModelMetadata(request)

    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert {"serving_default", "predict_raw", "classify", "regress", "slow"} <= signatures.signature_def.keys()
    assert signatures.signature_def["classify"].inputs["inputs"].dtype == tf.string.as_datatype_enum
    assert response.model_spec == model_spec("tiny", version=7)

    request.metadata_field.append("signature_def")  # To name it twice is the same to TF Serving.
    assert stub.GetModelMetadata(request) == response
    request.metadata_field[:] = ["weights"]
    assert refused(stub.GetModelMetadata, request)[0] == INVALID_ARGUMENT


def test_the_model_service_tells_states_and_reloads_nothing(server):
    with grpc.insecure_channel(server.grpc_address) as channel:
        service = model_service_pb2_grpc.ModelServiceStub(channel)
        response = service.GetModelStatus(get_model_status_pb2.GetModelStatusRequest(model_spec=model_spec("tiny")))
        assert [(one.version, one.state) for one in response.model_version_status] == [
            (7, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
        ]
        absent = get_model_status_pb2.GetModelStatusRequest(model_spec=model_spec("tiny", version=8))
        assert refused(service.GetModelStatus, absent)[0] == grpc.StatusCode.NOT_FOUND
        assert (
            refused(service.HandleReloadConfigRequest, model_management_pb2.ReloadConfigRequest())[0]
            == grpc.StatusCode.UNIMPLEMENTED
        )


def test_metrics_count_requests_but_no_unknown_models(server, stub):
    stub.Predict(predict_request(model_spec("tiny"), examples=examples(1.0)))
    refused(stub.Predict, predict_request(model_spec("absent-user"), examples=examples(1.0)))

    with urllib.request.urlopen(f"http://{server.rest_address}/metrics", timeout=10) as response:
        text = response.read().decode()

    assert re.search(r'clsd_requests_total{code="OK",method="Predict",model="tiny",protocol="grpc"} [1-9]', text)
    assert 'code="NOT_FOUND",method="Predict",model="other"' in text
    assert 'clsd_loaded_version{model="tiny",version="7"} 1.0' in text
    assert "absent-user" not in text


def test_health_is_not_serving_while_no_model_is_loaded(tmp_path, servable_dir):
    with LocalServer(tmp_path, poll_seconds=0.05) as server, grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="tensorflow.serving.PredictionService")
        assert health.Check(request).status == NOT_SERVING
        shutil.copytree(servable_dir / "tiny", tmp_path / "tiny")
        wait_until(lambda: health.Check(request).status == SERVING)


def test_a_watcher_of_health_hears_of_the_end_and_does_not_delay_it(servable_dir):
    server = LocalServer(servable_dir, grace_seconds=60.0)
    server.start()
    with grpc.insecure_channel(server.grpc_address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        server.request_stop()
        assert next(watch).status == NOT_SERVING
        start = time.monotonic()
        server.join()
        assert time.monotonic() - start < 5.0


def test_stopping_finishes_what_runs_and_takes_nothing_new(servable_dir):
    server = LocalServer(servable_dir)
    server.start()
    with prediction_stub(server.grpc_address) as stub:
        stub.Predict(slow_request(1.0, 1))
        running = stub.Predict.future(slow_request(1.0, 60_000), timeout=30)
        threading.Event().wait(0.1)
        assert not running.done()
        server.request_stop()
        assert outputs(running.result())["ctr"].tolist() == [0.5]
        server.join()
        assert refused(stub.Predict, slow_request(1.0, 1))[0] == grpc.StatusCode.UNAVAILABLE


def test_stopping_does_not_wait_for_a_version_that_loads(servable_dir, tmp_path):
    shutil.copytree(servable_dir / "tiny", tmp_path / "tiny")
    server = LocalServer(tmp_path, poll_seconds=0.02)
    server.start()
    staging = shutil.copytree(servable_dir / "tiny" / "7", tmp_path / "staging")
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(slow_request(1.0, 300_000))
    (staging / WARMUP_FILE).parent.mkdir()
    with tf.io.TFRecordWriter(str(staging / WARMUP_FILE)) as writer:
        writer.write(log.SerializeToString())
    staging.rename(tmp_path / "tiny" / "8")

    def state():
        return server.manager.states(model_spec("tiny")).get(8, VersionState(0)).state

    wait_until(lambda: state() == get_model_status_pb2.ModelVersionStatus.LOADING)
    with prediction_stub(server.grpc_address) as stub:
        server.request_stop()
        wait_until(lambda: _is_gone(server.rest_address))
        assert refused(stub.Predict, slow_request(1.0, 1))[0] == grpc.StatusCode.UNAVAILABLE
        assert state() == get_model_status_pb2.ModelVersionStatus.LOADING
    server.join()


def _is_gone(address):
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_taken_port_and_a_missing_directory_are_told(server, servable_dir, tmp_path):
    taken = int(server.grpc_address.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"gRPC address must be free. Received: 127.0.0.1:{taken}"):
        LocalServer(servable_dir, grpc_port=taken).start()
    taken = int(server.rest_address.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"REST address must be free. Received: 127.0.0.1:{taken}"):
        LocalServer(servable_dir, rest_port=taken).start()
    with pytest.raises(FileNotFoundError, match="absent"):
        LocalServer(tmp_path / "absent").start()


def test_concurrent_clients_get_their_own_rows(stub):
    def call(x):
        response = stub.Predict(predict_request(model_spec("tiny"), examples=examples(x, x + 1)), timeout=30)
        return outputs(response)["ctr"].tolist()

    xs = [float(x) for x in range(400)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(call, xs))

    assert answers == [[0.5 * x, 0.5 * (x + 1)] for x in xs]


def test_the_command_prints_its_ports_and_ends_well_on_sigterm(servable_dir):
    command = [sys.executable, "-m", "export.serve", f"--servable_dir={servable_dir}", "--grpc_port=0", "--rest_port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "does not replace TF Serving" in process.stdout.readline()
        address = re.match(r"gRPC (127\.0\.0\.1:\d+)  REST http://127\.0\.0\.1:\d+", process.stdout.readline())[1]
        with prediction_stub(address) as stub:
            assert outputs(stub.Predict(predict_request(model_spec("tiny"), examples=examples(1.0))))["ctr"] == [0.5]
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
