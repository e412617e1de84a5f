"""The client against the local server, over both protocols: scores, orders, errors, retries and deadlines."""

import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import start_command
from feed_servables import RAW_INPUTS, save_feed_model

from clsd_tf.data.examples import encode_raw_rows
from clsd_tf.data.request_files import typed_rows
from clsd_tf.serving.servable import LocalServable
from export.clients.file_scoring import score_file
from export.clients.load_generator import generate_load
from export.clients.server_comparison import compare
from export.clients.serving_client import ServingClient
from export.clients.transport import Endpoint, ServingError
from export.servable.saved_model import export_servable
from export.server.batching import BatchingOptions
from export.server.local_server import LocalServer

PROTOCOLS = ("grpc", "rest")
ROWS = pa.table(
    {
        "note": [1, 2, 3, 4, 5],
        "user": ["u1", "u22", None, "", "u1"],
        "age": ["30", "", "20", None, "30"],
        "price": [0.5, 1.5, None, None, 0.5],
        "recent": [["a", "b"], [], None, ["a"], ["a", "b"]],
    }
)
SUMS = [34.5, 4.5, 20, 1, 34.5]  # 30 + 0.5 + 2 letters + 2 recent; 1.5 + 3 letters; 20; 1 recent.
CONFIG = """model_config_list { config {
  name: "feed" base_path: "/models/feed" model_platform: "tensorflow"
  model_version_policy { specific { versions: 1 versions: 2 } }
  version_labels { key: "stable" value: 1 } version_labels { key: "canary" value: 2 }
} }"""


@pytest.fixture(scope="module")
def servable_dir(tmp_path_factory):
    """Version 1 multiplies by 0.01, version 2 by 0.02."""
    path = tmp_path_factory.mktemp("servables")
    save_feed_model(path, 1, 0.01)
    save_feed_model(path, 2, 0.02)
    (path / "models.config").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def server(servable_dir):
    with LocalServer(servable_dir) as running:
        yield running


def address(server, protocol):
    return server.grpc_address if protocol == "grpc" else server.rest_address


