"""Servables: signatures, verification, publication and embedded scoring, on real SavedModels."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2

from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.layers.calibration import Calibration
from clsd_tf.serving.servable import LocalServable
from clsd_tf.storage.files import read_json
from clsd_tf.training.assembly import load_model, predict
from export.clients.file_scoring import score_file
from export.contract_rules import check_servable
from export.contract_rules.graph import string_use
from export.contract_rules.version import Version
from export.publishing.manifest import check_files
from export.publishing.models_config import ModelsConfig
from export.servable import saved_model
from export.servable.saved_model import ExportError, export_servable


@pytest.fixture(scope="module")
def run(clsd_run):
    """The work directory of a run that is calibrated in each age group."""
    return clsd_run.work_dir


@pytest.fixture(scope="module")
def published(feed_dataset, run, tmp_path_factory):
    return export_servable(feed_dataset, run, tmp_path_factory.mktemp("servables"), "feed", version=7)


@pytest.fixture(scope="module")
def signatures(published):
    loaded = tf.saved_model.load(str(published.path))
    return {"loaded": loaded, **loaded.signatures}


@pytest.fixture(scope="module")
def sample(feed_dataset):
    return pa.parquet.read_table(feed_dataset.layout.serving_sample)


def example(**features):
    message = tf.train.Example()
    for name, values in features.items():
        entry = message.features.feature[name]
        if isinstance(values[0], str):
            entry.bytes_list.value.extend(value.encode() for value in values)
        elif isinstance(values[0], int):
            entry.int64_list.value.extend(values)
        else:
            entry.float_list.value.extend(values)
    return message.SerializeToString()


def test_raw_values_through_the_servable_equal_records_through_the_model(feed_dataset, run, published, sample):
    ctr = predict(load_model(run, feed_dataset), feed_dataset, "test")
    by_row = dict(zip(read_columns(feed_dataset, "test", ["row_id"])["row_id"].tolist(), ctr, strict=True))
    expected = np.array([by_row[row_id] for row_id in sample.column("row_id").to_pylist()])
    received = LocalServable(published.path).score(sample)
    assert len(received) == feed_dataset.num_rows("test")
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


def test_the_servable_calibrates_and_its_debug_outputs_do_not(feed_dataset, run, published, signatures, sample):
    requests = [
        example(user_id=[row["user_id"]], item_id=[row["item_id"]], **({"age": [age]} if age is not None else {}))
        for row, age in zip(sample.slice(0, 60).to_pylist(), [*range(10, 69), None], strict=True)
    ]
    ctr = signatures["serving_default"](examples=tf.constant(requests))["ctr"].numpy()
    debug = signatures["debug"](examples=tf.constant(requests))
    logits = debug["logit"].numpy().astype(np.float64)
    # Boundaries 18, 30, 45, 60; id 0 is an unknown age.
    age_groups = np.array([1 + sum(age >= edge for edge in (18, 30, 45, 60)) for age in range(10, 69)] + [0])
    stored = read_json(run.calibration)
    assert len({(curve["slope"], curve["intercept"]) for curve in stored["group_curves"]}) >= 5
    np.testing.assert_allclose(ctr, Calibration.from_dict(stored).apply(logits, age_groups), rtol=0, atol=1e-6)
    np.testing.assert_allclose(debug["teacher_score"], 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-6)
    assert np.abs(ctr - debug["teacher_score"].numpy()).max() > 0.01


def test_verification_in_a_fresh_process_covers_every_signature(published, feed_dataset):
    differences = published.verification["max_difference"]
    assert set(differences) == {
        "serving_default/ctr", "predict_raw/ctr", "classify/ctr", "regress/ctr", "rank/ctr",
        "debug/logit", "debug/teacher_score", "debug/ad_gate_correction",
    }  # fmt: skip
    assert max(differences.values()) <= 1e-6
    # Edge rows: unknown ids, each of 9 raw inputs missing, all missing; each with absent and with empty features.
    assert published.verification["rows"] == feed_dataset.num_rows("test") + 22


def test_signatures_have_the_names_types_and_shapes_that_tf_serving_accepts(signatures):
    default, classify, regress = signatures["serving_default"], signatures["classify"], signatures["regress"]
    assert default.structured_input_signature[1] == {"examples": tf.TensorSpec([None], tf.string, "examples")}
    assert list(default.structured_outputs) == ["ctr"]
    assert default.structured_outputs["ctr"].shape.as_list() == [None]
    for signature in (classify, regress):
        assert signature.structured_input_signature[1] == {"inputs": tf.TensorSpec([None], tf.string, "inputs")}
    assert {name: spec.dtype for name, spec in classify.structured_outputs.items()} == {
        "classes": tf.string, "scores": tf.float32,
    }  # fmt: skip
    found = classify(inputs=tf.constant([example(user_id=["u1"])] * 3))
    assert found["scores"].shape == found["classes"].shape == [3, 2]
    np.testing.assert_allclose(tf.reduce_sum(found["scores"], axis=1), 1.0, rtol=1e-6)
    assert found["classes"].numpy().tolist() == [[b"no_click", b"click"]] * 3
    assert list(regress.structured_outputs) == ["outputs"]
    assert regress(inputs=tf.constant([example(user_id=["u1"])] * 3))["outputs"].shape == [3, 1]
    raw = signatures["predict_raw"].structured_input_signature[1]
    assert raw["age"] == tf.TensorSpec([None], tf.int64, "age")
    assert raw["duration_seconds"] == tf.TensorSpec([None], tf.float32, "duration_seconds")
    assert raw["recent_items"] == tf.TensorSpec([None, None], tf.string, "recent_items")


def test_unknown_missing_empty_and_single_requests_all_answer(signatures):
    requests = {
        "unknown id": example(user_id=["nobody"], item_id=["nothing"], recent_items=["never", "seen"]),
        "missing features": example(user_id=["u1"]),
        "nothing at all": tf.train.Example().SerializeToString(),
        "empty history": example(user_id=["u1"], item_id=["i1"], age=[30], gender=["F"]),
        "long history": example(user_id=["u1"], recent_items=[f"i{n}" for n in range(100)]),
    }
    for name, request in requests.items():
        ctr = signatures["serving_default"](examples=tf.constant([request]))["ctr"].numpy()
        assert ctr.shape == (1,), name
        assert 0 < ctr[0] < 1, name
    assert signatures["serving_default"](examples=tf.constant([], tf.string))["ctr"].shape == [0]


def test_a_row_scores_the_same_alone_and_in_a_batch(signatures, sample):
    requests = [
        example(user_id=[row["user_id"]], item_id=[row["item_id"]], age=[row["age"]])
        for row in sample.slice(0, 20).to_pylist()
    ]
    together = signatures["serving_default"](examples=tf.constant(requests))["ctr"].numpy()
    alone = [signatures["serving_default"](examples=tf.constant([request]))["ctr"].numpy()[0] for request in requests]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


def test_the_servable_holds_no_training_state(published):
    names = [name for name, _ in tf.train.list_variables(str(published.path / "variables" / "variables"))]
    assert not [name for name in names if "optimizer" in name.lower() or "total" in name]


def test_warmup_requests_are_uncompressed_prediction_logs_of_every_kind(published):
    path = published.path / "assets.extra" / "tf_serving_warmup_requests"
    logs = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(path))
    ]
    assert len(logs) == published.verification["warmup_records"] <= 1000
    assert {log.WhichOneof("log_type") for log in logs} == {"predict_log", "classify_log", "regress_log"}
    predictions = [log.predict_log.request for log in logs if log.HasField("predict_log")]
    assert {request.model_spec.name for request in predictions} == {"feed"}
    assert {request.model_spec.signature_name for request in predictions} == {"serving_default", "predict_raw", "rank"}


def test_warmup_requests_name_no_user(published, sample):
    content = (published.path / "assets.extra" / "tf_serving_warmup_requests").read_bytes()
    items = {item_id.encode() for item_id in sample.column("item_id").slice(0, 64).to_pylist()}
    users = {user_id.encode() for user_id in sample.column("user_id").slice(0, 64).to_pylist()}
    assert all(item in content for item in items)
    assert not [user for user in users if user in content]


def test_the_version_directory_is_an_integer_beside_its_history(published):
    assert published.path.name == "7"
    assert sorted(child.name for child in published.path.parent.iterdir()) == ["7", "history.jsonl"]
    assert (published.path / "fingerprint.pb").exists()


def test_the_manifest_names_inputs_private_ones_and_every_file(feed_dataset, published):
    manifest = read_json(published.path / "assets.extra" / "manifest.json")
    assert (manifest["model_name"], manifest["version"]) == ("feed", 7)
    assert manifest["dataset_fingerprint"] == feed_dataset.fingerprint
    assert {"name": "recent_items", "dtype": "string", "is_list": True} in manifest["raw_inputs"]
    assert {"name": "age", "dtype": "int64", "is_list": False} in manifest["raw_inputs"]
    assert manifest["private_inputs"] == ["user_id"]
    extra = ("tf_serving_warmup_requests", "model_card.md", "model_card.json")
    assert {"saved_model.pb", *(f"assets.extra/{name}" for name in extra)} < set(manifest["files"])
    assert check_files(published.path, manifest) == []


@pytest.mark.long
def test_models_config_parses_and_keeps_other_models_and_where_the_server_finds_them(feed_dataset, run, published):
    base = published.path.parent.parent
    config = ModelsConfig(base / "models.config")
    config.set_model("other", "/srv/")
    config.write()
    export_servable(feed_dataset, run, base, "other", version=1)
    config = text_format.Parse((base / "models.config").read_text(), model_server_config_pb2.ModelServerConfig())
    entries = {entry.name: entry.base_path for entry in config.model_config_list.config}
    assert entries == {"feed": "/models/feed", "other": "/srv/other"}


def test_a_published_version_is_never_rewritten(feed_dataset, run, published):
    before = (published.path / "saved_model.pb").read_bytes()
    with pytest.raises(FileExistsError, match=r"must not exist yet. Received: .*feed/7"):
        export_servable(feed_dataset, run, published.path.parent.parent, "feed", version=7)
    assert (published.path / "saved_model.pb").read_bytes() == before


@pytest.mark.parametrize(("name", "version"), [("../up", 1), ("", 1), ("feed", 0), ("a/b", 1)])
def test_names_and_versions_that_are_not_one_path_component_are_refused(feed_dataset, run, tmp_path, name, version):
    with pytest.raises(ValueError, match="Received"):
        export_servable(feed_dataset, run, tmp_path, name, version=version)
    assert list(tmp_path.iterdir()) == []


def test_a_servable_that_disagrees_with_the_model_is_not_published(feed_dataset, run, tmp_path, monkeypatch):
    honest = saved_model.verification_sample

    def shifted(*arguments):
        table = honest(*arguments)
        moved = pa.array(table.column("_expected_ctr").to_numpy() + np.float32(2e-6))
        return table.set_column(table.column_names.index("_expected_ctr"), "_expected_ctr", moved)

    monkeypatch.setattr(saved_model, "verification_sample", shifted)
    with pytest.raises(ExportError, match=r"not published.*Received: .*instead of"):
        export_servable(feed_dataset, run, tmp_path, "feed", version=1)
    assert list((tmp_path / "feed").iterdir()) == []
    assert not (tmp_path / "models.config").exists()


def test_a_broken_warmup_record_is_found_by_the_verifier(published, tmp_path):
    broken = tmp_path / "8"
    shutil.copytree(published.path, broken)
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.signature_name = "serving_default"
    log.predict_log.request.inputs["wrong_name"].CopyFrom(tf.make_tensor_proto(["x"]))
    with tf.io.TFRecordWriter(str(broken / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())
    rows = pa.table({"_example": [b""], "_expected_ctr": np.zeros(1, np.float32)})
    pa.parquet.write_table(rows, tmp_path / "sample.parquet")
    command = [sys.executable, "-m", "export.verify", f"--servable={broken}", f"--sample={tmp_path / 'sample.parquet'}"]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_file_format_gets_the_same_scores(published, sample, tmp_path, suffix):
    servable = LocalServable(published.path.parent)  # The model's directory: takes its newest version.
    source = tmp_path / f"rows{suffix}"
    rows = sample.slice(0, 200)
    if suffix == ".parquet":
        pa.parquet.write_table(rows, source)
    elif suffix == ".jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
    else:
        position = rows.column_names.index("recent_items")
        joined = pa.compute.binary_join(rows.column("recent_items"), "|")
        pa.csv.write_csv(rows.set_column(position, "recent_items", joined), source)
    output = tmp_path / f"scores{suffix}"
    assert score_file(servable, source, output) == 200
    if suffix == ".parquet":
        received = pa.parquet.read_table(output).column("ctr").to_numpy()
    elif suffix == ".jsonl":
        received = np.array([json.loads(line)["ctr"] for line in output.read_text().splitlines()])
    else:
        received = pa.csv.read_csv(output).column("ctr").to_numpy()
    np.testing.assert_allclose(received, servable.score(rows), rtol=0, atol=1e-6)


def test_scoring_errors_name_what_was_received_and_lose_nothing(published, sample, tmp_path):
    servable = LocalServable(published.path)
    with pytest.raises(ValueError, match=r"Received: row_id.*Missing: age"):
        servable.score(sample.drop_columns(["age"]))
    source = tmp_path / "rows.csv"
    source.write_text("user_id,age\nu1,old\n")
    with pytest.raises(ValueError, match=r"rows need a column per raw input. Received: user_id, age"):
        score_file(servable, source, tmp_path / "scores.csv")
    with pytest.raises(ValueError, match=r"files end in .*Received: .*rows\.txt"):
        score_file(servable, tmp_path / "rows.txt", tmp_path / "scores.csv")
    with pytest.raises(FileExistsError, match="Received"):
        score_file(servable, source, source)
    assert [child.name for child in tmp_path.iterdir()] == ["rows.csv"]
    with pytest.raises(FileNotFoundError, match=r"saved_model\.pb"):
        LocalServable(tmp_path)


def test_values_that_do_not_fit_are_refused_by_row_and_without_the_value(published, sample):
    rows = sample.slice(0, 3).set_column(sample.column_names.index("age"), "age", pa.array(["30", "private", ""]))
    with pytest.raises(ValueError, match=r"Received: not_int64:age in row 2 of the batch, 1 row") as caught:
        LocalServable(published.path).score(rows)
    assert "private" not in str(caught.value)


def test_scoring_reads_columns_by_the_rules_of_the_build(published, sample):
    servable = LocalServable(published.path)
    rows = sample.slice(0, 50)
    as_text = rows.set_column(rows.column_names.index("age"), "age", rows.column("age").cast(pa.string()))
    np.testing.assert_array_equal(servable.score(as_text), servable.score(rows))
    as_float = rows.set_column(rows.column_names.index("age"), "age", rows.column("age").cast(pa.float64()))
    np.testing.assert_array_equal(servable.score(as_float), servable.score(rows))
    half = rows.set_column(rows.column_names.index("age"), "age", pa.array([49.5] * 50))
    with pytest.raises(ValueError, match="not_int64:age"):
        servable.score(half)


def test_na_is_text_in_csv_and_a_short_row_is_refused_without_its_values(published, sample, tmp_path):
    servable = LocalServable(published.path)
    names = [entry.name for entry in servable.raw_inputs]
    # device NA is out of vocabulary (id 1), an empty device is missing (id 0): other embeddings, other scores.
    line = {"user_id": "u1", "item_id": "i1", "age": "30", "gender": "F", "category": "news", "tags": "live",
            "duration_seconds": "10", "recent_items": "i2|i3"}  # fmt: skip
    source = tmp_path / "rows.csv"
    rows = [",".join({**line, "device": device}[name] for name in names) for device in ("NA", "never seen", "")]
    source.write_text("\n".join([",".join(names), *rows]) + "\n")
    score_file(servable, source, tmp_path / "scores.csv")
    na, unseen, empty = pa.csv.read_csv(tmp_path / "scores.csv").column("ctr").to_pylist()
    assert na == unseen != empty
    source.write_text("\n".join([",".join(names), rows[0], "secret-user"]) + "\n")
    with pytest.raises(ValueError, match=r"another number in row\(s\) 3") as caught:
        score_file(servable, source, tmp_path / "again.csv")
    assert "secret-user" not in str(caught.value)
    assert not (tmp_path / "again.csv").exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_scoring_ignores_bytes_that_are_not_utf8_in_columns_it_does_not_read(published, tmp_path, suffix):
    servable = LocalServable(published.path)
    names = [entry.name for entry in servable.raw_inputs]
    source = tmp_path / "rows.csv"
    source.write_bytes(",".join([*names, "note"]).encode() + b"\n" + b"," * len(names) + b"caf\xe9\n")
    assert score_file(servable, source, tmp_path / f"scores{suffix}") == 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("late", ["csv", "jsonl"])
def test_a_column_may_look_different_far_down_the_file(published, tmp_path, suffix, late):
    servable = LocalServable(published.path)
    names = [entry.name for entry in servable.raw_inputs]
    source = tmp_path / f"rows.{late}"
    if late == "csv":  # Batches of Arrow's CSV reader have a megabyte.
        note = b"x" * 300
        lines = [b"," * len(names) + note] * 4000 + [b"," * len(names) + b"caf\xe9"]
        source.write_bytes(b"\n".join([",".join([*names, "note"]).encode(), *lines]) + b"\n")
    else:
        row = dict.fromkeys(names)
        source.write_text("".join(json.dumps({**row, "note": note}) + "\n" for note in [*[5] * 4096, "five"]))
    num_rows = score_file(servable, source, tmp_path / f"scores{suffix}")
    assert num_rows == (4001 if late == "csv" else 4097)


def test_a_feature_that_is_there_but_empty_is_a_missing_one(signatures):
    empty = tf.train.Example()
    empty.features.feature["age"].int64_list.SetInParent()
    empty.features.feature["user_id"].bytes_list.value.append(b"u1")
    absent = tf.constant([example(user_id=["u1"])])
    received = signatures["serving_default"](examples=tf.constant([empty.SerializeToString()]))["ctr"]
    np.testing.assert_array_equal(received, signatures["serving_default"](examples=absent)["ctr"])


def test_the_servable_names_no_path_of_the_machine_that_built_it(published, feed_dataset):
    assert str(feed_dataset.path).encode() not in (published.path / "saved_model.pb").read_bytes()


def test_the_servable_keeps_the_contract_of_tf_serving(published, feed_dataset):
    results = check_servable(published.path.parent)
    assert [(result.rule.id, result.finding) for result in results if result.finding.status != "pass"] == []
    found = {result.rule.id: result.finding.found for result in results}
    for rule in ("batch_sizes", "unknown_values", "json_answers", "json_requests"):
        assert found[rule].startswith("classify, debug, predict_raw, rank, regress, serving_default"), rule
    for rule in ("empty_example", "missing_features"):
        assert found[rule].startswith("classify, debug, rank, regress, serving_default. Not checked: predict_raw"), rule
    # Requests with unknown and with missing values were made for every raw input.
    version = Version(published.path)
    for name in ("serving_default", "rank"):
        assert string_use(version.meta_graph, version.signatures[name]).features.keys() == {
            entry.name for entry in feed_dataset.spec.raw_inputs
        }
