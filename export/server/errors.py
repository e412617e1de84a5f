"""Failures of requests: one exception that both protocols translate, with TF Serving's codes."""

from __future__ import annotations

import traceback

import grpc
from absl import logging

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
# gRPC sends messages as metadata, which is limited to 8 KiB, and names in requests may have any length.
_MAX_MESSAGE_CHARACTERS = 1000


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
      code: that its client receives.
      message: for the client; cut to 1000 characters.

    Attributes:
      code: as given.
    """

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message[:_MAX_MESSAGE_CHARACTERS])
        self.code = code

    @property
    def http_status(self) -> int:
        return _HTTP_STATUS[self.code]


def invalid_argument(message: str) -> RequestError:
    """Returns the error of a malformed request; ``message`` names the field."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


def internal_error(error: BaseException) -> RequestError:
    """Logs where an error happened that no request should cause, but not its message, which may quote the request.

    Args:
      error: with its traceback.

    Returns:
      The answer, INTERNAL.
    """
    where = "".join(traceback.format_tb(error.__traceback__))
    logging.error("%s while answering a request:\n%s", type(error).__name__, where)
    return RequestError(grpc.StatusCode.INTERNAL, f"{type(error).__name__} in the server; its log says where")
