"""A good tiny servable with everything that the contract looks at, and what it is made of."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from export.publishing.manifest import file_entries

VERSION = "7"
WARMUP = pathlib.PurePosixPath("assets.extra/tf_serving_warmup_requests")
UNPARSABLE = b"\x0a\x7fsecret user"  # A field of 127 bytes, of which 11 are there.
MANIFEST = pathlib.PurePosixPath("assets.extra/manifest.json")


class Shop(tf.Module):
    """ctr of a user (from a vocabulary file), a price and a number of clicks."""

    def __init__(self, vocabulary: pathlib.Path):
        super().__init__()
        ids = tf.lookup.TextFileInitializer(
            str(vocabulary),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self.table = tf.lookup.StaticVocabularyTable(ids, num_oov_buckets=1)
        self.weights = tf.Variable([-1.0, 0.0, 1.0, 0.5])

    def ctr(self, user: tf.Tensor, price: tf.Tensor, num_clicks: tf.Tensor) -> tf.Tensor:
        weight = tf.gather(self.weights, self.table.lookup(user))
        return tf.sigmoid(weight - 0.01 * price + 0.1 * tf.cast(num_clicks, tf.float32))

    def ctr_of_examples(self, examples: tf.Tensor) -> tf.Tensor:
        parsed = tf.io.parse_example(
            examples,
            {
                "user": tf.io.RaggedFeature(tf.string),
                "price": tf.io.FixedLenFeature([], tf.float32, 0.0),
                "clicks": tf.io.VarLenFeature(tf.int64),
            },
        )
        user = parsed["user"][:, :1].to_tensor("", shape=[None, 1])[:, 0]
        return self.ctr(
            user, parsed["price"], tf.sparse.reduce_sum(tf.sparse.map_values(tf.ones_like, parsed["clicks"]), 1)
        )


def concrete(function: Callable, **specs: tf.TensorSpec):
    return tf.function(function, autograph=False).get_concrete_function(**specs)


def strings(name: str, *later: int | None) -> tf.TensorSpec:
    return tf.TensorSpec([None, *later], tf.string, name)


def floats(name: str, *later: int | None) -> tf.TensorSpec:
    return tf.TensorSpec([None, *later], tf.float32, name)


def write_good_servable(base: pathlib.Path) -> None:
    """base/7 with four signatures, a vocabulary, warm-up requests and a batching file."""
    vocabulary = base.parent / "users.txt"
    vocabulary.write_text("ann\nbob\neve\n")
    shop = Shop(vocabulary)

    def serve(examples):
        return {"ctr": shop.ctr_of_examples(examples)}

    def serve_raw(user, price, history):
        return {"ctr": shop.ctr(user, price, tf.reduce_sum(tf.strings.length(history), axis=1))}

    def classify(inputs):
        ctr = shop.ctr_of_examples(inputs)
        classes = tf.tile(tf.constant([["no_click", "click"]]), [tf.shape(ctr)[0], 1])
        return {"classes": classes, "scores": tf.stack([1 - ctr, ctr], axis=1)}

    version = base / VERSION
    tf.saved_model.save(
        shop,
        str(version),
        signatures={
            "serving_default": concrete(serve, examples=strings("examples")),
            "predict_raw": concrete(
                serve_raw, user=strings("user"), price=floats("price"), history=strings("history", None)
            ),
            "classify": concrete(classify, inputs=strings("inputs")),
            "regress": concrete(lambda inputs: {"outputs": shop.ctr_of_examples(inputs)}, inputs=strings("inputs")),
        },
    )  # fmt: skip
    write_warmup(
        version, [predict_log("serving_default", examples=[example(user="ann"), example()]), classify_log("classify")]
    )
    (version / "batching_params.pbtxt").write_text("max_batch_size { value: 4 } allowed_batch_sizes: [1, 4]")


def example(**features: str) -> bytes:
    message = tf.train.Example()
    for name, value in features.items():
        message.features.feature[name].bytes_list.value.append(value.encode())
    return message.SerializeToString()


def predict_log(signature: str, **inputs: Sequence) -> bytes:
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.signature_name = signature
    for name, values in inputs.items():
        array = np.array(values, object) if isinstance(values[0], bytes) else np.array(values)
        log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return log.SerializeToString()


def classify_log(signature: str, num_examples: int = 1) -> bytes:
    log = prediction_log_pb2.PredictionLog()
    log.classify_log.request.model_spec.signature_name = signature
    examples = [tf.train.Example.FromString(example(user="bob"))] * num_examples
    log.classify_log.request.input.example_list.examples.extend(examples)
    return log.SerializeToString()


def multi_inference_log(*tasks: tuple[str, str]) -> bytes:
    log = prediction_log_pb2.PredictionLog()
    for signature, method in tasks:
        task = log.multi_inference_log.request.tasks.add(method_name=method)
        task.model_spec.signature_name = signature
    log.multi_inference_log.request.input.example_list.examples.add()
    return log.SerializeToString()


def write_warmup(version: pathlib.Path, records: Sequence[bytes]) -> None:
    path = version / WARMUP
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def write_manifest(version: pathlib.Path) -> None:
    (version / MANIFEST).write_text(json.dumps({"files": file_entries(version)}))


def edit_graph(version: pathlib.Path, change: Callable) -> None:
    """Rewrites saved_model.pb after ``change(meta_graph)``."""
    path = version / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    change(saved_model.meta_graphs[0])
    path.write_bytes(saved_model.SerializeToString())


def replace_model(version: pathlib.Path, signatures: dict[str, Callable], **tracked) -> None:
    """Puts another model into the place of the good one, without its warm-up and batching files."""
    shutil.rmtree(version)
    module = tf.Module()
    for name, value in tracked.items():
        setattr(module, name, value)
    tf.saved_model.save(module, str(version), signatures=signatures)


def replace_example_model(version: pathlib.Path, spec: dict, outputs: Callable, **tracked) -> None:
    """A model whose serving_default gives ``outputs`` of the features parsed by ``spec``."""

    def serve(examples):
        return outputs(tf.io.parse_example(examples, spec))

    replace_model(version, {"serving_default": concrete(serve, examples=strings("examples"))}, **tracked)
