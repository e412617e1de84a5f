"""A client's requests over TF Serving's gRPC API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import grpc
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from export.clients.transport import (
    INITIAL_BACKOFF_SECONDS,
    MAX_BACKOFF_SECONDS,
    Endpoint,
    ServingError,
    VersionStatus,
    statuses_of,
)

_RETRIED_CODES = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_RETRY_BUFFER_BYTES = 64 << 20  # By default gRPC does not repeat requests of more than 256 KiB.


class GrpcTransport:
    """Transport over TF Serving's PredictionService and ModelService; gRPC itself repeats attempts, with jitter.

    Args:
      endpoint: server, model, version and deadline.
    """

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._channel = grpc.insecure_channel(endpoint.address, options=_channel_options(endpoint.max_attempts))
        self._predictions = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def predict(self, signature: str, name: str, values: Sequence[bytes], outputs: Sequence[str]) -> dict[str, Any]:
        """Calls a signature, with the arguments and errors of ``Transport.predict``.

        Returns:
          Output -> array; object arrays of bytes for strings.
        """
        request = predict_pb2.PredictRequest(model_spec=self._model_spec(signature), output_filter=outputs)
        shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=len(values))])
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=values)
        request.inputs[name].CopyFrom(tensor)
        answer = self._call(self._predictions.Predict, request)
        return {key: tf.make_ndarray(value) for key, value in answer.outputs.items()}

    def metadata(self) -> get_model_metadata_pb2.SignatureDefMap:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=self._model_spec(), metadata_field=["signature_def"]
        )
        found = get_model_metadata_pb2.SignatureDefMap()
        self._call(self._predictions.GetModelMetadata, request).metadata["signature_def"].Unpack(found)
        return found

    def status(self) -> list[VersionStatus]:
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=self._model_spec())
        return statuses_of(self._call(self._models.GetModelStatus, request))

    def close(self) -> None:
        self._channel.close()

    def _model_spec(self, signature: str = "") -> model_pb2.ModelSpec:
        spec = model_pb2.ModelSpec(name=self._endpoint.model_name, signature_name=signature)
        if self._endpoint.version is not None:
            spec.version.value = self._endpoint.version
        if self._endpoint.label is not None:
            spec.version_label = self._endpoint.label
        return spec

    def _call(self, method: grpc.UnaryUnaryMultiCallable, request: Any) -> Any:
        try:
            return method(request, timeout=self._endpoint.timeout_seconds)
        except grpc.RpcError as error:
            raise ServingError(error.code().name, error.details() or "no details") from error


def _channel_options(max_attempts: int) -> list[tuple[str, Any]]:
    reconnect_ms = int(1000 * INITIAL_BACKOFF_SECONDS)  # By default a second, in which attempts fail unsent.
    options: list[tuple[str, Any]] = [
        ("grpc.initial_reconnect_backoff_ms", reconnect_ms),
        ("grpc.min_reconnect_backoff_ms", reconnect_ms),
        ("grpc.max_reconnect_backoff_ms", int(1000 * MAX_BACKOFF_SECONDS)),
        ("grpc.enable_retries", int(max_attempts > 1)),
        ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
        ("grpc.max_receive_message_length", -1),
    ]
    if max_attempts > 1:
        policy = {
            "maxAttempts": max_attempts,
            "initialBackoff": f"{INITIAL_BACKOFF_SECONDS}s",
            "maxBackoff": f"{MAX_BACKOFF_SECONDS}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": _RETRIED_CODES,
        }
        config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
        options.append(("grpc.service_config", json.dumps(config)))
    return options
