"""TF Serving's gRPC services on a `PredictionCore`."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from export.server.core import Answer, PredictionCore
from export.server.errors import RequestError, internal_error, invalid_argument
from export.server.loaded_version import Signature
from export.server.metrics import Metrics
from export.server.tensor_protos import examples_of, to_array, to_proto

_SERVICES = ("", "tensorflow.serving.PredictionService")  # What health checks may ask for.
_WATCHERS_HEAR_SECONDS = 0.1


async def _answered(
    metrics: Metrics, method: str, model: str, context: grpc.aio.ServicerContext, work: Awaitable[Message]
) -> Message:
    """Awaits an answer, translates what it raises, and counts it."""
    start = time.perf_counter()
    code = grpc.StatusCode.CANCELLED  # Unless one of the following is reached.
    try:
        try:
            answer = await work
            code = grpc.StatusCode.OK
            return answer
        except Exception as error:  # Nothing may leave the server but an answer or a code.
            refusal = error if isinstance(error, RequestError) else internal_error(error)
            code = refusal.code
    finally:
        seconds = time.perf_counter() - start
        metrics.observe_request(protocol="grpc", method=method, model=model, code=code.name, seconds=seconds)
    return await context.abort(code, str(refusal))


class PredictionServicer(prediction_service_pb2_grpc.PredictionServiceServicer):
    """tensorflow.serving.PredictionService.

    Args:
      core: answers.
      metrics: counts.
      max_request_bytes: that one input may take in memory.
    """

    def __init__(self, core: PredictionCore, metrics: Metrics, max_request_bytes: int):
        self._core = core
        self._max_bytes = max_request_bytes
        self._answered = functools.partial(_answered, metrics)

    async def Predict(self, request: predict_pb2.PredictRequest, context):  # noqa: N802 - the name in the proto
        return await self._answered("Predict", request.model_spec.name, context, self._predict(request, context))

    async def Classify(self, request: classification_pb2.ClassificationRequest, context):  # noqa: N802
        return await self._answered("Classify", request.model_spec.name, context, self._classify(request, context))

    async def Regress(self, request: regression_pb2.RegressionRequest, context):  # noqa: N802
        return await self._answered("Regress", request.model_spec.name, context, self._regress(request, context))

    async def MultiInference(self, request: inference_pb2.MultiInferenceRequest, context):  # noqa: N802
        model = request.tasks[0].model_spec.name if request.tasks else ""
        return await self._answered("MultiInference", model, context, self._multi_inference(request, context))

    async def GetModelMetadata(self, request: get_model_metadata_pb2.GetModelMetadataRequest, context):  # noqa: N802
        return await self._answered("GetModelMetadata", request.model_spec.name, context, self._metadata(request))

    async def _predict(self, request, context) -> predict_pb2.PredictResponse:
        def inputs_of(signature: Signature) -> dict[str, np.ndarray]:
            # An input that the signature lacks has no dtype to read it by; the core then says which are missing.
            known = [name for name in request.inputs if name in signature.inputs]
            if len(known) < len(request.inputs):
                unknown = sorted(set(request.inputs) - set(known))
                raise invalid_argument(
                    f"the inputs of signature {signature.name!r} are {sorted(signature.inputs)}. Received: {unknown}"
                )
            return {
                name: to_array(name, request.inputs[name], signature.inputs[name], self._max_bytes) for name in known
            }

        answer = await self._core.predict(
            request.model_spec, inputs_of, request.output_filter, context.time_remaining()
        )
        response = predict_pb2.PredictResponse(model_spec=_model_spec(answer))
        for name, array in answer.outputs.items():
            response.outputs[name].CopyFrom(to_proto(array))
        return response

    async def _classify(self, request, context) -> classification_pb2.ClassificationResponse:
        examples = examples_of(request.input, self._max_bytes)
        answer = await self._core.classify(request.model_spec, examples, context.time_remaining())
        return classification_pb2.ClassificationResponse(
            model_spec=_model_spec(answer), result=_classifications(answer)
        )

    async def _regress(self, request, context) -> regression_pb2.RegressionResponse:
        examples = examples_of(request.input, self._max_bytes)
        answer = await self._core.regress(request.model_spec, examples, context.time_remaining())
        return regression_pb2.RegressionResponse(model_spec=_model_spec(answer), result=_regressions(answer))

    async def _multi_inference(self, request, context) -> inference_pb2.MultiInferenceResponse:
        tasks = [(task.model_spec, task.method_name) for task in request.tasks]
        answers = await self._core.multi_inference(
            tasks, examples_of(request.input, self._max_bytes), context.time_remaining()
        )
        response = inference_pb2.MultiInferenceResponse()
        for answer in answers:
            result = response.results.add(model_spec=_model_spec(answer))
            if "outputs" in answer.outputs:
                result.regression_result.CopyFrom(_regressions(answer))
            else:
                result.classification_result.CopyFrom(_classifications(answer))
        return response

    async def _metadata(self, request) -> get_model_metadata_pb2.GetModelMetadataResponse:
        _check_has_model_spec(request)
        if set(request.metadata_field) != {"signature_def"}:
            raise invalid_argument(f"metadata_field is signature_def. Received: {list(request.metadata_field)}")
        return self._core.metadata(request.model_spec)


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """tensorflow.serving.ModelService; the models are chosen by the servable directory only.

    Args:
      core: answers.
      metrics: counts.
    """

    def __init__(self, core: PredictionCore, metrics: Metrics):
        self._core = core
        self._answered = functools.partial(_answered, metrics)

    async def GetModelStatus(self, request: get_model_status_pb2.GetModelStatusRequest, context):  # noqa: N802
        return await self._answered("GetModelStatus", request.model_spec.name, context, self._status(request))

    async def HandleReloadConfigRequest(  # noqa: N802
        self, request: model_management_pb2.ReloadConfigRequest, context
    ):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "change models.config: the server follows it")

    async def _status(self, request) -> get_model_status_pb2.GetModelStatusResponse:
        _check_has_model_spec(request)
        return self._core.status(request.model_spec)


class _BrokenMessages(grpc.aio.ServerInterceptor):
    """Refuses bytes that are no message of their method; gRPC itself answers UNKNOWN, as if the server had failed."""

    async def intercept_service(self, continuation, handler_call_details):
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler

        async def answer(content: bytes, context):
            try:
                request = handler.request_deserializer(content)
            except DecodeError:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "the request must be a message of its method. Received: other bytes",
                )
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)


class _HealthServicer(health_aio.HealthServicer):
    """Health checks whose watchers do not keep the server from stopping."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers: set[asyncio.Task] = set()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context) -> None:  # noqa: N802
        watcher = asyncio.create_task(super().Watch(request, context))
        self._watchers.add(watcher)
        try:
            await asyncio.wait({watcher})  # Returns also when it was cancelled: only a return ends the call.
        finally:
            watcher.cancel()
            self._watchers.discard(watcher)

    async def shut_down(self) -> None:
        """Tells NOT_SERVING, also to the watchers, and ends their calls."""
        await self.enter_graceful_shutdown()
        await asyncio.sleep(_WATCHERS_HEAR_SECONDS)
        for watcher in self._watchers:
            watcher.cancel()


