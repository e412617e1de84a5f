"""The contract checker: every rule fails for a servable that breaks it, and for no other."""

import json
import pathlib
import re
import shutil

import pytest
import tensorflow as tf
from broken_servables import GALLERY
from commands import run_command
from good_servable import (
    UNPARSABLE,
    VERSION,
    concrete,
    predict_log,
    replace_model,
    strings,
    write_good_servable,
    write_warmup,
)
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2

from clsd_tf.storage.files import staged_directory
from export.contract_rules import RULES, check_servable, failures
from export.contract_rules.graph import Feature, string_use
from export.contract_rules.version import Version

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    base = tmp_path_factory.mktemp("good") / "shop"
    write_good_servable(base)
    return base


def status_of(results):
    return {result.rule.id: (result.finding.status, result.finding.found) for result in results}


@pytest.fixture(scope="module")
def good_results(good):
    return check_servable(good)


def test_a_good_servable_passes_every_rule_that_applies(good_results):
    others = {rule: found for rule, (status, found) in status_of(good_results).items() if status != "pass"}
    assert others == {"manifest_files": "there is no assets.extra/manifest.json"}
    assert {result.rule.id for result in good_results} == {rule.id for rule in RULES}


def test_an_export_that_is_running_is_told_without_a_failure(good, tmp_path):
    base = tmp_path / "shop"
    shutil.copytree(good, base)
    with staged_directory(base / "8") as staging:
        found = status_of(check_servable(base))
    assert found["no_leftovers_beside"] == ("warning", f"another process is writing {staging.name}")


def test_a_saved_model_as_text_is_read_like_any_other(good, tmp_path):
    base = tmp_path / "shop"
    shutil.copytree(good, base)
    path = base / VERSION / "saved_model.pb"
    text = text_format.MessageToString(saved_model_pb2.SavedModel.FromString(path.read_bytes()))
    path.unlink()
    path.with_suffix(".pbtxt").write_text(text)
    for subject in (base, base / VERSION):
        found = status_of(check_servable(subject))
        assert {rule for rule, (status, _) in found.items() if status != "pass"} == {"manifest_files"}
    (base / VERSION).rename(base / "v7")
    assert "v7 holds a saved_model.pbtxt" in status_of(check_servable(base))["names_are_versions"][1]


def test_a_vocabulary_table_is_no_variable(tmp_path):
    """A TF 1 SavedModel without variables has no directory for them."""
    path = tmp_path / "1"
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        user = tf.compat.v1.placeholder(tf.string, [None], "user")
        ids = tf.lookup.KeyValueTensorInitializer(["ann", "bob"], tf.constant([1, 2], tf.int64))
        table = tf.lookup.StaticHashTable(ids, 0)
        tf.compat.v1.saved_model.simple_save(
            session, str(path), {"user": user}, {"id": table.lookup(user)}, tf.compat.v1.tables_initializer()
        )
    shutil.rmtree(path / "variables", ignore_errors=True)
    found = status_of(check_servable(path))
    assert found["variables"] == ("not applicable", "the graph has no variables")
    assert (found["loads"][0], found["unknown_values"][0]) == ("pass", "pass")


@pytest.mark.parametrize("broken", GALLERY, ids=lambda broken: broken.name)
def test_a_broken_servable_breaks_the_rules_it_names_and_no_other(good, tmp_path, broken):
    base = tmp_path / "shop"
    shutil.copytree(good, base)
    results = check_servable(broken.break_it(base) or base)
    found = {rule: entry for rule, entry in status_of(results).items() if entry[0] in ("fail", "warning")}
    assert {rule: status for rule, (status, _) in found.items()} == {
        rule: status for rule, (status, _) in broken.expected.items()
    }, found
    for rule, (_, pattern) in broken.expected.items():
        assert re.search(pattern, found[rule][1], re.DOTALL), found[rule][1]


def test_every_rule_has_a_broken_servable_and_says_why():
    assert {rule.id for rule in RULES} == {rule for broken in GALLERY for rule in broken.expected}
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.title
        assert len(rule.why) > 20, rule.id


def test_no_recorded_value_is_told(good, tmp_path):
    base = tmp_path / "shop"
    shutil.copytree(good, base)
    write_warmup(base / VERSION, [predict_log("", examples=[UNPARSABLE])])
    results = check_servable(base)
    assert {"warmup_replay", "batch_sizes"} <= {result.rule.id for result in failures(results)}
    assert "secret" not in json.dumps([result.to_dict() for result in results])


def test_features_of_examples_are_found_in_the_graph(good):
    version = Version(good / VERSION)
    features = {"user": Feature(tf.string, 1), "price": Feature(tf.float32, 1), "clicks": Feature(tf.int64, 1)}
    for name in ("serving_default", "classify", "regress"):
        assert string_use(version.meta_graph, version.signatures[name]).features == features
    assert string_use(version.meta_graph, version.signatures["predict_raw"]).features is None


