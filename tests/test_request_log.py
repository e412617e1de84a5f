"""Served requests as rows: what a log holds, what it never holds, and that checks of data read it."""

import dataclasses
import json
import pathlib
import re
import time
import types

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf
from commands import run_command
from grpc_calls import wait_until
from tensorflow_serving.apis import classification_pb2, input_pb2, predict_pb2, prediction_service_pb2_grpc

from clsd_tf.data.examples import arrow_to_tensors, parse_raw_examples, raw_tensor_specs
from clsd_tf.data.request_files import LEFT_OUT, left_out_inputs, row_files
from clsd_tf.spec.model_inputs import MISSING_INT64, RawInput
from clsd_tf.statistics.data_checks import contrast
from clsd_tf.statistics.data_statistics import read_data_statistics
from clsd_tf.storage.files import read_json, write_json
from export.server.local_server import LocalServer
from export.server.request_log import RequestLog
from pipelines.validate_data import statistics_of_requests

ROOT = pathlib.Path(__file__).parent.parent
ROWS_PER_REQUEST = 50
PRIVATE = ["user_id", "income"]  # The second is no raw input: a sensitive column that requests may carry.


@pytest.fixture(scope="module")
def raw_inputs(feed_dataset):
    return feed_dataset.spec.raw_inputs


@pytest.fixture(scope="module")
def rows(feed_dataset):
    """Requests of users whose ids can be recognized."""
    found = pyarrow.parquet.read_table(feed_dataset.layout.serving_sample)
    users = pa.array([f"secret-{user}" for user in found.column("user_id").to_pylist()])
    return found.set_column(found.column_names.index("user_id"), "user_id", users)


@pytest.fixture(scope="module")
def servable_dir(raw_inputs, tmp_path_factory):
    """A servable with the signatures and raw inputs of the feed, whose ctr is always 0."""

    def concrete(function, **specs):
        return tf.function(function, autograph=False).get_concrete_function(**specs)

    def zeros(texts):
        parse_raw_examples(texts, raw_inputs)
        return tf.zeros([tf.shape(texts)[0]])

    strings = tf.TensorSpec([None], tf.string)
    module = tf.Module()
    signatures = {
        "serving_default": concrete(lambda examples: {"ctr": zeros(examples)}, examples=strings),
        "classify": concrete(lambda inputs: {"scores": zeros(inputs)[:, tf.newaxis]}, inputs=strings),
        "regress": concrete(lambda inputs: {"outputs": zeros(inputs)}, inputs=strings),
        "debug": concrete(lambda examples: {"logit": zeros(examples)}, examples=strings),
        "rank": concrete(lambda requests: {"ctr": tf.zeros([tf.shape(requests)[0], 1])}, requests=strings),
        "predict_raw": concrete(
            lambda **raw: {"ctr": tf.zeros([tf.shape(raw["age"])[0]])}, **raw_tensor_specs(raw_inputs)
        ),
    }
    path = tmp_path_factory.mktemp("servables") / "feed" / "7"
    tf.saved_model.save(module, str(path), signatures=signatures)
    manifest = {"raw_inputs": [dataclasses.asdict(entry) for entry in raw_inputs], "private_inputs": PRIVATE}
    (path / "assets.extra").mkdir()
    write_json(path / "assets.extra" / "manifest.json", manifest)
    return path.parents[1]


def example(record):
    """A tf.Example of the values that are known."""
    result = tf.train.Example()
    for name, value in record.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            feature = result.features.feature[name]
            if not values or isinstance(values[0], str):
                feature.bytes_list.value.extend(text.encode() for text in values)
            else:
                (feature.int64_list if isinstance(values[0], int) else feature.float_list).value.extend(values)
    return result


def predict_requests(signature, name, texts):
    return [
        request_of(signature, {name: np.array(texts[start : start + ROWS_PER_REQUEST], object)})
        for start in range(0, len(texts), ROWS_PER_REQUEST)
    ]


def request_of(signature, tensors):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "feed", signature
    for name, value in tensors.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def ranked(record):
    """A request for one item: what is the user's stands in the context."""
    context = {name: record[name] for name in ("user_id", "age", "gender", "device", "recent_items")}
    request = input_pb2.ExampleListWithContext(context=example(context))
    request.examples.append(example({name: value for name, value in record.items() if name not in context}))
    return request.SerializeToString()


