"""Warm-up requests, which TF Serving replays before a version takes traffic."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import input_pb2, model_pb2, predict_pb2, prediction_log_pb2

# tf_serving_warmup_requests: the name and place TF Serving looks for (saved_model_warmup.cc).
WARMUP_FILE = pathlib.PurePosixPath("assets.extra") / "tf_serving_warmup_requests"
MAX_WARMUP_RECORDS = 1000  # WarmupConsts::kMaxNumRecords in saved_model_warmup_util.h.


def write_warmup_requests(
    servable: pathlib.Path,
    model_name: str,
    examples: Sequence[bytes],
    raw: Mapping[str, np.ndarray],
    *,
    signatures: Sequence[str],
    batch_sizes: Sequence[int],
    max_batch_size: int | None,
) -> int:
    """Writes a PredictionLog for every batch size and for every signature but ``debug``.

    Args:
      servable: the version's directory.
      model_name: as the server will know the model.
      examples: serialized tf.Examples of raw values, at least one; repeated where a batch needs more.
      raw: the same rows as named arrays.
      signatures: the servable's.
      batch_sizes: rows of a request; of ``rank`` the items of one user.
      max_batch_size: of the batching file; a larger request would be refused, and with it the version.

    Returns:
      Number of records; TF Serving takes at most ``MAX_WARMUP_RECORDS``.
    """
    logs = []
    for batch_size in batch_sizes:
        places = (np.arange(batch_size) % len(examples)).tolist()
        rows = [examples[place] for place in places]
        raw_rows = {name: values[places] for name, values in raw.items()}
        # A request of `rank` is one row of its batch, whatever the number of items.
        fits = max_batch_size is None or batch_size <= max_batch_size
        logs += [
            _log(model_name, name, rows, raw_rows)
            for name in signatures
            if name != "debug" and (fits or name == "rank")
        ]
    path = servable / WARMUP_FILE
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())
    return len(logs)


def _log(
    model_name: str, signature: str, examples: Sequence[bytes], raw: Mapping[str, np.ndarray]
) -> prediction_log_pb2.PredictionLog:
    match signature:
        case "classify":
            return _classify_log(model_name, examples)
        case "regress":
            return _regress_log(model_name, examples)
        case "predict_raw":
            return _predict_log(model_name, signature, raw)
        case "rank":
            return _predict_log(model_name, signature, {"requests": _texts([rank_request(examples[0], examples)])})
    return _predict_log(model_name, signature, {"examples": _texts(examples)})


def _texts(values: Sequence[bytes]) -> np.ndarray:
    return np.array(values, object)


def rank_request(user: bytes, items: Sequence[bytes]) -> bytes:
    """Makes a request of the signature ``rank``.

    Args:
      user: serialized tf.Example, the context.
      items: serialized tf.Examples.

    Returns:
      A serialized ExampleListWithContext.
    """
    parse = tf.train.Example.FromString
    message = input_pb2.ExampleListWithContext(context=parse(user), examples=[parse(item) for item in items])
    return message.SerializeToString()


def _model_spec(model_name: str, signature_name: str) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(name=model_name, signature_name=signature_name)


def _predict_log(model_name: str, signature: str, inputs: Mapping[str, np.ndarray]) -> prediction_log_pb2.PredictionLog:
    request = predict_pb2.PredictRequest(model_spec=_model_spec(model_name, signature))
    for name, values in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
    return prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))


def _example_input(examples: Sequence[bytes]) -> input_pb2.Input:
    parsed = [tf.train.Example.FromString(example) for example in examples]
    return input_pb2.Input(example_list=input_pb2.ExampleList(examples=parsed))


def _classify_log(model_name: str, examples: Sequence[bytes]) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    log.classify_log.request.model_spec.CopyFrom(_model_spec(model_name, "classify"))
    log.classify_log.request.input.CopyFrom(_example_input(examples))
    return log


def _regress_log(model_name: str, examples: Sequence[bytes]) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    log.regress_log.request.model_spec.CopyFrom(_model_spec(model_name, "regress"))
    log.regress_log.request.input.CopyFrom(_example_input(examples))
    return log