class GrpcServer:
    """The gRPC server; made, started and stopped in one event loop.

    Args:
      core: answers.
      metrics: counts.
      address: host:port; port 0 takes any free one.
      max_request_bytes: larger messages are refused with RESOURCE_EXHAUSTED.

    Attributes:
      port: the one taken.

    Raises:
      ValueError: the address cannot be used.
    """

    def __init__(self, core: PredictionCore, metrics: Metrics, address: str, max_request_bytes: int):
        options = [
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.so_reuseport", 0),  # Else a second server would silently share the port.
        ]
        self._server = grpc.aio.server(interceptors=[_BrokenMessages()], options=options)
        self._health = _HealthServicer()
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            PredictionServicer(core, metrics, max_request_bytes), self._server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(core, metrics), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ValueError(f"the gRPC address must be free. Received: {address}, which is not") from error

    async def start(self) -> None:
        """Takes requests from here on. `set_serving` comes before: health says SERVING by itself."""
        await self._server.start()

    async def set_serving(self, is_serving: bool) -> None:
        """Has health checks answer SERVING or, unless ``is_serving``, NOT_SERVING."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in _SERVICES:
            await self._health.set(service, status)

    async def stop(self, grace_seconds: float) -> None:
        """Takes no more requests, and waits ``grace_seconds`` for those that run; then they are canceled.

        Args:
          grace_seconds: how long running requests may take, >= 0.
        """
        await asyncio.gather(self._health.shut_down(), self._server.stop(grace_seconds))


def _check_has_model_spec(request: Message) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("a request must have a model_spec. Received: none")


def _model_spec(answer: Answer) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=answer.model_name, signature_name=answer.signature_name)
    spec.version.value = answer.version
    return spec


def _classifications(answer: Answer) -> classification_pb2.ClassificationResult:
    """One Class per column; a label or a score that the model does not give is "" or 0."""
    result = classification_pb2.ClassificationResult()
    some = next(iter(answer.outputs.values()))
    scores = answer.outputs.get("scores", np.zeros(some.shape, np.float32)).tolist()
    classes = answer.outputs.get("classes", np.full(some.shape, b"", object)).tolist()
    for row_classes, row_scores in zip(classes, scores, strict=True):
        row = result.classifications.add()
        for label, score in zip(row_classes, row_scores, strict=True):
            # A label is text in the proto; a model may give any bytes.
            row.classes.add(label=label.decode("utf-8", "replace"), score=score)
    return result


def _regressions(answer: Answer) -> regression_pb2.RegressionResult:
    values = answer.outputs["outputs"].ravel().tolist()
    return regression_pb2.RegressionResult(regressions=[regression_pb2.Regression(value=value) for value in values])