def send(stub, signature, rows, raw_inputs):
    """Sends all rows to a signature, as clients of it do."""
    records = rows.select([entry.name for entry in raw_inputs]).to_pylist()
    examples = [example({**record, "income": "secret-income"}) for record in records]
    texts = [one.SerializeToString() for one in examples]
    if signature == "classify":
        request = classification_pb2.ClassificationRequest()
        request.model_spec.name, request.model_spec.signature_name = "feed", "classify"
        request.input.example_list.examples.extend(examples)
        stub.Classify(request, timeout=20)
    elif signature == "predict_raw":
        for start in range(0, rows.num_rows, ROWS_PER_REQUEST):
            tensors = arrow_to_tensors(rows.slice(start, ROWS_PER_REQUEST), raw_inputs)
            stub.Predict(request_of(signature, {name: value.numpy() for name, value in tensors.items()}), timeout=20)
    else:
        name, texts = ("requests", list(map(ranked, records))) if signature == "rank" else ("examples", texts)
        for request in predict_requests(signature, name, texts):
            stub.Predict(request, timeout=20)


def logged(servable_dir, log_dir, signature, rows, raw_inputs):
    """Sends rows through a server with a log; the log's directory."""
    with (
        RequestLog(log_dir) as log,
        LocalServer(servable_dir, request_log=log) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        send(prediction_service_pb2_grpc.PredictionServiceStub(channel), signature, rows, raw_inputs)
    assert log.dropped_requests == 0
    return log_dir / "feed"


@pytest.mark.parametrize("signature", ["serving_default", "predict_raw", "classify", "rank"])
def test_statistics_of_a_log_are_those_of_its_rows(signature, servable_dir, rows, raw_inputs, feed_dataset, tmp_path):
    log_dir = logged(servable_dir, tmp_path / "log", signature, rows, raw_inputs)
    public = rows.select([entry.name for entry in raw_inputs if entry.name != "user_id"])
    direct = public.replace_schema_metadata({LEFT_OUT: '["user_id"]'})
    pyarrow.parquet.write_table(direct, tmp_path / "direct.parquet")
    expected = statistics_of_requests(tmp_path / "direct.parquet", feed_dataset.spec).to_dict()
    assert statistics_of_requests(log_dir, feed_dataset.spec).to_dict() == expected
    assert "user_id" not in expected["columns"]
    assert expected["rows"][0] == rows.num_rows


@pytest.mark.parametrize("signature", ["serving_default", "predict_raw", "rank"])
def test_no_private_value_is_in_a_file(signature, servable_dir, rows, raw_inputs, tmp_path):
    log_dir = logged(servable_dir, tmp_path / "log", signature, rows, raw_inputs)
    files = row_files(log_dir)
    assert left_out_inputs(files) == {"user_id"}
    for file in files:
        assert set(pyarrow.parquet.read_schema(file).names) == {entry.name for entry in raw_inputs} - {"user_id"}
        table = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(table, tmp_path / "plain.parquet", compression="none", use_dictionary=False)
        for content in (file.read_bytes(), (tmp_path / "plain.parquet").read_bytes()):
            assert b"secret" not in content
            assert b"income" not in content


def test_planted_skew_in_the_documented_log_is_an_anomaly_and_what_is_left_out_is_none(
    servable_dir, rows, raw_inputs, feed_dataset, tmp_path
):
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (log_dir,) = re.findall(r"`--request_log_dir=(\S+)", guide)
    (documented,) = re.findall(r"^clsd validate-data (.*)$", guide, flags=re.MULTILINE)
    older = pa.array([None if age is None else age + 30 for age in rows.column("age").to_pylist()], pa.int64())
    skewed = rows.set_column(rows.column_names.index("age"), "age", older)
    logged(servable_dir, tmp_path / log_dir, "serving_default", skewed, raw_inputs)
    here = documented.replace("movielens_100k", "feed").replace("demo/dataset", str(feed_dataset.path)).split()
    done = run_command("pipelines.validate_data", *here, "--report_dir=report", cwd=tmp_path)
    assert done.returncode == 1
    assert "error:" not in done.stderr
    assert "served requests leave out user_id: not compared" in done.stdout
    report = read_json(tmp_path / "report" / "data_report.json")
    assert report["left_out"] == ["user_id"]
    found = {(entry["column"], entry["kind"]) for entry in report["anomalies"]["train → served"]}
    assert ("age", "mean_change") in found
    assert {column for column, _ in found} <= {"age", "recent_items"}
    assert "leave out user_id" in (tmp_path / "report" / "data_report.html").read_text(encoding="utf-8")


def test_the_same_users_as_in_training_make_no_skew(servable_dir, rows, raw_inputs, feed_dataset, tmp_path):
    log_dir = logged(servable_dir, tmp_path / "log", "serving_default", rows, raw_inputs)
    test = read_data_statistics(feed_dataset.layout.data_statistics)["test"]
    served = statistics_of_requests(log_dir, feed_dataset.spec)
    assert contrast("test", test, "served", served, feed_dataset.spec).anomalies == ()


# --- The log by itself ------------------------------------------------------------------------------------------------

INPUTS = [
    RawInput("user", "string"),
    RawInput("age", "int64"),
    RawInput("price", "float"),
    RawInput("recent", "string", True),
]
MANIFEST = {"raw_inputs": [dataclasses.asdict(entry) for entry in INPUTS], "private_inputs": ["user"]}


def version(manifest=MANIFEST, number=1):
    """What the log reads of a version."""
    return types.SimpleNamespace(model_name="m", version=number, manifest=manifest)


def request(ages, prices=None, recent=None, user=b"u"):
    return {
        "user": np.array([user] * len(ages), object),
        "age": np.array(ages, np.int64),
        "price": np.array(prices or [0.1] * len(ages), np.float32),
        "recent": np.array(recent or [[b"i"]] * len(ages), object).reshape(len(ages), -1),
    }


def written(directory, model="m"):
    return [row for file in row_files(directory / model) for row in pyarrow.parquet.read_table(file).to_pylist()]


def test_missing_values_are_null_histories_lists_and_odd_values_readable(tmp_path):
    with RequestLog(tmp_path) as log:
        ages = [MISSING_INT64, 2**62, 5]
        prices = [float("nan"), float("inf"), 0.1]
        log.record(version(), "predict_raw", request(ages, prices, [[b"", b""], [b"\xff", b""], [b"a", b"b"]]))
        log.record(version(), "predict_raw", request([6], recent=[[]]))
    assert written(tmp_path) == [
        {"age": None, "price": None, "recent": []},
        {"age": None, "price": None, "recent": ["�"]},
        {"age": 5, "price": 0.1, "recent": ["a", "b"]},
        {"age": 6, "price": 0.1, "recent": []},
    ]


def test_the_items_of_a_ranking_become_rows_with_their_user(tmp_path):
    lists = input_pb2.ExampleListWithContext(context=example({"user": "u", "age": 30, "recent": ["x"]}))
    lists.examples.extend([example({"price": 1.5}), example({"price": 2.5}), example({})])
    with RequestLog(tmp_path) as log:
        log.record(version(), "rank", {"requests": np.array([lists.SerializeToString()] * 2, object)})
    prices = [1.5, 2.5, None] * 2
    assert written(tmp_path) == [{"age": 30, "price": price, "recent": ["x"]} for price in prices]


def test_what_an_item_does_not_say_is_its_users(tmp_path):
    lists = input_pb2.ExampleListWithContext(context=example({"age": 30, "price": 9.0, "recent": ["x"]}))
    lists.examples.extend([example({"age": 31, "recent": ["y", "z"]}), example({"price": 1.0})])
    with RequestLog(tmp_path) as log:
        log.record(version(), "rank", {"requests": np.array([lists.SerializeToString()], object)})
    assert written(tmp_path) == [
        {"age": 31, "price": 9.0, "recent": ["y", "z"]},
        {"age": 30, "price": 1.0, "recent": ["x"]},
    ]


def test_a_user_is_not_copied_into_items_without_limit(tmp_path):
    many = input_pb2.ExampleListWithContext(context=example({"recent": ["x" * 100_000]}))
    many.examples.extend([example({})] * 10_000)  # A gigabyte.
    few = input_pb2.ExampleListWithContext(context=example({"age": 1}), examples=[example({})])
    with RequestLog(tmp_path) as log:
        for lists in (many, few):
            log.record(version(), "rank", {"requests": np.array([lists.SerializeToString()], object)})
    assert [row["age"] for row in written(tmp_path)] == [1]
    assert log.dropped_requests == 1


def test_items_of_a_ranking_count_as_rows(tmp_path):
    lists = input_pb2.ExampleListWithContext(examples=[example({"age": age}) for age in range(25)])
    with RequestLog(tmp_path, rows_per_file=20, flush_seconds=600.0) as log:
        log.record(version(), "rank", {"requests": np.array([lists.SerializeToString()], object)})
        wait_until(lambda: (tmp_path / "m").is_dir() and len(list((tmp_path / "m").glob("[!.]*"))) == 2)
    assert sorted(row["age"] for row in written(tmp_path)) == list(range(25))


def test_a_long_history_does_not_pad_thousands_of_others(tmp_path):
    texts = [example({"recent": ["x"] * 200_000}), *[example({"age": 1})] * 20_000]
    with RequestLog(tmp_path) as log:  # 4 * 10^9 cells otherwise.
        for start in range(0, len(texts), 1000):
            batch = [text.SerializeToString() for text in texts[start : start + 1000]]
            log.record(version(), "serving_default", {"examples": np.array(batch, object)})
    assert log.dropped_requests == 0
    assert sum(row["age"] == 1 for row in written(tmp_path)) == 20_000


@pytest.mark.parametrize("signature", ["debug", "other"])
def test_other_signatures_are_passed_over(tmp_path, signature):
    with RequestLog(tmp_path) as log:
        log.record(version(), signature, {"examples": np.array([b""], object)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {**MANIFEST, "private_inputs": None},
        {**MANIFEST, "private_inputs": [["user"]]},
        {**MANIFEST, "raw_inputs": [5]},
        {**MANIFEST, "raw_inputs": [{"name": "user"}]},
        {**MANIFEST, "raw_inputs": [{"name": "user", "dtype": "int32"}]},
        {**MANIFEST, "raw_inputs": [{"name": "user", "dtype": "string", "more": 1}]},
    ],
)
def test_a_broken_manifest_costs_the_log_and_no_request(tmp_path, manifest, caplog):
    with RequestLog(tmp_path) as log:
        for _ in range(2):
            log.record(version(manifest), "predict_raw", request([1]))
    assert list(tmp_path.iterdir()) == []
    assert caplog.text.count("is not logged: its manifest must list raw_inputs and private_inputs") == 1


def test_whatever_fails_in_the_log_does_not_end_it(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("user-4711")

    with RequestLog(tmp_path, rows_per_file=1) as log:
        with monkeypatch.context() as patched:
            patched.setattr(log, "_write_file", fails)
            log.record(version(), "predict_raw", request([1]))
            wait_until(lambda: log.dropped_requests == 1)
        log.record(version(), "predict_raw", request([2]))
    assert [row["age"] for row in written(tmp_path)] == [2]
    assert "requests could not be logged: RuntimeError" in caplog.text
    assert "4711" not in caplog.text


@pytest.mark.parametrize("manifest", [None, {}, {"raw_inputs": MANIFEST["raw_inputs"]}])
def test_models_that_do_not_say_what_is_private_are_not_logged(tmp_path, manifest):
    with RequestLog(tmp_path) as log:
        log.record(version(manifest), "predict_raw", request([1]))
    assert list(tmp_path.iterdir()) == []


def test_sampling_takes_whole_requests_and_is_repeatable(tmp_path):
    found = []
    for name in ("a", "b"):
        with RequestLog(tmp_path / name, sample_rate=0.3, seed=5) as log:
            for age in range(1000):
                log.record(version(), "predict_raw", request([age, age]))
        found.append([row["age"] for row in written(tmp_path / name)])
    assert found[0] == found[1]
    assert found[0][::2] == found[0][1::2]
    assert len(found[0]) / 2 == pytest.approx(300, abs=60)  # 4 standard deviations.


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan")])
def test_rates_outside_of_0_to_1_are_refused(tmp_path, rate):
    with pytest.raises(ValueError, match=r"in \(0, 1\]. Received"):
        RequestLog(tmp_path, sample_rate=rate)


def test_files_are_rotated_by_rows_and_apart_for_each_version(tmp_path):
    with RequestLog(tmp_path, rows_per_file=10) as log:
        for number in (1, 2):
            log.record(version(number=number), "predict_raw", request(list(range(25))))
    sizes = {}
    for file in row_files(tmp_path / "m"):
        sizes.setdefault(file.name.split("-")[0], []).append(pyarrow.parquet.read_metadata(file).num_rows)
    assert {number: sorted(found) for number, found in sizes.items()} == {"1": [5, 10, 10], "2": [5, 10, 10]}


def test_a_full_buffer_drops_and_counts(tmp_path):
    with RequestLog(tmp_path, max_buffer_bytes=5000) as log:
        with log._condition:  # The writer waits, so nothing leaves the buffer meanwhile.
            for _ in range(100):
                log.record(version(), "predict_raw", request(list(range(10))))
        assert log.dropped_requests > 50
    assert len(written(tmp_path)) == 10 * (100 - log.dropped_requests)


def test_waiting_requests_are_written_after_a_while(tmp_path):
    with RequestLog(tmp_path, flush_seconds=0.05) as log:
        log.record(version(), "predict_raw", request([7]))
        deadline = time.monotonic() + 10
        while not (tmp_path / "m").is_dir() or not list((tmp_path / "m").glob("[!.]*")):
            assert time.monotonic() < deadline
        assert [row["age"] for row in written(tmp_path)] == [7]


def test_a_request_that_cannot_be_decoded_costs_no_other(tmp_path):
    with RequestLog(tmp_path) as log:
        for age in (1, "of another type", 2):
            text = example({"age": age}).SerializeToString()
            log.record(version(), "serving_default", {"examples": np.array([text], object)})
    assert [row["age"] for row in written(tmp_path)] == [1, 2]
    assert log.dropped_requests == 1


def test_a_disk_that_fails_costs_requests_and_not_the_server(tmp_path):
    (tmp_path / "m").write_text("no directory")
    with RequestLog(tmp_path) as log:
        log.record(version(), "predict_raw", request([1]))
    assert log.dropped_requests == 1
    log.record(version(), "predict_raw", request([1]))  # Closed: passed over.


# --- Directories of rows ----------------------------------------------------------------------------------------------


def test_incomplete_and_other_files_are_no_rows_and_some_must_be_there(tmp_path):
    for name in (".1-a.parquet", ".2.parquet.incomplete", "note.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Received: .* with none$"):
        row_files(tmp_path)
    (tmp_path / "feed").mkdir()
    (tmp_path / "feed" / "c.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"with none\. Did you mean \S*/feed\?$"):
        row_files(tmp_path)
    (tmp_path / "b.csv").write_text("a\n1\n")
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert [file.name for file in row_files(tmp_path)] == ["a.jsonl", "b.csv"]
    assert row_files(tmp_path / "absent.csv") == [tmp_path / "absent.csv"]


def test_a_column_that_lacks_without_being_left_out_is_an_error(rows, feed_dataset, tmp_path):
    table = rows.drop_columns(["user_id", "device"]).replace_schema_metadata({LEFT_OUT: json.dumps(["user_id"])})
    pyarrow.parquet.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"log\.parquet, batch from row 1: .*Missing: device"):
        statistics_of_requests(tmp_path, feed_dataset.spec)


def test_user_groups_of_columns_that_are_left_out_are_not_counted(rows, feed_dataset, tmp_path):
    table = rows.drop_columns(["age"]).replace_schema_metadata({LEFT_OUT: json.dumps(["age"])})
    pyarrow.parquet.write_table(table, tmp_path / "log.parquet")
    found = statistics_of_requests(tmp_path, feed_dataset.spec)
    assert "age" not in found.columns
    assert {group for group, _ in found.segments} == {"", "gender_group"}
    test = read_data_statistics(feed_dataset.layout.data_statistics)["test"]
    assert contrast("test", test, "served", found, feed_dataset.spec).anomalies == ()
