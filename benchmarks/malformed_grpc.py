"""Requests over gRPC that a server must refuse, see ``malformed_requests``."""

from __future__ import annotations

import random
from collections.abc import Callable

import grpc
import tensorflow as tf
from google.protobuf.message import Message
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    inference_pb2,
    input_pb2,
    predict_pb2,
)

from benchmarks.malformed_requests import (
    EXAMPLES,
    HOSTILE_TEXTS,
    RANK,
    RAW,
    ROWS,
    Malformed,
    Target,
    broken_lists,
    good_tensors,
    input_of,
    no_example,
    wrong_kind,
)


def grpc_request(choose: random.Random, target: Target) -> Malformed:
    """A request over gRPC."""
    return choose.choice(_BREAKERS + (_RANK_BREAKERS if RANK in target.signatures else ()))(choose, target)


def _predict(choose: random.Random, target: Target, signature: str = RAW) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = target.model, signature
    for name, values in good_tensors(choose, target.signatures[signature]).items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
    return request


def _grpc(kind: str, request: Message, field: str, method: str = "Predict", **options) -> Malformed:
    return Malformed(kind, method, request.SerializeToString(), field, **options)


def _broken_message(choose: random.Random, target: Target) -> Malformed:
    method = choose.choice(["Predict", "Classify", "Regress"])
    # A tag without its value: whatever stands before it, no message ends so.
    return Malformed("broken message", method, _predict(choose, target).SerializeToString() + b"\x0a", "request")


def _inputs(choose: random.Random, target: Target) -> Malformed:
    request, name = _predict(choose, target), input_of(choose, target)
    if choose.random() < 0.5:
        del request.inputs[name]
        return _grpc("missing input", request, name)
    request.inputs["unknown"].CopyFrom(request.inputs[name])
    return _grpc("unknown input", request, "unknown")


def _dtype(choose: random.Random, target: Target) -> Malformed:
    request, name = _predict(choose, target), input_of(choose, target)
    wrong = [types_pb2.DT_DOUBLE, types_pb2.DT_COMPLEX64, types_pb2.DT_INVALID, types_pb2.DT_RESOURCE, 12345, -1]
    request.inputs[name].dtype = choose.choice(wrong)
    return _grpc("dtype", request, name)


def _shape(choose: random.Random, target: Target) -> Malformed:
    request, name = _predict(choose, target), input_of(choose, target)
    shape = request.inputs[name].tensor_shape
    change = choose.randrange(4)
    if change == 0:
        shape.unknown_rank = True
    elif change == 1:
        shape.dim[0].size = choose.choice([-1, -(2**63), 2**40, 2**63 - 1])
    elif change == 2:
        shape.dim.add().size = choose.choice([1, 2**31])
    else:
        shape.dim[0].size = choose.choice([0, 1, ROWS - 1])
    return _grpc("shape", request, name)


def _content(choose: random.Random, target: Target) -> Malformed:
    request, name = _predict(choose, target), input_of(choose, target)
    request.inputs[name].tensor_content = choose.randbytes(choose.choice([1, 7, 1001]))
    return _grpc("content", request, name)


def _grpc_place(choose: random.Random, target: Target) -> Malformed:
    request = _predict(choose, target)
    kind = choose.choice(["model", "no model", "version", "label", "signature"])
    if kind == "model":
        request.model_spec.name = "absent" + choose.choice(HOSTILE_TEXTS)
        return _grpc(kind, request, "absent", code=grpc.StatusCode.NOT_FOUND)
    if kind == "no model":
        request.ClearField("model_spec")
        return _grpc(kind, request, "model")
    if kind == "version":
        request.model_spec.version.value = choose.choice([-1, 2**62])
        return _grpc(kind, request, str(request.model_spec.version.value), code=grpc.StatusCode.NOT_FOUND)
    if kind == "label":
        request.model_spec.version_label = "absent" + choose.choice(HOSTILE_TEXTS)
        return _grpc(kind, request, "absent")
    request.model_spec.signature_name = "absent" + choose.choice(HOSTILE_TEXTS)
    return _grpc(kind, request, "absent", code=grpc.StatusCode.FAILED_PRECONDITION)


def _output_filter(choose: random.Random, target: Target) -> Malformed:
    request = _predict(choose, target)
    request.output_filter.append("absent" + choose.choice(HOSTILE_TEXTS))
    return _grpc("output filter", request, "absent")