@contextlib.contextmanager
def client_of(server, protocol, model="feed", batch_size=2, concurrency=3, **endpoint):
    where = server if isinstance(server, str) else address(server, protocol)
    with ServingClient(
        Endpoint(where, model, **endpoint), protocol=protocol, batch_size=batch_size, concurrency=concurrency
    ) as client:
        yield client


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rows_get_the_scores_that_the_servable_gives_here(server, servable_dir, protocol):
    with client_of(server, protocol) as client:
        scores = client.score(ROWS)
        assert client.raw_inputs == RAW_INPUTS
        assert client.score(ROWS.slice(0, 0)).shape == (0,)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, 0.02 * np.array(SUMS), rtol=1e-6)
    np.testing.assert_allclose(scores, LocalServable(servable_dir / "feed").score(ROWS), rtol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("choice", [{"version": 1}, {"label": "stable"}])
def test_a_version_or_a_label_says_who_answers(server, protocol, choice):
    with client_of(server, protocol, **choice) as client:
        np.testing.assert_allclose(client.score(ROWS), 0.01 * np.array(SUMS), rtol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_status_and_metadata_tell_what_is_served(server, protocol):
    with client_of(server, protocol) as client:
        assert sorted((entry.version, entry.state, entry.error) for entry in client.status()) == [
            (1, "AVAILABLE", ""),
            (2, "AVAILABLE", ""),
        ]
        assert {"serving_default", "predict_raw"} <= set(client.metadata())
        assert sorted(client.metadata()["predict_raw"].inputs) == ["age", "price", "recent", "user"]


def test_a_file_is_scored_as_by_a_servable_here(server, servable_dir, tmp_path):
    source, seen = tmp_path / "rows.jsonl", []
    source.write_text("".join(json.dumps({**row, "note": "x" * n}) + "\n" for n, row in enumerate(ROWS.to_pylist())))
    with client_of(server, "grpc", batch_size=3) as client:
        assert score_file(client, source, tmp_path / "out" / "scores.parquet", seen.append) == 5
    score_file(LocalServable(servable_dir / "feed"), source, tmp_path / "local.parquet")
    served, local = (pa.parquet.read_table(tmp_path / name) for name in ("out/scores.parquet", "local.parquet"))
    assert served.drop_columns("ctr") == local.drop_columns("ctr")
    np.testing.assert_allclose(served["ctr"], local["ctr"], rtol=1e-6)
    assert seen == [5]


# --- Ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_items_carry_their_id_even_if_the_model_reads_it_for_nothing_else(server, protocol):
    user = {"user": "u1", "age": 30, "recent": None}
    items = [{"item_id": 5, "price": 1.5}, {"item_id": 6, "price": None}, {"item_id": 10**17, "price": 8}]
    with client_of(server, protocol) as client:
        ranked = client.rank(user, items)
        assert [item for item, _ in ranked] == [10**17, 5, 6]
        np.testing.assert_allclose([ctr for _, ctr in ranked], [0.8, 0.67, 0.64], rtol=1e-6)  # 0.02 * (32 + price).
        assert {type(item) for item, _ in ranked} == {int}
        with pytest.raises(ValueError, match=r"needs its id, under the name that the model knows. Received: 1 of 1 "):
            client.rank(user, [{"id": 5, "price": 1.5}])
        with pytest.raises(ValueError, match=r"Received: 1 of 2 without"):
            client.rank(user, [{"item_id": 5, "price": 1.5}, {"item_id": None, "price": 8}])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_value_that_all_items_share_may_stand_with_the_user(server, protocol):
    user, items = {"user": "u1", "age": 30, "recent": None, "price": 8}, [{"item_id": 5}, {"item_id": 6}]
    with client_of(server, protocol) as client:
        assert client.rank(user, items) == [(5, pytest.approx(0.8)), (6, pytest.approx(0.8))]  # 0.02 * (32 + 8).


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_that_a_server_answers_together_get_the_items_that_they_sent(servable_dir, protocol):
    user = {"user": "u1", "age": 30, "recent": None}
    items = [{"item_id": number, "price": number} for number in range(1, 6)]
    options = BatchingOptions(max_batch_size=2, batch_timeout_seconds=5.0)  # Waits until there are two.
    with (
        LocalServer(servable_dir, batching=options, num_threads=1) as joining,
        client_of(joining, protocol) as client,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        assert len(client.raw_inputs) == 4  # Asked once, before.
        long, short = threads.map(lambda count: client.rank(user, items[:count]), (5, 2))
    assert [item for item, _ in long] == [5, 4, 3, 2, 1]
    assert short == [(2, pytest.approx(0.68)), (1, pytest.approx(0.66))]


@pytest.fixture(scope="module")
def exported(feed_dataset, clsd_run, tmp_path_factory):
    """A servable directory with a real model, feed."""
    path = tmp_path_factory.mktemp("exported")
    export_servable(feed_dataset, clsd_run.work_dir, path, "feed", version=3)
    return path


@pytest.mark.long
def test_items_are_ordered_by_the_scores_of_their_rows(exported, feed_dataset):
    rows = pa.parquet.read_table(feed_dataset.layout.serving_sample).slice(0, 40)
    of_items = ["item_id", "category", "tags", "duration_seconds"]
    servable = LocalServable(exported / "feed")
    user = {entry.name: rows[entry.name][0].as_py() for entry in servable.raw_inputs if entry.name not in of_items}
    items = list({item["item_id"]: item for item in rows.select(of_items).to_pylist()}.values())
    scores = servable.score(pa.Table.from_pylist([{**user, **item} for item in items]))
    expected = sorted(zip(scores, (item["item_id"] for item in items), strict=True), key=lambda pair: -pair[0])
    with LocalServer(exported) as server:
        for protocol in PROTOCOLS:
            with client_of(server, protocol) as client:
                ranked = client.rank(user, items)
                assert [item for item, _ in ranked] == [item for _, item in expected]
                np.testing.assert_allclose([ctr for _, ctr in ranked], [ctr for ctr, _ in expected], atol=1e-6)
                assert client.rank(user, items[:1])[0][0] == items[0]["item_id"]
                with pytest.raises(ValueError, match=r"Missing: age"):
                    client.rank({name: value for name, value in user.items() if name != "age"}, items)
                with pytest.raises(ValueError, match=r"Received: age in both"):
                    client.rank(user, [{**item, "age": 3} for item in items])
                with pytest.raises(ValueError, match="Received: no items"):
                    client.rank(user, [])


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("choice", [{"model": "other"}, {"version": 9}])
def test_an_error_of_the_server_comes_with_its_code_its_message_and_a_remedy(server, protocol, choice):
    with (
        client_of(server, protocol, **choice) as client,
        pytest.raises(ServingError, match=r"Received: NOT_FOUND, .*export\.client status` shows which") as caught,
    ):
        client.score(ROWS)
    assert caught.value.code == "NOT_FOUND"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rows_that_do_not_fit_are_refused_here_without_their_values(server, protocol):
    with client_of(server, protocol) as client:
        with pytest.raises(ValueError, match="not_int64:age in row 4 of the batch") as caught:
            client.score(ROWS.set_column(2, "age", pa.array(["1", "2", "3", "secret", "5"])))
        assert "secret" not in str(caught.value)
        with pytest.raises(ValueError, match="Missing: price"):
            client.score(ROWS.drop_columns("price"))


def test_a_model_that_does_not_tell_its_rows_is_refused(tmp_path):
    from tiny_servables import save_tiny  # Its predict_raw takes lists of numbers.

    save_tiny(tmp_path, "tiny", 1)
    with LocalServer(tmp_path) as server, client_of(server, "grpc", model="tiny") as client:
        assert "serving_default" in client.metadata()
        with pytest.raises(ValueError, match=r"Received: others, or none, of tiny\. Export the model"):
            client.score(ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1, "label": "stable"}, "Received: version 1 and label stable"),
        ({"max_attempts": 6}, r"in \[1, 5\]. Received: 6"),
        ({"timeout_seconds": 0}, "above 0. Received: 0"),
        ({"address": "http://localhost:8501"}, "host:port. Received: http://"),
        ({"address": "localhost"}, "host:port. Received: localhost"),
    ],
)
def test_endpoints_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"address": "localhost:1", "model_name": "feed", **change})


