"""Rules of REST: the JSON of requests and answers, read and written by the local server's code for it.

That code follows TF Serving's json_tensor.cc, and is held to it by tests of its own.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from export.contract_rules.behavior import call, each_signature
from export.contract_rules.findings import Finding, NotApplicable
from export.contract_rules.requests import Inputs, Requests
from export.contract_rules.rules import version_rule
from export.contract_rules.signatures import JSON_DTYPES
from export.contract_rules.version import Version
from export.server.errors import RequestError
from export.server.json_format.answers import predict_answer
from export.server.json_format.tensors import PredictRequest
from export.server.loaded_version import signature_of

_ROWS = 2
_TOLERANCE = 1e-5


@version_rule(
    title="Answers can be written as JSON",
    why="Strings are written as text unless the output's name ends in _bytes, and NaN and infinity as words that JSON "
    "parsers refuse (json_tensor.cc).",
)
def json_answers(version: Version) -> Finding:
    def check(requests: Requests) -> list[str]:
        _require_json_dtypes(requests)
        outputs = call(version, requests, requests.typical(_ROWS), "a request")
        return [problem for name, values in outputs.items() for problem in _answer_problems(name, values)]

    return each_signature(version, check)


def _answer_problems(name: str, values: np.ndarray) -> list[str]:
    try:
        body = predict_answer({name: values}, in_rows=True)
        answer = json.loads(body, parse_constant=_refuse)["predictions"]
    except RequestError as error:
        return [str(error)]
    except ValueError:
        return [f"{name} is not finite"]
    return [] if _is_same(_parsed(answer, values), values) else [f"{name} changes when it is written and read"]


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


@version_rule(
    title="Requests written as JSON get the answers of the same tensors",
    why="REST clients send rows or columns, with serialized Examples as base64 and other strings as text; another "
    "answer means that values are read as something else, or that the model does not answer the same twice "
    "(json_tensor.cc).",
)
def json_requests(version: Version) -> Finding:
    def check(requests: Requests) -> list[str]:
        _require_json_dtypes(requests)
        inputs = requests.typical(_ROWS)
        expected = call(version, requests, inputs, "tensors")
        problems = []
        for form in ("instances", "inputs"):
            try:
                again = _read(requests, form, inputs)
            except RequestError as error:
                problems.append(f"{form}: {error}")
                continue
            changed = [name for name in inputs if not _is_same(again[name], inputs[name])]
            problems += [f"{form}: {name} is read as something else" for name in changed]
            if not changed:
                received = call(version, requests, again, "JSON")
                differing = [name for name in expected if not _is_same(received[name], expected[name])]
                problems += [f"{form}: {name} differs between two equal requests" for name in differing]
        return problems

    return each_signature(version, check)


def _read(requests: Requests, form: str, inputs: Inputs) -> Inputs:
    """The tensors that a server makes of the JSON which a client makes of ``inputs``."""
    columns = {name: _column(values, name == requests.examples_input) for name, values in inputs.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    body = json.dumps({"signature_name": requests.name, form: columns if form == "inputs" else rows})
    return PredictRequest.parse(body.encode()).tensors(signature_of(requests.name, requests.signature))


def _column(values: np.ndarray, is_serialized: bool) -> list:
    if values.dtype != object:
        return values.tolist()
    return _map(values.tolist(), _base64 if is_serialized else _text)


def _text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _base64(value)


def _base64(value: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(value).decode()}


def _require_json_dtypes(requests: Requests) -> None:
    infos = [*requests.signature.inputs.values(), *requests.signature.outputs.values()]
    if any(info.dtype not in JSON_DTYPES for info in infos):
        raise NotApplicable("has dtypes that JSON does not know, see the rule tensor_dtypes")


def _parsed(value: Any, like: np.ndarray) -> np.ndarray:
    """Array that a client reads from nested lists; the shape tells the later dimensions of a list without rows."""
    if like.dtype != object:
        return np.array(value, like.dtype).reshape(like.shape)
    result = np.empty(like.shape, object)
    result.ravel()[:] = _leaves(value)
    return result


def _leaves(value: Any) -> list[bytes]:
    if isinstance(value, list):
        return [leaf for entry in value for leaf in _leaves(entry)]
    return [base64.b64decode(value["b64"]) if isinstance(value, dict) else value.encode()]


def _map(value: Any, function) -> Any:
    return [_map(entry, function) for entry in value] if isinstance(value, list) else function(value)


def _is_same(received: np.ndarray, expected: np.ndarray) -> bool:
    if received.shape != expected.shape:
        return False
    if expected.dtype.kind == "f":
        return bool(np.allclose(received, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True))
    return bool(np.array_equal(received, expected))
