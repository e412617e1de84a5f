"""Ways to break the good servable: each names the rules of export.contract that it breaks."""

from __future__ import annotations

import dataclasses
import gzip
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from good_servable import (
    MANIFEST,
    UNPARSABLE,
    VERSION,
    WARMUP,
    classify_log,
    concrete,
    edit_graph,
    example,
    floats,
    multi_inference_log,
    predict_log,
    replace_example_model,
    replace_model,
    strings,
    write_manifest,
    write_warmup,
)
from tensorflow_serving.apis import prediction_log_pb2


@dataclasses.dataclass(frozen=True)
class Broken:
    """A way to break the good servable.

    Attributes:
      name: of the way.
      expected: rule that does not pass -> (status, pattern of what it finds).
      break_it: gets the base directory with the good version 7, returns the path to check, None for the base.
    """

    name: str
    expected: dict[str, tuple[str, str]]
    break_it: Callable[[pathlib.Path], pathlib.Path | None]


GALLERY: list[Broken] = []


def breaks(*, warnings: Sequence[str] = (), **patterns: str):
    """Adds a way to the gallery: the rules that it breaks, with a pattern of the message; some only warn."""

    def add(function):
        expected = {rule: ("warning" if rule in warnings else "fail", pattern) for rule, pattern in patterns.items()}
        GALLERY.append(Broken(function.__name__, expected, function))
        return function

    return add


# Names and places.


@breaks(has_versions=r"no child is named by an integer: the directory is empty")
def empty_base(base):
    shutil.rmtree(base / VERSION)


@breaks(has_versions=r"no child.*: v7", names_are_versions=r"v7 holds a saved_model.pb but is no integer")
def only_version_is_v7(base):
    (base / VERSION).rename(base / "v7")


@breaks(names_are_versions=r"0\.1 holds a saved_model.pb but is no integer")
def version_0_1_beside(base):
    shutil.copytree(base / VERSION, base / "0.1")


@breaks(names_are_versions=r"99999999999999999999 holds")
def version_beyond_int64(base):
    shutil.copytree(base / VERSION, base / "99999999999999999999")


@breaks(names_are_versions=r"8 is no directory")
def file_named_by_an_integer(base):
    (base / "8").write_text("")


@breaks(versions_are_distinct=r"007 and 7 are one version")
def two_spellings(base):
    shutil.copytree(base / VERSION, base / "007")


@breaks(no_leftovers_beside=r"\.8\.incomplete-1a2b")
def killed_publication(base):
    shutil.copytree(base / VERSION, base / ".8.incomplete-1a2b")


@breaks(no_leftovers_beside=r"\.6\.deleted-1a2b")
def killed_deletion(base):
    shutil.copytree(base / VERSION, base / ".6.deleted-1a2b")


@breaks(version_name=r"'v7' is no integer. Rename")
def given_version_is_v7(base):
    return (base / VERSION).rename(base / "v7")


@breaks(no_leftovers_inside=r"variables/variables\.data-00000-of-00001\.tempstate12")
def killed_checkpoint(base):
    (base / VERSION / "variables" / "variables.data-00000-of-00001.tempstate12").write_text("")


# Parts of the SavedModel.


@breaks(saved_model=r"saved_model.pb is no SavedModel")
def saved_model_is_text(base):
    (base / VERSION / "saved_model.pb").write_bytes(b"not a proto")


@breaks(saved_model=r"saved_model.pbtxt is no SavedModel")
def saved_model_is_another_text(base):
    (base / VERSION / "saved_model.pb").unlink()
    (base / VERSION / "saved_model.pbtxt").write_text("not a proto")


@breaks(saved_model=r"no file saved_model.pb")
def saved_model_is_missing(base):
    (base / VERSION / "saved_model.pb").unlink()


@breaks(saved_model=r"no graph tagged 'serve'.*\[\['train'\]\]")
def graph_of_another_tag(base):
    def change(graph):
        graph.meta_info_def.tags[:] = ["train"]

    edit_graph(base / VERSION, change)


