"""Malformed requests against a running server: which were not refused as they have to be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import grpc
import urllib3

from benchmarks.malformed_grpc import grpc_request
from benchmarks.malformed_requests import Malformed, Target
from benchmarks.malformed_rest import rest_request
from export.server.errors import RequestError

_TIMEOUT_SECONDS = 30.0


def send_malformed(target: Target, grpc_address: str, rest_address: str, count: int, seed: int = 0) -> list[str]:
    """Sends ``count`` malformed requests, half of them over each protocol.

    Returns:
      A sentence for each that got an answer, another code than its own, or a message that does not name the field.
    """
    choose = random.Random(seed)
    problems = []
    with grpc.insecure_channel(grpc_address) as channel, urllib3.HTTPConnectionPool(*_split(rest_address)) as pool:
        for index in range(count):
            if index % 2:
                problems += _problem(grpc_request(choose, target), lambda request: _over_grpc(channel, request))
            else:
                problems += _problem(rest_request(choose, target), lambda request: _over_rest(pool, request))
    return problems


def _problem(request: Malformed, send: Callable[[Malformed], tuple[bool, str, str]]) -> list[str]:
    is_right, code, message = send(request)
    if not is_right:
        return [f"{request.kind}: {code} instead of {request.code.name}"]
    return [] if request.field in message else [f"{request.kind}: the message does not name {request.field!r}"]


def _over_grpc(channel: grpc.Channel, request: Malformed) -> tuple[bool, str, str]:
    call = channel.unary_unary(f"/tensorflow.serving.PredictionService/{request.address}")
    try:
        call(request.body, timeout=_TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        return error.code() == request.code, error.code().name, error.details() or ""
    return False, "an answer", ""


def _over_rest(pool: urllib3.HTTPConnectionPool, request: Malformed) -> tuple[bool, str, str]:
    answer = pool.urlopen("POST", request.address, request.body, retries=False, timeout=_TIMEOUT_SECONDS)
    is_right = answer.status == RequestError(request.code, "").http_status
    try:
        message = json.loads(answer.data)["error"]
    except (ValueError, KeyError, TypeError):
        message = ""
    return is_right, str(answer.status), message


def _split(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)