def test_a_tf1_saved_model_is_checked_like_any_other(tmp_path):
    """Placeholders and the first ParseExample in the main graph, Classify and Regress by their method names."""
    path = tmp_path / "1"
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        serialized = tf.compat.v1.placeholder(tf.string, [None], "serialized")
        sparse_indices, sparse_values, _, dense = tf.raw_ops.ParseExample(
            serialized=serialized,
            names=tf.constant([], tf.string),
            sparse_keys=["tags"],
            dense_keys=["sizes"],
            dense_defaults=[tf.constant([0.0, 0.0])],
            sparse_types=[tf.string],
            dense_shapes=[[2]],
        )
        weight = tf.compat.v1.get_variable("weight", initializer=0.5)
        num_tags = tf.math.unsorted_segment_sum(
            tf.strings.length(sparse_values[0]), sparse_indices[0][:, 0], tf.shape(serialized)[0]
        )
        value = weight * dense[0][:, 1] + tf.cast(num_tags, tf.float32)
        session.run(tf.compat.v1.global_variables_initializer())
        build = tf.compat.v1.saved_model.build_signature_def
        info = tf.compat.v1.saved_model.build_tensor_info
        builder = tf.compat.v1.saved_model.Builder(str(path))
        signature = build({"inputs": info(serialized)}, {"outputs": info(value)}, "tensorflow/serving/regress")
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature})
        builder.save()
    version = Version(path)
    features = {"tags": Feature(tf.string, 1), "sizes": Feature(tf.float32, 2)}
    assert string_use(version.meta_graph, version.signatures["serving_default"]).features == features
    found = status_of(check_servable(path))
    assert not {rule: entry for rule, entry in found.items() if entry[0] == "fail"}
    for rule in ("regress_signature", "missing_features", "unknown_values", "batch_sizes", "api_answers"):
        assert found[rule][0] == "pass", rule


def test_strings_of_an_unknown_form_are_taken_from_the_warmup_file(tmp_path):
    version = tmp_path / "1"
    version.mkdir()
    numbers = concrete(lambda text: {"number": tf.strings.to_number(text)}, text=strings("text"))
    replace_model(version, {"serving_default": numbers})
    status, reason = status_of(check_servable(version))["batch_sizes"]
    assert status == "not applicable"
    assert "StringToNumber, and the warm-up file has no request" in reason
    write_warmup(version, [predict_log("serving_default", text=[b"1.5", b"2", b"3"])])
    found = status_of(check_servable(version))
    assert found["batch_sizes"] == ("pass", "serving_default. Largest: 3 (the warm-up file)")
    assert found["json_requests"][0] == "pass"
    assert found["unknown_values"][0] == "not applicable"


def test_the_largest_batch_is_that_of_the_given_batching_file(good, tmp_path):
    parameters = tmp_path / "parameters.pbtxt"
    parameters.write_text("max_batch_size { value: 5 }")
    found = status_of(check_servable(good / VERSION, parameters))
    assert found["batch_sizes"][1].endswith("Largest: 5 (the batching file)")
    parameters.write_text("max_batch_size { value: 1000000000 }")
    found = status_of(check_servable(good / VERSION, parameters))
    assert found["batch_sizes"][1].endswith("Largest: 4,096 (instead of 1,000,000,000 of the batching file)")


def test_paths_that_are_no_directory_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a servable is a readable directory. Received: .*nowhere"):
        check_servable(tmp_path / "nowhere")


def test_the_command_prints_each_rule_and_fails_if_one_fails(good, tmp_path):
    broken = tmp_path / "shop"
    shutil.copytree(good, broken)
    (broken / VERSION / "fingerprint.pb").write_bytes(b"[red]not a proto[/]")
    runs = [
        run_command("export.contract", good, f"--json={tmp_path / 'good.json'}"),
        run_command("export.contract", broken),
    ]
    passing, failing = (run.stdout for run in runs)
    assert [run.returncode for run in runs] == [0, 1]
    for rule in RULES:
        assert f"{rule.title} ({rule.id}): " in passing
        assert rule.why in passing
    assert "fail           fingerprint.pb identifies the model (fingerprint): no FingerprintDef" in failing
    assert failing.endswith(f"{len(RULES) - 2} pass, 0 warning, 1 fail, 1 not applicable\n")
    stored = json.loads((tmp_path / "good.json").read_text())
    assert stored["summary"] == {"pass": len(RULES) - 1, "warning": 0, "fail": 0, "not applicable": 1}
    assert [entry["rule"] for entry in stored["results"]] == [rule.id for rule in RULES]
    assert stored["results"][0].keys() == {"version", "rule", "title", "status", "found", "why"}