@breaks(variables=r"weights.*: .*[Cc]hecksum", loads=r"[Cc]hecksum")
def flipped_bits_of_a_variable(base):
    path = base / VERSION / "variables" / "variables.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    place = content.index(np.float32([-1.0, 0.0, 1.0, 0.5]).tobytes())
    content[place] ^= 1
    path.write_bytes(content)


@breaks(variables=r"no variables\.data", loads=r"variables")
def missing_shard(base):
    (base / VERSION / "variables" / "variables.data-00000-of-00001").unlink()


@breaks(variables=r"variables\.index is missing", loads=r".")
def missing_variables(base):
    shutil.rmtree(base / VERSION / "variables")


@breaks(fingerprint=r"no FingerprintDef")
def fingerprint_is_text(base):
    (base / VERSION / "fingerprint.pb").write_bytes(b"not a proto")


@breaks(warnings=["fingerprint"], fingerprint=r"there is none")
def no_fingerprint(base):
    (base / VERSION / "fingerprint.pb").unlink()


@breaks(assets=r"users\.txt is missing", loads=r"users\.txt")
def missing_asset(base):
    shutil.rmtree(base / VERSION / "assets")


@breaks(assets=r"\.\./\.\./users\.txt points out of the directory")
def asset_outside_of_the_version(base):
    def change(graph):
        graph.asset_file_def[0].filename = "../../users.txt"

    shutil.copy(base / VERSION / "assets" / "users.txt", base / "users.txt")
    edit_graph(base / VERSION, change)


@breaks(loads=r"Placeholder|serving_default_examples|input")
def graph_without_its_placeholder(base):
    def change(graph):
        nodes = graph.graph_def.node
        nodes.remove(next(node for node in nodes if node.name == "serving_default_examples"))

    edit_graph(base / VERSION, change)


# Files.


@breaks(file_kinds=r"assets\.extra/card\.md is a link that leaves")
def link_out_of_the_version(base):
    (base / "card.md").write_text("card")
    (base / VERSION / "assets.extra" / "card.md").symlink_to(base / "card.md")


@breaks(file_kinds=r"notes is a broken link")
def broken_link(base):
    (base / VERSION / "notes").symlink_to("nowhere")


@breaks(file_kinds=r"variables/variables\.data-00000-of-00001 is neither file nor directory")
def pipe_as_a_shard(base):
    path = base / VERSION / "variables" / "variables.data-00000-of-00001"
    path.unlink()
    os.mkfifo(path)


@breaks(permissions=r"not readable: assets\.extra/card\.md")
def unreadable_file(base):
    path = base / VERSION / "assets.extra" / "card.md"
    path.write_text("card")
    path.chmod(0)


@breaks(warnings=["permissions"], permissions=r"as the owner.* of assets\.extra/card\.md")
def file_for_its_owner_only(base):
    path = base / VERSION / "assets.extra" / "card.md"
    path.write_text("card")
    path.chmod(0o600)


@breaks(manifest_files=r"batching_params\.pbtxt has .* bytes, the manifest says")
def changed_after_the_manifest(base):
    write_manifest(base / VERSION)
    with (base / VERSION / "batching_params.pbtxt").open("a") as file:
        file.write("\n")


@breaks(
    manifest_files=r"missing: assets/users.txt; not in the manifest: assets/people.txt", assets="users", loads="users"
)
def renamed_after_the_manifest(base):
    write_manifest(base / VERSION)
    (base / VERSION / "assets" / "users.txt").rename(base / VERSION / "assets" / "people.txt")


@breaks(manifest_files=r"the manifest cannot be read: JSONDecodeError")
def manifest_is_cut_off(base):
    (base / VERSION / MANIFEST).write_text('{"files": {')


@breaks(manifest_files=r"the manifest lists no files")
def manifest_without_files(base):
    (base / VERSION / MANIFEST).write_text("{}")


