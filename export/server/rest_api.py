"""TF Serving's REST API over the core: predict, classify, regress, metadata, status, and the server's metrics.

Bodies are JSON whatever their content type says, as curl -d sends them. Errors are {"error": "..."} with TF Serving's
status: 400 for paths and methods below /v1/ that it does not know (http_rest_api_handler.cc); elsewhere 404 and 405;
and 413 for bodies that are too long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf import json_format, message
from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2

from export.server.core import Answer, PredictionCore
from export.server.errors import RequestError, internal_error, invalid_argument
from export.server.json_format.answers import classify_answer, dump, predict_answer, regress_answer
from export.server.json_format.examples import ExamplesRequest
from export.server.json_format.tensors import PredictRequest
from export.server.metrics import Metrics

_MAX_VERSION = 2**63 - 1
_SHORT_BODY_BYTES = 256 << 10  # Is parsed in less time than it takes to ask a thread.
_MAX_PATH_CHARACTERS = 200
_CLOSED_BY_CLIENT = 499  # Nobody receives it: nginx' status for logs.

T = TypeVar("T")


class _NameConvertor(StringConvertor):
    """Names of models and labels: the verb stands behind a colon."""

    regex = "[^/:]+"


register_url_convertor("servable_name", _NameConvertor())
_PLACES = (
    "/v1/models/{model:servable_name}",
    "/v1/models/{model:servable_name}/versions/{version:servable_name}",
    "/v1/models/{model:servable_name}/labels/{label:servable_name}",
)


def rest_app(core: PredictionCore, metrics: Metrics, max_request_bytes: int, timeout_seconds: float) -> Starlette:
    """Makes the ASGI application.

    Args:
      core: answers the requests.
      metrics: counts them, and is shown at /metrics and TF Serving's /monitoring/prometheus/metrics.
      max_request_bytes: longest body; longer ones are refused while they arrive.
      timeout_seconds: for a request, its body included.

    Returns:
      The application, without a lifespan of its own.
    """
    api = _RestApi(core, metrics, max_request_bytes, timeout_seconds)

    async def exposition(_: Request) -> Response:
        return Response(metrics.exposition(), headers={"content-type": metrics.content_type})

    verbs = {
        ":predict": ("POST", api.endpoint("Predict", api.predict)),
        ":classify": ("POST", api.endpoint("Classify", api.classify)),
        ":regress": ("POST", api.endpoint("Regress", api.regress)),
        "/metadata": ("GET", api.endpoint("GetModelMetadata", api.metadata)),
        "": ("GET", api.endpoint("GetModelStatus", api.status)),
    }
    routes = [
        Route(place + verb, endpoint, methods=[method])
        for place in _PLACES
        for verb, (method, endpoint) in verbs.items()
    ]
    routes += [Route(path, exposition) for path in ("/metrics", "/monitoring/prometheus/metrics")]
    handlers: dict[Any, Callable[..., Awaitable[Response]]] = {HTTPException: _http_error, Exception: _internal_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class _RestApi:
    """The endpoints: ModelSpec and request -> body of the answer."""

    def __init__(self, core: PredictionCore, metrics: Metrics, max_request_bytes: int, timeout_seconds: float):
        self._core = core
        self._metrics = metrics
        self._max_request_bytes = max_request_bytes
        self._timeout_seconds = timeout_seconds

    def endpoint(
        self, name: str, answer: Callable[[model_pb2.ModelSpec, Request], Awaitable[bytes]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint that answers with ``answer``, counts and translates errors."""

        async def counted(request: Request) -> Response:
            started, code = time.perf_counter(), grpc.StatusCode.INTERNAL
            try:
                body = await asyncio.wait_for(answer(_model_spec(request), request), self._timeout_seconds)
                code = grpc.StatusCode.OK
                return Response(body, media_type="application/json")
            except RequestError as error:
                code = error.code
                return _error(error.http_status, str(error))
            except asyncio.TimeoutError:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
                return _error(504, f"a request must be sent and answered within {self._timeout_seconds:g} seconds")
            except HTTPException:  # The body is too long.
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                raise
            except ClientDisconnect:
                code = grpc.StatusCode.CANCELLED
                return Response(status_code=_CLOSED_BY_CLIENT)
            except Exception as error:  # Starlette would log its message.
                refusal = internal_error(error)
                return _error(refusal.http_status, str(refusal))
            finally:
                self._metrics.observe_request(
                    protocol="rest",
                    method=name,
                    model=request.path_params["model"],
                    code=code.name,
                    seconds=time.perf_counter() - started,
                )

        return counted

    async def predict(self, spec: model_pb2.ModelSpec, request: Request) -> bytes:
        content = await self._parsed(request, PredictRequest.parse)
        spec.signature_name = content.signature_name
        answer = await _while_connected(request, self._core.predict(spec, content.tensors))
        return predict_answer(answer.outputs, content.in_rows)

    async def classify(self, spec: model_pb2.ModelSpec, request: Request) -> bytes:
        content = await self._parsed(request, self._parse_examples)
        spec.signature_name = content.signature_name
        answer = await _while_connected(request, self._core.classify(spec, content.examples))
        return classify_answer(answer.outputs)

    async def regress(self, spec: model_pb2.ModelSpec, request: Request) -> bytes:
        content = await self._parsed(request, self._parse_examples)
        spec.signature_name = content.signature_name
        answer = await _while_connected(request, self._core.regress(spec, content.examples))
        return regress_answer(answer.outputs)

    async def metadata(self, spec: model_pb2.ModelSpec, _: Request) -> bytes:
        response = self._core.metadata(spec)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return dump({"model_spec": _to_dict(response.model_spec), "metadata": {"signature_def": _to_dict(signatures)}})

    async def status(self, spec: model_pb2.ModelSpec, _: Request) -> bytes:
        return dump(_to_dict(self._core.status(spec)))

    def _parse_examples(self, body: bytes) -> ExamplesRequest:
        return ExamplesRequest.parse(body, self._max_request_bytes)

    async def _parsed(self, request: Request, parse: Callable[[bytes], T]) -> T:
        """The body, parsed in a thread if that takes long: others are answered meanwhile."""
        body = await self._body(request)
        return parse(body) if len(body) <= _SHORT_BODY_BYTES else await asyncio.to_thread(parse, body)

    async def _body(self, request: Request) -> bytes:
        self._require_length(int(request.headers.get("content-length", 0)))
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            self._require_length(size)
            chunks.append(chunk)
        return b"".join(chunks)

    def _require_length(self, size: int) -> None:
        if size > self._max_request_bytes:
            raise HTTPException(413, f"a request's body must have at most {self._max_request_bytes:,} bytes")


