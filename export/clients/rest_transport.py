"""A client's requests over TF Serving's REST API."""

from __future__ import annotations

import base64
import json
import random
import socket
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import urllib3
from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

from export.clients.transport import (
    INITIAL_BACKOFF_SECONDS,
    MAX_BACKOFF_SECONDS,
    Endpoint,
    ServingError,
    VersionStatus,
    statuses_of,
)

_RETRIED_STATUSES = (503, 429)
_CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",  # Of the request itself, so that repeating it would not help.
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class _DeadlineSocket(socket.socket):
    """A socket whose timeout holds for all reads until it is set again; else a server may send a byte at a time."""

    def settimeout(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        super().settimeout(seconds)

    def recv_into(self, *arguments: Any) -> int:
        if self._deadline is not None:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError("timed out")
            super().settimeout(seconds)
        return super().recv_into(*arguments)


class _Connection(urllib3.connection.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        timeout = self.sock.gettimeout()
        self.sock = _DeadlineSocket(fileno=self.sock.detach())
        self.sock.settimeout(timeout)


class _ConnectionPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class RestTransport:
    """Transport over TF Serving's REST API.

    ``urllib3.Retry`` decides which attempts are repeated, and when; the loop is here, since urllib3's own gives each
    attempt the whole timeout. A single output comes without its name, which the model's metadata then tell: they are
    asked once per signature.

    Args:
      endpoint: server, model, version and deadline.
      num_connections: that are kept open.
    """

    def __init__(self, endpoint: Endpoint, num_connections: int):
        self._endpoint = endpoint
        host, port = endpoint.address.rsplit(":", 1)
        self._pool = _ConnectionPool(host.strip("[]"), int(port), maxsize=num_connections)
        self._model = f"/v1/models/{urllib.parse.quote(endpoint.model_name, safe='')}"
        self._path = self._model
        if endpoint.version is not None:
            self._path += f"/versions/{endpoint.version}"
        if endpoint.label is not None:
            self._path += f"/labels/{urllib.parse.quote(endpoint.label, safe='')}"
        self._retry = urllib3.Retry(
            total=endpoint.max_attempts - 1,
            status_forcelist=_RETRIED_STATUSES,
            allowed_methods=None,  # A prediction changes nothing, so that a POST may be repeated as well.
            backoff_factor=INITIAL_BACKOFF_SECONDS,
            backoff_jitter=INITIAL_BACKOFF_SECONDS,
            backoff_max=MAX_BACKOFF_SECONDS,
        )
        self._output_names: dict[str, str] = {}  # Of signatures with one output.

    def predict(self, signature: str, name: str, values: Sequence[bytes], outputs: Sequence[str]) -> dict[str, Any]:
        """Calls a signature, with the arguments and errors of ``Transport.predict``.

        Returns:
          Output -> nested lists.
        """
        encoded = [{"b64": base64.b64encode(value).decode("ascii")} for value in values]
        body = {"signature_name": signature, "inputs": {name: encoded}}
        deadline = self._deadline()
        answer = self._call("POST", f"{self._path}:predict", deadline, body).get("outputs")
        return answer if isinstance(answer, dict) else {self._output_name(signature, deadline): answer}

    def _output_name(self, signature: str, deadline: float) -> str:
        if signature not in self._output_names:
            outputs = self._metadata(deadline).signature_def[signature].outputs
            self._output_names[signature] = next(iter(outputs), "an output without a name")
        return self._output_names[signature]

    def metadata(self) -> get_model_metadata_pb2.SignatureDefMap:
        return self._metadata(self._deadline())

    def _metadata(self, deadline: float) -> get_model_metadata_pb2.SignatureDefMap:
        answer = self._call("GET", f"{self._path}/metadata", deadline).get("metadata", {}).get("signature_def", {})
        found = get_model_metadata_pb2.SignatureDefMap()
        return json_format.ParseDict(
            {"signatureDef": answer.get("signature_def", {})}, found, ignore_unknown_fields=True
        )

    def status(self) -> list[VersionStatus]:
        answer = self._call("GET", self._path, self._deadline())
        response = get_model_status_pb2.GetModelStatusResponse()
        return statuses_of(json_format.ParseDict(answer, response, ignore_unknown_fields=True))

    def close(self) -> None:
        self._pool.close()

    def _deadline(self) -> float:
        return time.monotonic() + self._endpoint.timeout_seconds

    def _call(self, method: str, path: str, deadline: float, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        response = self._send(method, path, deadline, None if body is None else json.dumps(body).encode())
        try:
            answer = json.loads(response.data)
        except ValueError:
            answer = None
        if response.status == 200 and isinstance(answer, dict):
            return answer
        message = answer.get("error") if isinstance(answer, dict) else None
        code = _CODES.get(response.status, "UNKNOWN")
        raise ServingError(code, f"HTTP status {response.status}, {message or 'which is not of a model server'}")

    def _send(self, method: str, path: str, deadline: float, body: bytes | None) -> urllib3.BaseHTTPResponse:
        """The last attempt's response."""
        retry, headers = self._retry, {"Content-Type": "application/json"}
        while True:
            response = failure = None
            timeout = urllib3.Timeout(total=max(deadline - time.monotonic(), 1e-3))
            try:
                response = self._pool.urlopen(method, path, body, headers, retries=False, timeout=timeout)
                if not retry.is_retry(method, response.status):
                    return response
            except urllib3.exceptions.HTTPError as error:
                if _is_timeout(error):
                    raise self._deadline_exceeded() from error
                failure = error
            try:
                retry = retry.increment(method, path, response=response, error=failure)
            except urllib3.exceptions.HTTPError as error:  # The attempts are used up.
                if response is not None:
                    return response
                raise ServingError("UNAVAILABLE", f"{self._endpoint.address}: {failure}") from error
            self._wait(retry, deadline)

    def _wait(self, retry: urllib3.Retry, deadline: float) -> None:
        # urllib3 would repeat for the first time at once, which helps no server that is full.
        seconds = max(retry.get_backoff_time(), INITIAL_BACKOFF_SECONDS * random.uniform(0.5, 1.5))
        if time.monotonic() + seconds >= deadline:
            raise self._deadline_exceeded()
        time.sleep(seconds)

    def _deadline_exceeded(self) -> ServingError:
        return ServingError("DEADLINE_EXCEEDED", f"no answer in {self._endpoint.timeout_seconds:g} seconds")


def _is_timeout(error: urllib3.exceptions.HTTPError) -> bool:
    # A refused connection is a kind of timeout to urllib3.
    return isinstance(error, urllib3.exceptions.TimeoutError) and not isinstance(
        error, urllib3.exceptions.NewConnectionError
    )