# Signatures.


@breaks(
    serving_default=r"found: classify, other, predict_raw, regress", warmup_signatures=r"serving_default does not exist"
)
def no_default_signature(base):
    def change(graph):
        graph.signature_def["other"].CopyFrom(graph.signature_def["serving_default"])
        del graph.signature_def["serving_default"]

    edit_graph(base / VERSION, change)


@breaks(tensor_names=r"odd, input b64")
def input_named_as_the_mark_of_base64(base):
    def change(graph):
        odd, default = graph.signature_def["odd"], graph.signature_def["serving_default"]
        odd.CopyFrom(default)
        odd.inputs["b64"].CopyFrom(default.inputs["examples"])
        del odd.inputs["examples"]

    edit_graph(base / VERSION, change)


@breaks(tensor_names=r"odd has no input; odd has no output")
def empty_signature(base):
    def change(graph):
        graph.signature_def["odd"].method_name = "tensorflow/serving/predict"

    edit_graph(base / VERSION, change)


@breaks(tensor_dtypes=r"odd, output table is DT_RESOURCE")
def table_as_an_output(base):
    def change(graph):
        odd = graph.signature_def["odd"]
        odd.CopyFrom(graph.signature_def["serving_default"])
        table = next(node for node in graph.graph_def.node if node.op == "HashTableV2")
        info = odd.outputs["table"]
        info.name, info.dtype = f"{table.name}:0", tf.resource.as_datatype_enum
        info.tensor_shape.unknown_rank = True

    edit_graph(base / VERSION, change)


@breaks(warnings=["tensor_dtypes"], tensor_dtypes=r"gRPC only.*output half is float16")
def half_precision_output(base):
    half = concrete(lambda price: {"half": tf.cast(price, tf.float16)}, price=floats("price"))
    replace_model(base / VERSION, {"serving_default": half})


@breaks(batch_dimension=r"serving_default, output mean is a scalar")
def scalar_output(base):
    mean = concrete(lambda price: {"mean": tf.reduce_mean(price)}, price=floats("price"))
    replace_model(base / VERSION, {"serving_default": mean})


@breaks(batch_dimension=r"serving_default, input price has exactly 1 rows; serving_default, output twice has exactly 1")
def batch_of_one_only(base):
    twice = concrete(lambda price: {"twice": 2 * price}, price=tf.TensorSpec([1], tf.float32, "price"))
    replace_model(base / VERSION, {"serving_default": twice})


@breaks(classify_signature=r"classify has outputs classes, logit, scores. Allowed: scores, classes or both")
def third_output_of_classify(base):
    def change(graph):
        outputs = graph.signature_def["classify"].outputs
        outputs["logit"].CopyFrom(outputs["scores"])

    edit_graph(base / VERSION, change)


@breaks(classify_signature=r"classify has outputs ctr. Allowed: scores, classes or both")
def classify_without_scores(base):
    function = concrete(lambda inputs: {"ctr": tf.ones([tf.shape(inputs)[0], 2])}, inputs=strings("inputs"))
    replace_model(base / VERSION, {"serving_default": function, "classify": function})


@breaks(classify_signature=r"another number of scores than of classes: \[2, 3\]", api_answers=r"differ in shape")
def three_classes_and_two_scores(base):
    def serve(inputs):
        num_rows = tf.shape(inputs)[0]
        return {"scores": tf.ones([num_rows, 2]), "classes": tf.fill([num_rows, 3], "class")}

    function = concrete(serve, inputs=strings("inputs"))
    replace_model(base / VERSION, {"serving_default": function, "classify": function})


@breaks(classify_signature=r"classify has inputs examples. Allowed: inputs alone")
def classify_of_examples(base):
    function = concrete(lambda examples: {"scores": tf.ones([tf.shape(examples)[0], 2])}, examples=strings("examples"))
    replace_model(base / VERSION, {"serving_default": function, "classify": function})


