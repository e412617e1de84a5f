"""How a request fails: one exception that both protocols translate, with TF Serving's codes."""

from __future__ import annotations

import grpc

# HTTP status of each code, as in TF Serving's net_http (`http_server.cc`); but a full queue answers 503, not 429.
_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.INTERNAL: 500,
}


class RequestError(Exception):
    """A request that cannot be answered, with the code that its client receives."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code

    @property
    def http_status(self) -> int:
        return _HTTP_STATUS[self.code]


def invalid_argument(message: str) -> RequestError:
    """The error of a malformed request; the message names the field."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)
