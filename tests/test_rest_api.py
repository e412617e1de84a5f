"""The REST API as clients see it: a real server on the loopback, real sockets."""

import base64
import concurrent.futures
import http.client
import json
import socket
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from grpc_calls import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tiny_servables import example, save_tiny, write_config

from export.server.loaded_version import LoadedVersion
from export.server.local_server import LocalServer

MAX_BYTES = 1 << 20
CONFIG = """model_config_list { config {
  name: "tiny" base_path: "/models/tiny" model_platform: "tensorflow"
  model_version_policy { all {} } version_labels { key: "stable" value: 1 }
} }"""
RAW = {"x": [0.5, 1.5], "names": ["a", "é"], "counts": [[1, 2], [3, 4]]}
BODY = json.dumps({"signature_name": "predict_raw", "inputs": RAW})


@pytest.fixture(scope="module")
def servable_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("servables")
    save_tiny(path, "tiny", 1, scale=0.5)
    save_tiny(path, "tiny", 2, scale=0.25)
    write_config(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def server(servable_dir):
    with LocalServer(servable_dir, max_request_bytes=MAX_BYTES) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(servable_dir):
    return LoadedVersion(servable_dir / "tiny" / "2", "tiny")


@pytest.fixture
def call(server):
    connection = http.client.HTTPConnection(server.rest_address, timeout=20)

    def send(method, path, body=None, headers=None):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers["content-type"] == "application/json"
        return response.status, json.loads(content) if is_json else content.decode()

    yield send
    connection.close()


def predict(call, body, path="/v1/models/tiny:predict"):
    status, answer = call("POST", path, body if isinstance(body, (str, bytes)) else json.dumps(body))
    assert status == 200, answer
    return answer


# --- What is answered -------------------------------------------------------------------------------------------------


def test_rows_and_columns_give_the_numbers_of_the_model(call):
    columns = predict(call, BODY)["outputs"]
    assert columns == {
        "ctr": [0.125, 0.375],
        "name_lengths": [1, 2],
        "names": ["a", "é"],
        "count_sums": [3, 7],
    }
    rows = [dict(zip(RAW, row, strict=True)) for row in zip(*RAW.values(), strict=True)]
    found = predict(call, {"signature_name": "predict_raw", "instances": rows})["predictions"]
    assert found == [{name: values[row] for name, values in columns.items()} for row in range(2)]


def test_serialized_examples_are_base64_and_a_single_output_is_bare(call):
    instances = [{"b64": base64.b64encode(example(x)).decode()} for x in (1.0, 0.1)]
    assert predict(call, {"instances": instances}) == {"predictions": [0.25, 0.025]}
    assert predict(call, {"inputs": {"examples": instances}}) == {"outputs": [0.25, 0.025]}


@pytest.mark.parametrize(
    ("place", "expected"), [("", 0.25), ("/versions/1", 0.5), ("/versions/2", 0.25), ("/labels/stable", 0.5)]
)
def test_versions_and_labels_stand_in_the_path(call, place, expected):
    path = f"/v1/models/tiny{place}"
    body = json.dumps({"signature_name": "regress", "examples": [{"x": 1.0}]})
    assert call("POST", f"{path}:regress", body) == (200, {"results": [expected]})
    body = json.dumps({"signature_name": "classify", "context": {"x": 1.0}, "examples": [{}, {"x": 0.0}]})
    assert call("POST", f"{path}:classify", body) == (
        200,
        {"results": [[["no_click", 1 - expected], ["click", expected]], [["no_click", 1.0], ["click", 0.0]]]},
    )
    assert call("GET", path)[1]["model_version_status"][-1]["state"] == "AVAILABLE"
    assert call("GET", f"{path}/metadata")[1]["model_spec"]["version"] == ("1" if expected == 0.5 else "2")


def test_the_content_type_does_not_matter(call):
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        assert call("POST", "/v1/models/tiny:predict", BODY, {"Content-Type": kind})[0] == 200


def test_status_and_metadata_are_printed_as_tf_serving_does(call):
    status = {"error_code": "OK", "error_message": ""}
    available = [{"version": str(number), "state": "AVAILABLE", "status": status} for number in (1, 2)]
    code, content = call("GET", "/v1/models/tiny")
    assert code == 200
    assert sorted(content["model_version_status"], key=lambda entry: entry["version"]) == available
    assert call("GET", "/v1/models/tiny/versions/1") == (200, {"model_version_status": available[:1]})
    code, content = call("GET", "/v1/models/tiny/metadata")
    assert content["model_spec"] == {"name": "tiny", "version": "2", "signature_name": ""}
    signatures = content["metadata"]["signature_def"]["signature_def"]
    assert set(signatures) >= {"serving_default", "classify", "regress", "predict_raw"}
    counts = signatures["predict_raw"]["inputs"]["counts"]
    assert counts["dtype"] == "DT_INT64"
    assert counts["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}, {"size": "-1", "name": ""}],
        "unknown_rank": False,
    }
    assert signatures["predict_raw"]["method_name"] == "tensorflow/serving/predict"


def test_requests_are_counted_at_both_addresses(call):
    predict(call, BODY)
    assert call("POST", "/v1/models/tiny:predict", "{")[0] == 400
    for path in ("/metrics", "/monitoring/prometheus/metrics"):
        status, text = call("GET", path)
        assert status == 200
        for code in ("OK", "INVALID_ARGUMENT"):
            assert f'clsd_requests_total{{code="{code}",method="Predict",model="tiny",protocol="rest"}}' in text


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/models/absent:predict", 404),
        ("POST", "/v1/models/tiny/versions/9:predict", 404),
        ("GET", "/v1/models/absent", 404),
        ("GET", "/v1/models/absent/metadata", 404),
        ("GET", "/v1/models/tiny/versions/9", 404),
        ("POST", "/v1/models/tiny/labels/absent:predict", 400),
        ("POST", "/v1/models/tiny/versions/x:predict", 400),
        ("POST", "/v1/models/tiny/versions/99999999999999999999:predict", 400),
        ("POST", "/v1/models/tiny/versions/-1:predict", 400),
        ("GET", "/v1/models/tiny/versions/x", 400),
        ("GET", "/", 404),
        ("GET", "/v2/models/tiny", 404),
        ("POST", "/metrics", 405),
    ],
)
def test_paths_and_methods(call, method, path, status):
    code, content = call(method, path, BODY if method == "POST" else None)
    assert code == status
    assert list(content) == ["error"]
    assert content["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny/"),
        ("GET", "/v1/models/..%2F..%2Fetc"),
        ("POST", "/v1/models/tiny:explain"),
        ("POST", "/v1/models/tiny%3Apredict:predict"),
        ("GET", "/v1/models/tiny:predict"),
        ("DELETE", "/v1/models/tiny"),
        ("POST", "/v1/models/tiny/metadata"),
    ],
)
def test_what_is_unknown_below_v1_is_malformed_as_in_tf_serving(call, method, path):
    code, content = call(method, path, BODY if method == "POST" else None)
    assert (code, content) == (400, {"error": f"Malformed request: {method} {urllib.parse.unquote(path)}"})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "JSON parse error"),
        ('{"instances": null}', "instances must be an array of at least one. Received: null"),
        ("nonsense", "JSON parse error"),
        (b'{"inputs": "\xff"}', "UTF-8"),
        ('{"instances": [1]}', "'examples'"),
        ('{"signature_name": "absent", "instances": [1]}', "absent"),
        ('{"signature_name": "\\u0000", "instances": [1]}', "not found"),
        (json.dumps({"signature_name": "predict_raw", "inputs": {**RAW, "x": [[1.0], [2.0]]}}), "'x'"),
        (json.dumps({"signature_name": "predict_raw", "inputs": {**RAW, "x": [1.0]}}), "'x'"),
        (json.dumps({"instances": [{"b64": "AAAA"}]}), "'examples'"),
    ],
)
def test_bodies_that_do_not_fit_name_the_field(call, body, message):
    status, content = call("POST", "/v1/models/tiny:predict", body)
    assert status == 400
    assert message in content["error"]
    predict(call, BODY)