def _grpc_example(choose: random.Random, target: Target) -> Malformed:
    request = _predict(choose, target, EXAMPLES)
    (name,) = request.inputs
    field, content = (name, no_example(choose, target)) if choose.random() < 0.5 else wrong_kind(choose, target)
    request.inputs[name].string_val[0] = content if isinstance(content, bytes) else content.SerializeToString()
    return _grpc("Example", request, field)


def _list_of_examples(choose: random.Random, target: Target) -> Malformed:
    method = choose.choice(["Classify", "Regress"])
    request = classification_pb2.ClassificationRequest()  # That of Regress has the same fields.
    request.model_spec.name, request.model_spec.signature_name = target.model, method.lower()
    if choose.random() < 0.3:
        return _grpc("no examples", request, "example", method)
    field, example = wrong_kind(choose, target)
    if choose.random() < 0.5:
        request.input.example_list.examples.append(example)
    else:
        request.input.example_list_with_context.examples.add()
        request.input.example_list_with_context.context.CopyFrom(example)
    return _grpc("feature type", request, field, method)


def _multi_inference(choose: random.Random, target: Target) -> Malformed:
    request = inference_pb2.MultiInferenceRequest()
    field, example = wrong_kind(choose, target)
    request.input.example_list.examples.append(example)

    def add(model: str, signature: str, method: str) -> None:
        task = request.tasks.add(method_name=method)
        task.model_spec.name, task.model_spec.signature_name = model, signature

    kind = choose.choice(["feature type", "no tasks", "models", "twice", "method", "signature", "tensors"])
    regress, classify = "tensorflow/serving/regress", "tensorflow/serving/classify"
    if kind != "no tasks":
        add(target.model, "regress", regress)
    code = grpc.StatusCode.INVALID_ARGUMENT
    if kind == "no tasks":
        field = "task"
    elif kind == "models":
        add("absent" + choose.choice(HOSTILE_TEXTS), "classify", classify)
        field = "same model"
    elif kind == "twice":
        add(target.model, "regress", choose.choice([regress, classify]))
        field = "signatures"
    elif kind == "method":
        request.tasks[0].method_name = "absent" + choose.choice(HOSTILE_TEXTS)
        field, code = "method_name", grpc.StatusCode.UNIMPLEMENTED
    elif kind == "signature":
        request.tasks[0].model_spec.signature_name = "absent" + choose.choice(HOSTILE_TEXTS)
        field = "absent"
    elif kind == "tensors":
        add(target.model, "classify", classify)
        field = "same tensor"
    return _grpc(f"tasks: {kind}", request, field, "MultiInference", code=code)


def _metadata(choose: random.Random, target: Target) -> Malformed:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = target.model
    if choose.random() < 0.3:
        request.model_spec.name = "absent" + choose.choice(HOSTILE_TEXTS)
        return _grpc("metadata", request, "absent", "GetModelMetadata", code=grpc.StatusCode.NOT_FOUND)
    if choose.random() < 0.3:
        request.ClearField("model_spec")
        return _grpc("metadata", request, "model_spec", "GetModelMetadata")
    request.metadata_field[:] = choose.choice([[], ["weights"], ["signature_def", *HOSTILE_TEXTS]])
    return _grpc("metadata", request, "metadata_field", "GetModelMetadata")


def _broken_list(choose: random.Random, target: Target) -> Malformed:
    request = _predict(choose, target, RANK)
    request.inputs["requests"].string_val[choose.randrange(ROWS)] = broken_lists(choose, target)
    return _grpc("list", request, "requests")


def _feature_of_list(choose: random.Random, target: Target) -> Malformed:
    request = _predict(choose, target, RANK)
    field, example = wrong_kind(choose, target)
    whole = input_pb2.ExampleListWithContext(context=example, examples=[example])  # Either may be the one that is read.
    request.inputs["requests"].string_val[:] = [whole.SerializeToString()] * ROWS
    return _grpc("feature of a list", request, field)


_BREAKERS: tuple[Callable[[random.Random, Target], Malformed], ...] = (
    _broken_message, _inputs, _dtype, _shape, _content, _grpc_place, _output_filter, _grpc_example, _list_of_examples,
    _multi_inference, _metadata,
)  # fmt: skip
_RANK_BREAKERS = (_broken_list, _feature_of_list)