@breaks(
    classify_signature=r"scores is float64. Allowed: float32; classify, output scores has 1 dimensions",
    api_answers="shape",
)
def scores_of_another_type_and_rank(base):
    function = concrete(
        lambda inputs: {"scores": tf.cast(tf.strings.length(inputs), tf.float64)}, inputs=strings("inputs")
    )
    replace_model(base / VERSION, {"serving_default": function, "classify": function})


@breaks(regress_signature=r"regress has outputs ctr. Allowed: outputs alone")
def regress_without_outputs(base):
    function = concrete(lambda inputs: {"ctr": tf.ones([tf.shape(inputs)[0]])}, inputs=strings("inputs"))
    replace_model(base / VERSION, {"serving_default": function, "regress": function})


@breaks(
    regress_signature=r"output outputs has 2 values per row. Allowed: one", api_answers=r"outputs has shape \[2, 2\]"
)
def two_values_per_regression(base):
    function = concrete(lambda inputs: {"outputs": tf.ones([tf.shape(inputs)[0], 2])}, inputs=strings("inputs"))
    replace_model(base / VERSION, {"serving_default": function, "regress": function})


@breaks(warnings=["method_names"], method_names=r"regress has no method name. Allowed: tensorflow/serving/predict")
def no_method_name(base):
    def change(graph):
        graph.signature_def["regress"].method_name = ""

    edit_graph(base / VERSION, change)


# Behaviour.


@breaks(batch_sizes=r"batch of 0: mean has shape \[1\]; .*batch of 64: mean has shape \[1\]")
def one_row_for_the_whole_batch(base):
    mean = concrete(
        lambda price: {"mean": tf.ensure_shape(tf.math.reduce_mean(price, 0, keepdims=True), [None])},
        price=floats("price"),
    )
    replace_model(base / VERSION, {"serving_default": mean})
    edit_graph(base / VERSION, _open_first_dimension)


def _open_first_dimension(graph) -> None:
    for info in graph.signature_def["serving_default"].outputs.values():
        info.tensor_shape.dim[0].size = -1


@breaks(batch_sizes=r"serving_default: batch of 0: InvalidArgumentError")
def no_answer_for_an_empty_batch(base):
    function = concrete(lambda price: {"change": price - price[0]}, price=floats("price"))
    replace_model(base / VERSION, {"serving_default": function})


@breaks(empty_example=r"serving_default: ratio is not finite")
def nan_without_any_feature(base):
    spec = {"seen": tf.io.VarLenFeature(tf.int64), "clicked": tf.io.VarLenFeature(tf.int64)}

    def outputs(parsed):
        seen, clicked = (
            tf.cast(tf.sparse.reduce_sum(tf.sparse.map_values(tf.ones_like, parsed[name]), 1), tf.float32)
            for name in ("seen", "clicked")
        )
        return {"ratio": clicked / (seen + clicked)}

    replace_example_model(base / VERSION, spec, outputs)


@breaks(missing_features=r"without ids: InvalidArgumentError.*; .*without weights: InvalidArgumentError")
def two_lists_that_must_be_equally_long(base):
    spec = {"ids": tf.io.RaggedFeature(tf.int64), "weights": tf.io.RaggedFeature(tf.float32)}
    replace_example_model(
        base / VERSION,
        spec,
        lambda parsed: {"sum": tf.reduce_sum(tf.cast(parsed["ids"], tf.float32) * parsed["weights"], axis=1)},
    )


@breaks(missing_features=r"without age: .*age", empty_example=r"an empty Example: .*age")
def feature_without_a_default(base):
    spec = {"age": tf.io.FixedLenFeature([], tf.float32), "height": tf.io.FixedLenFeature([2], tf.float32, [0.0, 0.0])}
    replace_example_model(base / VERSION, spec, lambda parsed: {"sum": parsed["age"] + parsed["height"][:, 1]})