def test_classify_and_regress_refuse_other_signatures(call):
    body = json.dumps({"signature_name": "predict_raw", "examples": [{"x": 1.0}]})
    for verb in ("classify", "regress"):
        status, content = call("POST", f"/v1/models/tiny:{verb}", body)
        assert status == 400
        assert "predict_raw" in content["error"]


def test_longer_bodies_are_refused_while_they_arrive(server, call):
    assert call("POST", "/v1/models/tiny:predict", b"[" * (MAX_BYTES + 1))[0] == 413
    connection = http.client.HTTPConnection(server.rest_address, timeout=20)
    connection.request("POST", "/v1/models/tiny:predict", (b"[" * 10_000 for _ in range(200)), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert "1,048,576 bytes" in json.loads(response.read())["error"]
    connection.close()
    predict(call, BODY)


def test_chunked_bodies_are_bodies(server):
    connection = http.client.HTTPConnection(server.rest_address, timeout=20)
    chunks = (BODY.encode()[start : start + 7] for start in range(0, len(BODY), 7))
    connection.request("POST", "/v1/models/tiny:predict", chunks, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


def slow_body(steps):
    return json.dumps({"signature_name": "slow", "inputs": {"x": [1.0], "steps": [steps]}})


def test_clients_that_go_away_leave_the_server_as_it_was(server, call, caplog, capfd):
    host, port = server.rest_address.split(":")
    head = "POST /v1/models/tiny:predict HTTP/1.1\r\nHost: h\r\nContent-Length: "
    for sent in (f"{head}1000\r\n\r\n{{", f"{head}{len(slow_body(20_000))}\r\n\r\n{slow_body(20_000)}", "POST /v1/mod"):
        for _ in range(3):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(sent.encode())
    time.sleep(0.2)
    predict(call, BODY)
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert "INTERNAL" not in call("GET", "/metrics")[1]


def test_a_request_whose_client_went_away_leaves_the_queue(servable_dir):
    with LocalServer(servable_dir, num_threads=1) as server:
        blocker = http.client.HTTPConnection(server.rest_address, timeout=20)
        blocker.request("POST", "/v1/models/tiny:predict", slow_body(150_000))
        gone = http.client.HTTPConnection(server.rest_address, timeout=20)
        gone.request("POST", "/v1/models/tiny:predict", BODY)
        time.sleep(0.1)  # It waits in the queue.
        gone.close()

        def metrics():
            with urllib.request.urlopen(f"http://{server.rest_address}/metrics", timeout=10) as response:
                return response.read().decode()

        wait_until(lambda: 'code="CANCELLED",method="Predict"' in metrics())
        assert 'code="OK"' not in metrics()
        assert blocker.getresponse().status == 200
        assert 'clsd_queued_rows{model="tiny",signature="predict_raw"} 0.0' in metrics()
        assert 'clsd_batch_rows_count{model="tiny",signature="predict_raw"}' not in metrics()  # It never ran.


def test_an_error_of_the_server_does_not_quote_the_request(servable_dir, monkeypatch, caplog, capfd):
    def fails(*_):
        raise KeyError(f"user-{4700 + 11}")

    monkeypatch.setattr("export.server.rest_api.predict_answer", fails)
    with LocalServer(servable_dir) as server:
        connection = http.client.HTTPConnection(server.rest_address, timeout=20)
        connection.request("POST", "/v1/models/tiny:predict", BODY)
        response = connection.getresponse()
        assert response.status == 500
        assert json.loads(response.read()) == {"error": "KeyError in the server; its log says where"}
    told = caplog.text + capfd.readouterr().err
    assert "KeyError while answering" in told
    assert "4711" not in told


def test_long_bodies_are_answered_as_short_ones(call):
    names = ["a" * 1000] * 400
    columns = {"x": [2.0] * 400, "names": names, "counts": [[1]] * 400}
    answer = predict(call, {"signature_name": "predict_raw", "inputs": columns})
    assert answer["outputs"]["ctr"] == [0.5] * 400
    assert call("POST", "/v1/models/tiny:predict", "[" * 500_000)[1]["error"].startswith("JSON parse error")


def test_a_deadline_ends_slow_answers_and_slow_bodies(servable_dir):
    with LocalServer(servable_dir, rest_timeout_seconds=0.1, num_threads=1) as server:
        connection = http.client.HTTPConnection(server.rest_address, timeout=20)
        connection.request("POST", "/v1/models/tiny:predict", slow_body(200_000))
        response = connection.getresponse()
        assert response.status == 504
        assert "error" in json.loads(response.read())
        host, port = server.rest_address.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n{")
            assert b" 504 " in client.recv(1000)


def test_an_answer_does_not_wait_for_the_client_to_confirm_its_headers(call):
    def seconds():
        started = time.perf_counter()
        predict(call, BODY)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(10)) < 0.03  # 0.04 s where the socket joins small packets.


# --- Together ---------------------------------------------------------------------------------------------------------


def test_many_clients_get_their_own_answers(server):
    def ask(value):
        connection = http.client.HTTPConnection(server.rest_address, timeout=20)
        body = {"signature_name": "predict_raw", "instances": [{"x": value, "names": str(value), "counts": [1]}]}
        connection.request("POST", "/v1/models/tiny:predict", json.dumps(body))
        found = json.loads(connection.getresponse().read())["predictions"][0]
        connection.close()
        return found["ctr"], found["names"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        values = range(64)
        assert list(pool.map(ask, values)) == [(value * 0.25, str(value)) for value in values]


@st.composite
def raw_tensors(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    names = draw(st.lists(st.text(max_size=5), min_size=rows, max_size=rows))
    return {
        "x": draw(npst.arrays(np.float32, rows)),
        "names": np.array([name.encode() for name in names], object),
        "counts": draw(npst.arrays(np.int64, (rows, width), elements=st.integers(-(2**62) // 3, 2**62 // 3))),
    }


@settings(max_examples=25, deadline=None)
@given(tensors=raw_tensors(), in_rows=st.booleans())
def test_tensors_over_json_give_what_the_model_gives_directly(server, loaded, tensors, in_rows):
    written = {name: values.tolist() for name, values in tensors.items()}
    written["names"] = [name.decode() for name in written["names"]]
    rows = [dict(zip(written, row, strict=True)) for row in zip(*written.values(), strict=True)]
    body = {"signature_name": "predict_raw", **({"instances": rows} if in_rows else {"inputs": written})}
    connection = http.client.HTTPConnection(server.rest_address, timeout=20)
    connection.request("POST", "/v1/models/tiny:predict", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    if in_rows:
        answer["outputs"] = {name: [row[name] for row in answer["predictions"]] for name in answer["predictions"][0]}
    for name, expected in loaded.run("predict_raw", tensors).items():
        if name == "names":
            expected = np.array([value.decode() for value in expected])
        np.testing.assert_array_equal(np.array(answer["outputs"][name], expected.dtype), expected)