# --- Retries and deadlines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_starts_late_is_waited_for(servable_dir, protocol):
    port = free_port()
    examples = encode_raw_rows(typed_rows(ROWS, RAW_INPUTS), RAW_INPUTS) * 2000  # More than gRPC repeats by default.
    late = LocalServer(servable_dir, **{f"{protocol}_port": port})
    with client_of(f"127.0.0.1:{port}", protocol, max_attempts=1) as client, pytest.raises(ServingError):
        client.score_examples(examples)
    start = threading.Timer(0.3, late.start)
    start.start()
    try:
        with client_of(f"127.0.0.1:{port}", protocol, max_attempts=5) as client:
            np.testing.assert_allclose(client.score_examples(examples), 0.02 * np.array(SUMS * 2000), rtol=1e-6)
    finally:
        start.join()
        late.request_stop()
        late.join()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_that_a_full_server_refuses_are_repeated(servable_dir, protocol):
    slow = pa.concat_tables([ROWS.slice(0, 1).set_column(1, "user", pa.array(["slow"]))] * 6)
    options = BatchingOptions(max_batch_size=1, max_enqueued_batches=1)
    with LocalServer(servable_dir, batching=options, num_threads=1) as full:
        with (
            client_of(full, protocol, batch_size=1, concurrency=6, max_attempts=1) as client,
            pytest.raises(ServingError, match=r"RESOURCE_EXHAUSTED|UNAVAILABLE"),
        ):
            client.score(slow)
        with client_of(full, protocol, batch_size=1, concurrency=6, max_attempts=5) as client:
            np.testing.assert_allclose(client.score(slow), np.full(6, 0.02 * 36.5), rtol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_never_answers_costs_the_deadline_and_no_more(protocol):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with (
            client_of(f"127.0.0.1:{silent.getsockname()[1]}", protocol, timeout_seconds=0.3) as client,
            pytest.raises(ServingError) as caught,
        ):
            client.status()
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert 0.25 < time.monotonic() - start < 1.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_attempts_share_one_deadline(protocol):
    start = time.monotonic()  # Five attempts alone would wait for more than a second.
    with (
        client_of(f"127.0.0.1:{free_port()}", protocol, timeout_seconds=0.4, max_attempts=5) as client,
        pytest.raises(ServingError) as caught,
    ):
        client.status()
    assert caught.value.code in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
    assert time.monotonic() - start < 0.8


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nobody_there_is_unavailable_with_a_hint_at_the_ports(protocol):
    with (
        client_of(f"127.0.0.1:{free_port()}", protocol, max_attempts=1) as client,
        pytest.raises(ServingError, match=r"Received: UNAVAILABLE, .*gRPC: 8500, REST: 8501"),
    ):
        client.status()


@pytest.mark.parametrize("answer", ["HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{", "HTTP/1.1 200 OK\r\nX-A: "])
def test_a_server_that_sends_byte_after_byte_costs_the_deadline_and_no_more(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener, dripping(listener, answer.encode()):
        start = time.monotonic()
        with (
            client_of(f"127.0.0.1:{listener.getsockname()[1]}", "rest", timeout_seconds=0.3) as client,
            pytest.raises(ServingError) as caught,
        ):
            client.status()
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert 0.25 < time.monotonic() - start < 1.0


@contextlib.contextmanager
def dripping(listener, answer):
    """Answers one request with ``answer`` and then a byte every 20 ms, for two seconds."""

    def drip():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # The client goes away.
            connection.sendall(answer)
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.02)

    thread = threading.Thread(target=drip)
    thread.start()
    yield
    thread.join()


def test_a_body_that_is_too_long_is_refused_once(servable_dir):
    with (
        LocalServer(servable_dir, max_request_bytes=500) as strict,
        client_of(strict, "rest", batch_size=5, max_attempts=5) as client,
    ):
        (request,) = client.requests(ROWS)
        assert client.score_examples(request[:1]) == pytest.approx([0.69])
        start = time.monotonic()
        with pytest.raises(ServingError, match=r"Received: RESOURCE_EXHAUSTED, HTTP status 413, "):
            client.score_examples(request)
        assert time.monotonic() - start < 0.5  # Four more attempts would take longer.


def test_an_error_inside_the_server_is_internal():
    answer = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_server(("127.0.0.1", 0)) as listener, dripping(listener, answer):
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            client_of(where, "rest") as client,
            pytest.raises(ServingError, match="Received: INTERNAL, HTTP status 500"),
        ):
            client.status()