@breaks(unknown_values=r"serving_default: unknown values: .*indices.* is not in")
def table_without_a_place_for_unknown_ids(base):
    ids = tf.lookup.KeyValueTensorInitializer(["", "ann"], tf.constant([0, 1], tf.int64))
    table, weights = tf.lookup.StaticHashTable(ids, -1), tf.Variable([0.1, 0.2])
    spec = {"user": tf.io.FixedLenFeature([], tf.string, "")}
    replace_example_model(
        base / VERSION,
        spec,
        lambda parsed: {"ctr": tf.gather(weights, table.lookup(parsed["user"]))},
        table=table,
        weights=weights,
    )


@breaks(unknown_values=r"serving_default: unknown values: .*indices.* is not in")
def embedding_of_raw_integers(base):
    weights = tf.Variable([0.1, 0.2])
    function = concrete(lambda user: {"ctr": tf.gather(weights, user)}, user=tf.TensorSpec([None], tf.int64, "user"))
    replace_model(base / VERSION, {"serving_default": function}, weights=weights)


@breaks(api_answers=r"classify: scores and classes differ in shape: \[2, 2\], \[2, 3\]")
def open_shapes_hide_a_third_class(base):
    def serve(inputs):
        num_rows = tf.shape(inputs)[0]
        return {"scores": tf.ones([num_rows, 2]), "classes": tf.fill([num_rows, 3], "class")}

    def change(graph):
        for info in graph.signature_def["classify"].outputs.values():
            info.tensor_shape.dim[1].size = -1

    function = concrete(serve, inputs=strings("inputs"))
    replace_model(base / VERSION, {"serving_default": function, "classify": function})
    edit_graph(base / VERSION, change)


@breaks(json_answers=r"serving_default: output code: JSON holds text in UTF-8.*or name the output code_bytes")
def bytes_as_text(base):
    codes = concrete(lambda price: {"code": tf.fill(tf.shape(price), tf.constant(b"\xff"))}, price=floats("price"))
    replace_model(base / VERSION, {"serving_default": codes})


@breaks(json_answers=r"serving_default: logarithm is not finite")
def infinite_answer(base):
    function = concrete(lambda price: {"logarithm": tf.math.log(0 * price)}, price=floats("price"))
    replace_model(base / VERSION, {"serving_default": function})


@breaks(
    tensor_names=r"serving_default, input b64", json_requests=r"serving_default: instances: b64 is read as something"
)
def text_that_is_taken_for_base64(base):
    lengths = concrete(lambda b64: {"length": tf.strings.length(b64)}, b64=strings("b64"))
    replace_model(base / VERSION, {"serving_default": lengths})
    write_warmup(base / VERSION, [predict_log("", b64=[b"anne"])])


@breaks(json_requests=r"serving_default: instances: guess differs between two equal requests")
def random_answer(base):
    function = concrete(lambda price: {"guess": tf.random.uniform(tf.shape(price))}, price=floats("price"))
    replace_model(base / VERSION, {"serving_default": function})


# Warm-up.


@breaks(warmup_file=r"compressed with gzip")
def compressed_warmup(base):
    path = base / VERSION / WARMUP
    path.write_bytes(gzip.compress(path.read_bytes()))


@breaks(warmup_file=r"no TFRecord file")
def warmup_is_cut_off(base):
    path = base / VERSION / WARMUP
    path.write_bytes(path.read_bytes()[:-3])


@breaks(warmup_file=r"record 2 is no PredictionLog")
def warmup_record_is_text(base):
    write_warmup(base / VERSION, [classify_log("classify"), b"not a proto"])


@breaks(warmup_file=r"more than 1,000 records")
def too_many_warmup_records(base):
    write_warmup(base / VERSION, [classify_log("classify")] * 1001)