async def _while_connected(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Awaits an answer as long as its client does.

    Raises:
      ClientDisconnect: it went away; the answer is canceled, and leaves the queue.
    """
    answering = asyncio.create_task(answer)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    """Returns when the client closes its connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model_spec(request: Request) -> model_pb2.ModelSpec:
    place = request.path_params
    spec = model_pb2.ModelSpec(name=place["model"], version_label=place.get("label"))
    if "version" in place:
        digits = place["version"]
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 19 and int(digits) <= _MAX_VERSION):
            raise invalid_argument("the path's version must be an integer of type int64. Received: another text")
        spec.version.value = int(digits)
    return spec


def _to_dict(proto: message.Message) -> dict:
    """Proto field names and every scalar, as TF Serving prints them; int64 as text."""
    return json_format.MessageToDict(proto, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump({"error": text}), status, headers, media_type="application/json")


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    if error.status_code in (404, 405) and path.lower().startswith("/v1/"):
        return _error(400, f"Malformed request: {request.method} {path[:_MAX_PATH_CHARACTERS]}")
    texts = {404: "there is no such path. Allowed: /v1/models/<model>, with /versions/<version> or /labels/<label>, "
                  "and :predict, :classify, :regress or /metadata",
             405: "predict, classify and regress take POST, everything else GET"}  # fmt: skip
    return _error(error.status_code, texts.get(error.status_code, error.detail), error.headers)


async def _internal_error(_: Request, __: Exception) -> Response:
    return _error(500, "the server failed; its log says why")
