"""Requests that are broken in every way: each is refused with the field's name, and the server stays as it was."""

import http.client
import json

import grpc
import numpy as np
import pytest
from grpc_calls import model_spec, predict_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_serving.apis import prediction_service_pb2_grpc
from tiny_servables import save_tiny

from benchmarks.malformed_grpc import grpc_request
from benchmarks.malformed_requests import Target
from benchmarks.malformed_rest import rest_request
from export.server.errors import RequestError
from export.server.loaded_version import LoadedVersion
from export.server.local_server import LocalServer

RANDOM = st.randoms(use_true_random=False)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def servable_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("servables")
    save_tiny(path, "tiny", 1, scale=0.5)
    return path


@pytest.fixture(scope="module")
def target(servable_dir):
    return Target("tiny", LoadedVersion(servable_dir / "tiny" / "1", "tiny").signatures, {"x": "float"})


@pytest.fixture(scope="module")
def server(servable_dir):
    with LocalServer(servable_dir) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc_address) as opened:
        yield opened


@FUZZ
@given(choose=RANDOM)
def test_malformed_requests_over_rest_are_the_clients_error(server, target, choose):
    request = rest_request(choose, target)
    connection = http.client.HTTPConnection(server.rest_address, timeout=20)
    connection.request("POST", request.address, request.body)
    response = connection.getresponse()
    content = json.loads(response.read())
    assert response.status == RequestError(request.code, "").http_status, (request, content)
    assert request.field in content["error"], (request, content)
    good = {"signature_name": "predict_raw", "instances": [{"x": 1.0, "names": "n", "counts": [1]}]}
    connection.request("POST", "/v1/models/tiny:predict", json.dumps(good))
    assert json.loads(connection.getresponse().read())["predictions"][0]["ctr"] == 0.5
    connection.close()


@FUZZ
@given(choose=RANDOM)
def test_malformed_requests_over_grpc_are_the_clients_error(channel, target, choose):
    request = grpc_request(choose, target)
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/tensorflow.serving.PredictionService/{request.address}")(request.body, timeout=20)
    assert caught.value.code() == request.code, (request, caught.value.details())
    assert request.field in caught.value.details(), (request, caught.value.details())
    good = predict_request(
        model_spec("tiny", "predict_raw"),
        x=np.float32([1.0]),
        names=np.array([b"n"], object),
        counts=np.int64([[1]]),
    )
    answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(good, timeout=20)
    assert answer.outputs["ctr"].float_val[0] == 0.5