def test_an_output_of_another_name_is_not_taken_for_the_ctr(server):
    with client_of(server, "rest") as client:  # Where a single output comes without its name.
        (request,) = client.requests(ROWS.slice(0, 2))
        with pytest.raises(ValueError, match=r"must answer ctr for each of 2. Received: score of 2\. Is the model"):
            client._predict("single", "examples", request, "ctr")


def test_the_other_protocol_is_named_as_such(server):
    hint = r"does it speak this protocol on that port \(gRPC: 8500, REST: 8501\)"
    for address, protocol in ((server.grpc_address, "rest"), (server.rest_address, "grpc")):
        with client_of(address, protocol, max_attempts=1) as client, pytest.raises(ServingError, match=hint):
            client.status()


# --- Comparison and load ---------------------------------------------------------------------------------------------


def test_two_versions_are_compared_on_the_same_rows(server):
    with client_of(server, "grpc", version=1) as one, client_of(server, "rest", label="canary") as other:
        found = compare((one, other), [ROWS.slice(0, 3), ROWS.slice(3)]).to_dict()
    assert found["rows"] == 5
    assert found["max_difference"] == pytest.approx(0.345, rel=1e-5)  # The second is twice the first.
    assert found["mean_difference"] == pytest.approx(0.01 * sum(SUMS) / 5, rel=1e-5)
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["mean_ctr"] == pytest.approx([0.189, 0.378], rel=1e-5)
    assert [sorted(entry) for entry in found["latency_ms"]] == [["max", "p50", "p90", "p99"]] * 2
    assert all(entry["p50"] <= entry["p90"] <= entry["p99"] <= entry["max"] for entry in found["latency_ms"])


