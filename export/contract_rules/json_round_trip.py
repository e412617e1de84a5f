"""Rules of REST: requests and answers as the JSON that TF Serving reads and writes (json_tensor.cc)."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from export.contract_rules.behaviour import call, each_signature
from export.contract_rules.requests import Requests
from export.contract_rules.rules import Finding, NotApplicable, version_rule
from export.contract_rules.signatures import JSON_DTYPES
from export.contract_rules.version import Version

_BYTES_SUFFIX = "_bytes"
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
        problems = []
        for name, values in call(version, requests, requests.typical(_ROWS), "a request").items():
            try:
                text = json.dumps(_answer_to_json(name, values), allow_nan=False)
            except UnicodeDecodeError:
                problems.append(f"{name} holds bytes that are no UTF-8 text. Rename it to {name}{_BYTES_SUFFIX}")
            except ValueError:
                problems.append(f"{name} is not finite")
            else:
                if not _same(_from_json(json.loads(text), values.dtype, values.shape), values):
                    problems.append(f"{name} changes when it is written and read")
        return problems

    return each_signature(version, check)


@version_rule(
    title="Requests written as JSON get the answers of the same tensors",
    why="REST clients send lists, with serialized Examples as base64; another answer means that digits are lost, or "
    "that the model does not answer the same twice (json_tensor.cc).",
)
def json_requests(version: Version) -> Finding:
    def check(requests: Requests) -> list[str]:
        _require_json_dtypes(requests)
        inputs = requests.typical(_ROWS)
        again = {
            name: _from_json(json.loads(json.dumps(_request_to_json(values))), values.dtype, values.shape)
            for name, values in inputs.items()
        }
        changed = [name for name in inputs if not _same(again[name], inputs[name])]
        if changed:
            return [f"{name} changes when it is written and read" for name in changed]
        expected = call(version, requests, inputs, "tensors")
        received = call(version, requests, again, "JSON")
        differing = [name for name in expected if not _same(received[name], expected[name])]
        return [f"{name} differs between two equal requests" for name in differing]

    return each_signature(version, check)


def _require_json_dtypes(requests: Requests) -> None:
    infos = [*requests.signature.inputs.values(), *requests.signature.outputs.values()]
    if any(info.dtype not in JSON_DTYPES for info in infos):
        raise NotApplicable("has dtypes that JSON does not know, see the rule tensor_dtypes")


def _answer_to_json(name: str, values: np.ndarray) -> Any:
    if values.dtype != object:
        return values.tolist()
    if name.endswith(_BYTES_SUFFIX):
        return _map(values.tolist(), _base64)
    return _map(values.tolist(), bytes.decode)


def _request_to_json(values: np.ndarray) -> Any:
    """Text where it is text: a client may send either."""
    return _map(values.tolist(), _text_or_base64) if values.dtype == object else values.tolist()


def _text_or_base64(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _base64(value)


def _base64(value: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(value).decode()}


def _from_json(value: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Nested lists -> array; ``shape`` tells the later dimensions of a list without rows."""
    if dtype.kind != "O":
        return np.array(value, dtype).reshape(shape)
    result = np.empty(shape, object)
    result.ravel()[:] = _leaves(value)
    return result


def _leaves(value: Any) -> list[bytes]:
    if isinstance(value, list):
        return [leaf for entry in value for leaf in _leaves(entry)]
    return [base64.b64decode(value["b64"]) if isinstance(value, dict) else value.encode()]


def _map(value: Any, function) -> Any:
    return [_map(entry, function) for entry in value] if isinstance(value, list) else function(value)


def _same(received: np.ndarray, expected: np.ndarray) -> bool:
    if received.shape != expected.shape:
        return False
    if expected.dtype.kind == "f":
        return bool(np.allclose(received, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True))
    return bool(np.array_equal(received, expected))