@breaks(warmup_kinds=r"record 1 is session_run_log; record 2 is predict_streamed_log; record 3 is empty")
def warmup_kinds_that_are_not_replayed(base):
    run, streamed = prediction_log_pb2.PredictionLog(), prediction_log_pb2.PredictionLog()
    run.session_run_log.request.target.append("x")
    streamed.predict_streamed_log.request.add()
    write_warmup(base / VERSION, [run.SerializeToString(), streamed.SerializeToString(), b"", classify_log("classify")])


@breaks(warmup_signatures=r"record 2: signature rank does not exist")
def warmup_of_another_signature(base):
    write_warmup(base / VERSION, [classify_log("classify"), predict_log("rank", requests=[b""])])


@breaks(warmup_signatures=r"record 1: serving_default needs the input examples; record 1: .* has no input inputs")
def warmup_of_another_input(base):
    write_warmup(base / VERSION, [predict_log("", inputs=[example()])])


@breaks(warmup_signatures=r"record 1: predict_raw, input price is int64")
def warmup_of_another_type(base):
    write_warmup(base / VERSION, [predict_log("predict_raw", user=[b"ann"], price=[1], history=[[b""]])])


@breaks(warmup_signatures=r"record 1: MultiInference needs one input tensor, the signatures have 2")
def multi_inference_over_two_inputs(base):
    tasks = [("classify", "tensorflow/serving/classify"), ("regress", "tensorflow/serving/regress")]
    write_warmup(base / VERSION, [multi_inference_log(*tasks)])


@breaks(warmup_signatures=r"record 1: MultiInference knows no method 'tensorflow/serving/predict'")
def multi_inference_of_predict(base):
    write_warmup(base / VERSION, [multi_inference_log(("classify", "tensorflow/serving/predict"))])


@breaks(warmup_signatures=r"record 1: it has no Examples")
def warmup_without_examples(base):
    write_warmup(base / VERSION, [classify_log("classify", num_examples=0)])


@breaks(warmup_replay=r"record 2 \(serving_default\): InvalidArgumentError at node ParseExample")
def warmup_example_that_does_not_parse(base):
    write_warmup(base / VERSION, [predict_log("", examples=[example()]), predict_log("", examples=[UNPARSABLE])])


@breaks(warmup_batches=r"record 2 \(classify\) has 5 rows. Allowed: 4")
def warmup_larger_than_a_batch(base):
    write_warmup(base / VERSION, [classify_log("classify", 4), classify_log("classify", 5)])


@breaks(warmup_batches=r"record 1 \(classify\) has 5 rows. Allowed: 4")
def warmup_larger_than_a_batch_that_may_be_split(base):
    write_warmup(base / VERSION, [classify_log("classify", 5)])
    (base / VERSION / "batching_params.pbtxt").write_text(
        "max_batch_size { value: 4 } enable_large_batch_splitting { value: true } max_execution_batch_size { value: 2 }"
    )


# Batching.


@breaks(batching_file=r"batching_params\.pbtxt must be a .*no field named .max_batch.")
def batching_file_of_unknown_fields(base):
    (base / VERSION / "batching_params.pbtxt").write_text("max_batch { value: 4 }")


@breaks(batching_file=r"batching_params\.pbtxt must be a BatchingParameters")
def batching_number_without_value(base):
    (base / VERSION / "batching_params.pbtxt").write_text("max_batch_size: 4")


@breaks(batching_sizes=r"must be the largest batch. Received: \[1, 4\], not 8")
def last_allowed_size_is_not_the_largest(base):
    (base / VERSION / "batching_params.pbtxt").write_text("max_batch_size { value: 8 } allowed_batch_sizes: [1, 4]")


@breaks(batching_sizes=r"must rise.*\[4, 1, 8\]")
def allowed_sizes_fall(base):
    (base / VERSION / "batching_params.pbtxt").write_text("max_batch_size { value: 8 } allowed_batch_sizes: [4, 1, 8]")


@breaks(warnings=["batching_padding"], batching_padding=r"it pads predict_raw, input history")
def padding_of_histories(base):
    (base / VERSION / "batching_params.pbtxt").write_text("pad_variable_length_inputs: true")
