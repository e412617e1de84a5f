"""Export profiles: what they accept, and that servables hold what they say."""

import json

import pytest
import tensorflow as tf
from tensorflow_serving.apis import input_pb2, prediction_log_pb2

from clsd_tf.spec.validation import SpecError
from clsd_tf.storage.files import read_json
from export.servable.batching_parameters import BATCHING_FILE, read_batching_parameters
from export.servable.profile import BatchingProfile, ExportProfile, load_profile, parse_profile
from export.servable.quantization import QuantizationError
from export.servable.saved_model import export_servable
from export.servable.warmup import WARMUP_FILE, write_warmup_requests

_SMALL = {
    "signatures": ["serving_default", "rank", "debug"],
    "warmup_batch_sizes": [1, 5],
    "batching": {"max_batch_size": 32, "allowed_batch_sizes": [8, 32], "num_batch_threads": 2},
    "quantisation": {"tables": "int8", "max_auc_loss": 0.02},
    "rank": {"top_k": 3},
    "calibration": False,
    "debug_user_groups": True,
}


@pytest.fixture(scope="module")
def small(feed_dataset, clsd_run, tmp_path_factory):
    """A servable of the profile above, calibration left out."""
    base = tmp_path_factory.mktemp("servables")
    return export_servable(feed_dataset, clsd_run.work_dir, base, "feed", version=1, profile=parse_profile(_SMALL, "t"))


def request(**features):
    example = tf.train.Example()
    for name, value in features.items():
        kind = example.features.feature[name]
        (kind.int64_list if isinstance(value, int) else kind.bytes_list).value.append(
            value if isinstance(value, int) else value.encode()
        )
    return example.SerializeToString()


def test_the_servable_has_the_signatures_of_the_profile(small):
    assert set(tf.saved_model.load(str(small.path)).signatures) == {"serving_default", "rank", "debug"}
    # Two batch sizes for each signature but debug.
    assert small.verification["warmup_records"] == 4


def test_without_calibration_ctr_is_the_sigmoid_of_the_logit(small):
    loaded = tf.saved_model.load(str(small.path))
    examples = tf.constant([request(user_id="u1", item_id="i1", age=age) for age in range(15, 65, 5)])
    ctr = loaded.signatures["serving_default"](examples=examples)["ctr"]
    logit = loaded.signatures["debug"](examples=examples)["logit"]
    tf.debugging.assert_near(ctr, tf.sigmoid(logit), rtol=0, atol=1e-6)


def test_debug_gives_the_labels_of_user_groups(small, feed_dataset):
    debug = tf.saved_model.load(str(small.path)).signatures["debug"]
    group = feed_dataset.inputs.groups[0]
    # Boundaries of the feed's age group: 18, 30, 45, 60.
    found = debug(examples=tf.constant([request(age=17), request(age=45), tf.train.Example().SerializeToString()]))
    assert found[group.name].numpy().tolist() == [group.labels[place].encode() for place in (1, 4, 0)]


def test_the_batching_file_is_the_profile(small):
    parameters = read_batching_parameters(small.path / BATCHING_FILE)
    assert (parameters.max_batch_size.value, parameters.num_batch_threads.value) == (32, 2)
    assert list(parameters.allowed_batch_sizes) == [8, 32]
    assert not parameters.HasField("max_enqueued_batches")
    assert not parameters.pad_variable_length_inputs


def test_the_manifest_says_what_quantization_cost(small, feed_dataset):
    found = read_json(small.path / "assets.extra" / "manifest.json")
    assert found["profile"] == json.loads(ExportProfile(**parse_profile(_SMALL, "t").__dict__).model_dump_json())
    cost = found["quantisation"]
    assert cost["tables"] == "int8"
    # Rows of 4 + 1 float32: 20 bytes; int8 and a float32 scale: 9.
    assert cost["bytes_before"] * 9 == cost["bytes_after"] * 20
    assert 0 < cost["max_ctr_difference"] < 0.02
    assert abs(cost["auc_before"] - cost["auc_after"]) < 0.02