def test_equal_scores_have_no_rank_correlation(server):
    with client_of(server, "grpc", version=1) as one, client_of(server, "grpc", version=2) as other:
        found = compare((one, other), [pa.concat_tables([ROWS.slice(0, 1)] * 4)]).to_dict()
        assert found["rank_correlation"] is None
        with pytest.raises(ValueError, match="must be rows to compare"):
            compare((one, other), [])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_load_counts_every_answer(server, protocol):
    with client_of(server, protocol, max_attempts=1) as client, client_of(server, protocol, version=9) as wrong:
        requests = client.requests(ROWS)
        client.score_examples(requests[0])  # A model's first call is slow.
        good = generate_load(client.score_examples, requests, concurrency=2, duration_seconds=0.3)
        bad = generate_load(wrong.score_examples, requests, concurrency=2, duration_seconds=0.1)
    assert set(good.codes) == {"OK"}
    assert good.codes["OK"] == len(good.latencies_ms) > 5
    assert good.requests_per_second == pytest.approx(good.codes["OK"] / good.seconds)
    assert set(bad.codes) == {"NOT_FOUND"}
    assert bad.to_dict()["latency_ms"] == {"p50": None, "p90": None, "p99": None, "max": None}


def test_a_rate_sets_the_moments_and_waiting_for_a_sender_counts():
    sent = []

    def send(request):
        sent.append(request)
        time.sleep(0.05)

    even = generate_load(send, ["a", "b"], concurrency=4, duration_seconds=0.5, rate_per_second=20)
    assert even.codes == {"OK": 10}
    assert (sent.count("a"), sent.count("b"), even.unsent) == (5, 5, 0)
    assert even.latencies_ms.max() < 100
    # One sender is done every 50 ms, but 40 are due a second: of 20 it sends 10, the last one 225 ms late.
    stalled = generate_load(send, ["a"], concurrency=1, duration_seconds=0.5, rate_per_second=40)
    assert 8 <= stalled.codes["OK"] == 20 - stalled.unsent <= 10
    assert stalled.latencies_ms.max() > 200
    assert stalled.seconds < 0.6
    assert stalled.to_dict()["unsent"] == stalled.unsent


# --- The command -----------------------------------------------------------------------------------------------------


def run_commands(*commands):
    """Runs all at once -> (status, output, errors) of each."""
    done = [finish() for finish in [start_command("export.client", *command) for command in commands]]
    return [(process.returncode, process.stdout, process.stderr) for process in done]


def test_the_command_shows_scores_and_errors(server, tmp_path):
    pa.parquet.write_table(ROWS, tmp_path / "rows.parquet")
    where = ["--model=feed", f"--server={server.grpc_address}"]
    rows = f"--input={tmp_path / 'rows.parquet'}"
    compared, refused = run_commands(
        ["compare", *where, rows, "--label=stable", "--other_label=canary", f"--json={tmp_path / 'found.json'}"],
        ["score", *where, "--version=9", rows, f"--output={tmp_path / 'scores.csv'}"],
    )
    assert compared[0] == 0, compared
    assert json.loads((tmp_path / "found.json").read_text())["max_difference"] == pytest.approx(0.345, rel=1e-5)
    assert "max difference" in compared[1]
    assert refused[0] == 1
    assert refused[2].startswith("error: the request failed. Received: NOT_FOUND")
    assert not (tmp_path / "scores.csv").exists()
