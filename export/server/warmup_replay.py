"""Replays a version's warm-up requests before it takes traffic, as TF Serving does (saved_model_warmup.cc)."""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf
from tensorflow_serving.apis import input_pb2, model_pb2, predict_pb2, prediction_log_pb2

from export.servable.warmup import MAX_WARMUP_RECORDS, WARMUP_FILE
from export.server.checks import (
    CLASSIFY,
    EXAMPLE_METHODS,
    REGRESS,
    ExampleMethod,
    check_examples,
    check_inputs,
    check_output_filter,
    check_same_tensor,
    check_tasks,
    signature_name,
)
from export.server.errors import RequestError
from export.server.loaded_version import LoadedVersion, Signature
from export.server.tensor_protos import examples_of, to_array

_MAX_TENSOR_BYTES = 1 << 30  # The file is the publisher's, not a client's.


class _BrokenRecordError(ValueError):
    """A record that breaks a rule; the message quotes no value."""


def replay_warmup_requests(version: LoadedVersion) -> int:
    """Runs every record of assets.extra/tf_serving_warmup_requests once.

    Args:
      version: that has the file, or none.

    Returns:
      The number of records; 0 without a file.

    Raises:
      ValueError: a record cannot be replayed. One bad record fails the version, as in TF Serving. TensorFlow's messages
        may quote the rows that were recorded, so only the kind of the error is told.
    """
    file = version.path / WARMUP_FILE
    if not file.is_file():
        return 0
    number = 0
    try:
        for number, record in enumerate(tf.data.TFRecordDataset(str(file)).as_numpy_iterator(), start=1):
            if number > MAX_WARMUP_RECORDS:
                raise _BrokenRecordError(f"at most {MAX_WARMUP_RECORDS} records. Received: more")
            _replay(version, prediction_log_pb2.PredictionLog.FromString(record))
    except Exception as error:  # A record may be broken in any way.
        told = isinstance(error, (RequestError, _BrokenRecordError))
        reason = str(error) if told else type(error).__name__
        raise ValueError(f"warm-up record {number} cannot be replayed: {reason}") from None
    return number


def _replay(version: LoadedVersion, log: prediction_log_pb2.PredictionLog) -> None:
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        _predict(version, log.predict_log.request)
    elif kind == "classify_log":
        request = log.classify_log.request
        _infer(version, [(request.model_spec, CLASSIFY)], request.input)
    elif kind == "regress_log":
        request = log.regress_log.request
        _infer(version, [(request.model_spec, REGRESS)], request.input)
    elif kind == "multi_inference_log":
        request = log.multi_inference_log.request
        tasks = [(task.model_spec, task.method_name) for task in request.tasks]
        check_tasks(tasks)
        check_same_tensor(version, tasks)
        _infer(version, [(spec, EXAMPLE_METHODS[method]) for spec, method in tasks], request.input)
    else:
        raise _BrokenRecordError(f"a record is a predict, classify, regress or multi-inference log. Received: {kind}")


def _predict(version: LoadedVersion, request: predict_pb2.PredictRequest) -> None:
    signature = _signature(version, request.model_spec)
    if unknown := request.inputs.keys() - signature.inputs.keys():
        raise _BrokenRecordError(f"signature {signature.name!r} lacks the inputs {sorted(unknown)}")
    check_output_filter(signature, request.output_filter)
    inputs = signature.defaults | {
        name: to_array(name, proto, signature.inputs[name], _MAX_TENSOR_BYTES) for name, proto in request.inputs.items()
    }
    check_inputs(signature, inputs)
    version.run(signature.name, inputs)


def _infer(
    version: LoadedVersion, tasks: Iterable[tuple[model_pb2.ModelSpec, ExampleMethod]], request_input: input_pb2.Input
) -> None:
    examples = examples_of(request_input, _MAX_TENSOR_BYTES)
    for spec, method in tasks:
        signature = _signature(version, spec)
        method.check_signature(signature)
        inputs = check_examples(examples)
        check_inputs(signature, inputs)
        method.answer(version.run(signature.name, inputs), len(examples))


def _signature(version: LoadedVersion, spec: model_pb2.ModelSpec) -> Signature:
    name = signature_name(spec)
    if name not in version.signatures:
        raise _BrokenRecordError(f"the signatures are {sorted(version.signatures)}. Received: {name!r}")
    return version.signatures[name]
