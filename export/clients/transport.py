"""How a client's requests reach a model server, with all attempts inside one deadline; here over gRPC."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

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

INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.1, 2.0
_MAX_ATTEMPTS = 5  # Where gRPC itself stops.
_RETRIED_CODES = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_RETRY_BUFFER_BYTES = 64 << 20  # By default gRPC does not repeat requests of more than 256 KiB.
_REMEDIES = {
    "UNAVAILABLE": "Is a server there, does it speak this protocol on that port (gRPC: 8500, REST: 8501), is it full?",
    "RESOURCE_EXHAUSTED": "Send fewer requests at once, or smaller ones",
    "DEADLINE_EXCEEDED": "Allow more time, or send smaller batches",
    "NOT_FOUND": "`python -m export.client status` shows which versions are served",
    "INVALID_ARGUMENT": "The request does not fit the model's signature",
    "FAILED_PRECONDITION": "`python -m export.client status` shows which signatures are served",
}


class ServingError(RuntimeError):
    """A request without an answer; ``code`` is the name of gRPC's status code, over REST as well.

    Over REST several codes share an HTTP status, and ``code`` is the likeliest: INVALID_ARGUMENT may have been
    FAILED_PRECONDITION, INTERNAL may have been UNKNOWN, UNAVAILABLE may have been RESOURCE_EXHAUSTED.
    """

    def __init__(self, code: str, message: str):
        remedy = _REMEDIES.get(code, "The server's log says more")
        super().__init__(f"the request failed. Received: {code}, {message.rstrip('. ')}. {remedy}")
        self.code = code


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Which model of which server is called, and how long.

    Attributes:
      address: ``host:port``.
      model_name: as the server knows the model.
      version, label: which version answers; at most one is given. Without: the newest that is served.
      timeout_seconds: for all attempts of a request together.
      max_attempts: of a request that the server refuses as unavailable or full, in [1, 5].
    """

    address: str
    model_name: str
    version: int | None = None
    label: str | None = None
    timeout_seconds: float = 10.0
    max_attempts: int = 4

    def __post_init__(self):
        if self.version is not None and self.label is not None:
            raise ValueError(f"a version or a label. Received: version {self.version} and label {self.label}")
        if not 1 <= self.max_attempts <= _MAX_ATTEMPTS:
            raise ValueError(f"max_attempts must be in [1, {_MAX_ATTEMPTS}]. Received: {self.max_attempts}")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0. Received: {self.timeout_seconds}")
        if ":" not in self.address or "/" in self.address:
            raise ValueError(f"an address is host:port. Received: {self.address}. Example: localhost:8500")


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """A version that a server knows: its state (``AVAILABLE``, ``LOADING``, ...), and what went wrong, if anything."""

    version: int
    state: str
    error: str = ""


class Transport(Protocol):
    """What both protocols offer. Every method raises ``ServingError``."""

    def predict(self, signature: str, name: str, values: Sequence[bytes], outputs: Sequence[str]) -> dict[str, Any]:
        """Calls a signature with one string tensor [batch] called ``name`` -> arrays or lists by output."""

    def metadata(self) -> get_model_metadata_pb2.SignatureDefMap: ...

    def status(self) -> list[VersionStatus]: ...

    def close(self) -> None: ...


def statuses_of(response: get_model_status_pb2.GetModelStatusResponse) -> list[VersionStatus]:
    """What an answer to GetModelStatus says."""
    state_name = get_model_status_pb2.ModelVersionStatus.State.Name
    return [
        VersionStatus(entry.version, state_name(entry.state), entry.status.error_message)
        for entry in response.model_version_status
    ]


class GrpcTransport:
    """TF Serving's PredictionService and ModelService; gRPC itself repeats attempts, with jitter."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._channel = grpc.insecure_channel(endpoint.address, options=_channel_options(endpoint.max_attempts))
        self._predictions = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def predict(self, signature: str, name: str, values: Sequence[bytes], outputs: Sequence[str]) -> dict[str, Any]:
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
    options = [
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