def test_quantization_that_costs_more_than_allowed_publishes_nothing(feed_dataset, clsd_run, tmp_path, monkeypatch):
    # Whether AUC falls or rises by chance: a limit below zero cannot be declared, but stands for one that is passed.
    profile = ExportProfile(quantisation={"tables": "int8"})
    object.__setattr__(profile.quantisation, "max_auc_loss", -1.0)
    with pytest.raises(QuantizationError, match=r"at most -1 of AUC.*Received: 0\.\d+ before.*Allowed"):
        export_servable(feed_dataset, clsd_run.work_dir, tmp_path, "feed", version=1, profile=profile)
    assert not list(tmp_path.rglob("saved_model.pb"))


@pytest.mark.parametrize("name", ["compact", "ranking"])
def test_profiles_that_come_along_are_valid(name):
    assert "serving_default" in load_profile(name).signatures


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"signature": []}, "unknown key. Received: 'signature'. Allowed: batching, calibration"),
        ({"signatures": ["rank"]}, "must name serving_default.* Received: rank"),
        ({"signatures": ["serving_default", "serving_default"]}, "each other one once"),
        ({"batching": {"allowed_batch_sizes": [8, 4], "max_batch_size": 4}}, r"must rise and end.*\[8, 4\] and 4"),
        ({"batching": {"max_batch_size": 0}}, "greater than or equal to 1. Received: 0"),
        ({"quantisation": {"tables": "int4"}}, "'none', 'float16' or 'int8'. Received: 'int4'"),
        ({"rank": {"top_k": 0}}, "greater than or equal to 1"),
        ({"warmup_batch_sizes": [1] * 101}, "at most 100 items"),
        ({"warmup_batch_sizes": []}, "at least 1 item"),
    ],
)
def test_profiles_that_break_a_rule_are_refused(content, message):
    with pytest.raises(SpecError, match=message):
        parse_profile(content, "profile.yaml")


def test_a_profile_that_does_not_exist_is_refused():
    with pytest.raises(FileNotFoundError, match=r"or one of compact, ranking\. Received: nowhere\.yaml"):
        load_profile("nowhere.yaml")


def test_no_warmup_request_has_more_rows_than_a_batch(tmp_path):
    """TF Serving would refuse it, and with it the version; a request of rank is one row, whatever its items."""
    write_warmup_requests(
        tmp_path,
        "m",
        [request(item_id="i1")],
        {},
        signatures=["serving_default", "rank"],
        batch_sizes=[2, 9],
        max_batch_size=8,
    )
    file = tmp_path / WARMUP_FILE
    logs = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))
    ]
    requests = [log.predict_log.request for log in logs]
    rows = {"serving_default": [], "rank": []}
    for one in requests:
        rows[one.model_spec.signature_name] += [len(tensor.string_val) for tensor in one.inputs.values()]
    assert rows == {"serving_default": [2], "rank": [1, 1]}
    items = [input_pb2.ExampleListWithContext.FromString(one.inputs["requests"].string_val[0]) for one in requests[1:]]
    assert [len(one.examples) for one in items] == [2, 9]


def test_batching_files_by_hand(tmp_path):
    file = tmp_path / BATCHING_FILE
    file.write_text("max_batch_size { value: 128 }\nbatch_timeout_micros { value: 0 }\nmax_enqueued_batches {value: 3}")
    found = read_batching_parameters(file)
    assert (found.max_batch_size.value, found.max_enqueued_batches.value) == (128, 3)
    assert found.HasField("batch_timeout_micros")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: 128", "text proto. Received"),
        ("max_batch { value: 1 }", "text proto. Received"),
        ("allowed_batch_sizes: [4, 2]", "must rise"),
        ("max_batch_size { value: 0 }", "max_batch_size must be 1 or more. Received: 0"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros must be 0 or more. Received: -1"),
        ("max_enqueued_batches { }", "max_enqueued_batches must be 1 or more. Received: 0"),
        ("num_batch_threads { value: -2 }", "num_batch_threads must be 1 or more"),
        ("max_batch_size { value: 8 } allowed_batch_sizes: 4", r"Received: \[4\], not 8"),
        (
            "enable_large_batch_splitting { value: true } max_execution_batch_size { value: 4 } allowed_batch_sizes: 8",
            "not 4",
        ),
    ],
)
def test_batching_files_that_tf_serving_refuses(tmp_path, text, message):
    file = tmp_path / BATCHING_FILE
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_batching_parameters(file)


def test_batching_profile_defaults_leave_threads_to_the_server():
    assert BatchingProfile().num_batch_threads is None
