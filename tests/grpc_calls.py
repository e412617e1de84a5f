"""gRPC requests as a client of TF Serving writes them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_service_pb2_grpc


@contextlib.contextmanager
def prediction_stub(address: str) -> Iterator[prediction_service_pb2_grpc.PredictionServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


def model_spec(name: str, signature: str = "", *, version: int | None = None, label: str = "") -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=name, signature_name=signature)
    if version is not None:
        spec.version.value = version
    if label:
        spec.version_label = label
    return spec


def predict_request(spec: model_pb2.ModelSpec, **inputs: np.ndarray) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest(model_spec=spec)
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def slow_request(x: float, steps: int, name: str = "tiny") -> predict_pb2.PredictRequest:
    """Takes some microseconds a step."""
    return predict_request(model_spec(name, "slow"), x=np.float32([x]), steps=np.int64([steps]))


def outputs(response: predict_pb2.PredictResponse) -> Mapping[str, np.ndarray]:
    return {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}


def refused(call: Callable, *arguments, **options) -> tuple[grpc.StatusCode, str]:
    """The code and the message of a call that must fail."""
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, timeout=options.pop("timeout", 10), **options)
    return raised.value.code(), raised.value.details()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)
