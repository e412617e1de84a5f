"""Requests over REST that a server must refuse, see ``malformed_requests``."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any

import grpc
import tensorflow as tf

from benchmarks.malformed_requests import (
    EXAMPLES,
    HOSTILE_TEXTS,
    RANK,
    RAW,
    ROWS,
    Malformed,
    Target,
    broken_lists,
    good_tensors,
    input_of,
    no_example,
    wrong_kind,
)

_MANY_KEYS = 50_000


def rest_request(choose: random.Random, target: Target) -> Malformed:
    """A request over REST."""
    return choose.choice(_BREAKERS + (_RANK_BREAKERS if RANK in target.signatures else ()))(choose, target)


def _rest(kind: str, target: Target, body: Any, field: str, verb: str = "predict", **options) -> Malformed:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Malformed(kind, f"/v1/models/{target.model}:{verb}", text, field, **options)


def _raw_body(choose: random.Random, target: Target) -> dict[str, Any]:
    """A good body, in rows or columns; the name of a random input is what breakers ask for."""
    columns = {name: values.tolist() for name, values in good_tensors(choose, target.signatures[RAW]).items()}
    if choose.random() < 0.5:
        return {"signature_name": RAW, "inputs": columns}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"signature_name": RAW, "instances": rows}


def _holder(choose: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Where inputs stand by name: the columns, or a row."""
    return body["inputs"] if "inputs" in body else choose.choice(body["instances"])


def _cut_json(choose: random.Random, target: Target) -> Malformed:
    text = json.dumps(_raw_body(choose, target)).encode()
    return _rest("cut JSON", target, text[: choose.randrange(len(text))], "JSON parse error")


def _garbage(choose: random.Random, target: Target) -> Malformed:
    noise = choose.randbytes(choose.randrange(1, 200))
    texts = (b"[" * 100_000, b'{"a":' * 50_000, b'{"inputs": ' + b"9" * 5000 + b"}", b'{"inputs": "\\ud800"}', b"\xff")
    return _rest("garbage", target, choose.choice((b"\x00" + noise, *texts)), "JSON parse error")


def _no_object(choose: random.Random, target: Target) -> Malformed:
    return _rest("no object", target, choose.choice([[], [1], "text", 5, None, True]), "body")


def _keys(choose: random.Random, target: Target) -> Malformed:
    body = _raw_body(choose, target)
    if choose.random() < 0.5:
        body |= {"instances": [1], "inputs": [1]}
    else:
        body = {"signature_name": RAW, choose.choice(["Inputs", "instance", ""]): 1}
    return _rest("keys", target, body, "instances")


def _rest_signature(choose: random.Random, target: Target) -> Malformed:
    name = choose.choice(["absent", "Predict_Raw", "x" * 300])
    return _rest("signature", target, {"signature_name": name, "instances": [1]}, name[:50])


def _signature_type(choose: random.Random, target: Target) -> Malformed:
    return _rest(
        "signature type", target, {"signature_name": choose.choice([1, None, [], {}]), "inputs": 1}, "signature_name"
    )


def _missing_input(choose: random.Random, target: Target) -> Malformed:
    body, name = _raw_body(choose, target), input_of(choose, target)
    del _holder(choose, body)[name]
    return _rest("missing input", target, body, name)


def _unknown_input(choose: random.Random, target: Target) -> Malformed:
    body = _raw_body(choose, target)
    name = "unknown" + choose.choice(HOSTILE_TEXTS)
    _holder(choose, body)[name] = 1
    return _rest("unknown input", target, body, "unknown")


def _wrong_type(choose: random.Random, target: Target) -> Malformed:
    body, name = _raw_body(choose, target), input_of(choose, target)
    is_text = target.signatures[RAW].inputs[name].dtype == tf.string
    wrong = [None, {}, {"b64": 1}, {"b64": "*"}, {"b65": "AA=="}, True] + ([1, 2.5] if is_text else ["1", "NaN"])
    holder = _holder(choose, body)
    holder[name] = _replace_one(choose, holder[name], choose.choice(wrong))
    return _rest("wrong type", target, body, name)


def _replace_one(choose: random.Random, values: Any, replacement: Any) -> Any:
    if not isinstance(values, list):
        return replacement
    index = choose.randrange(len(values))
    return [_replace_one(choose, entry, replacement) if i == index else entry for i, entry in enumerate(values)]


def _absurd_number(choose: random.Random, target: Target) -> Malformed:
    numbers = [name for name, spec in target.signatures[RAW].inputs.items() if spec.dtype != tf.string]
    body, name = _raw_body(choose, target), choose.choice(sorted(numbers))
    holder = _holder(choose, body)
    holder[name] = _replace_one(choose, holder[name], "ABSURD")
    absurd = choose.choice(["1e400", "-1e400", "1" + "0" * 400, "9007199254740993.5e300", str(2**64 + 1) + "e30"])
    return _rest("absurd number", target, json.dumps(body).replace('"ABSURD"', absurd).encode(), name)


def _ragged(choose: random.Random, target: Target) -> Malformed:
    body, name = _raw_body(choose, target), input_of(choose, target)
    holder = _holder(choose, body)
    holder[name] = _replace_one(choose, holder[name], [1, [2]])
    return _rest("ragged", target, body, name)


def _rest_rank(choose: random.Random, target: Target) -> Malformed:
    body, name = _raw_body(choose, target), input_of(choose, target)
    places = [body["inputs"]] if "inputs" in body else body["instances"]
    for place in places:
        place[name] = [place[name]]
    return _rest("rank", target, body, name)


def _rest_rows(choose: random.Random, target: Target) -> Malformed:
    columns = {name: values.tolist() for name, values in good_tensors(choose, target.signatures[RAW]).items()}
    name = input_of(choose, target)
    columns[name] = columns[name][: choose.randrange(ROWS)]
    return _rest("rows", target, {"signature_name": RAW, "inputs": columns}, name)


def _twice(choose: random.Random, target: Target) -> Malformed:
    name = input_of(choose, target)
    text = json.dumps(_raw_body(choose, target))
    if choose.random() < 0.1:  # A late key of many: the search for it must not compare each with each.
        others = "".join(f'"{number}": 0, ' for number in range(_MANY_KEYS))
        text = f'{{{others}"{name}": 0, "{name}": 0}}'
    else:
        text = text.replace(f'"{name}":', f'"{name}": 1, "{name}":')
    return _rest("twice", target, text.encode(), name)


def _rest_example(choose: random.Random, target: Target) -> Malformed:
    field = next(iter(target.signatures[EXAMPLES].inputs))
    field, content = (field, no_example(choose, target)) if choose.random() < 0.5 else wrong_kind(choose, target)
    content = content if isinstance(content, bytes) else content.SerializeToString()
    return _rest("Example", target, {"instances": [{"b64": base64.b64encode(content).decode()}]}, field)


def _feature_type(choose: random.Random, target: Target) -> Malformed:
    name, verb = choose.choice(sorted(target.features)), choose.choice(["classify", "regress"])
    examples = [{}, {name: choose.choice([None, [[1]], [1, "a"], [1, 2.5], {"b64": "*"}, {"a": 1}, 2**64, 1e39])}]
    return _rest("feature type", target, {"signature_name": verb, "examples": examples}, name, verb)


def _examples(choose: random.Random, target: Target) -> Malformed:
    body = choose.choice([{}, {"examples": []}, {"examples": {}}, {"examples": [1]}, {"examples": None}])
    return _rest("examples", target, {**body, "signature_name": "classify"}, "examples", "classify")


def _rest_place(choose: random.Random, target: Target) -> Malformed:
    name = choose.choice(["absent", "absent" * 50, "absent%00", "absent%20%C3%A9"])
    body = json.dumps(_raw_body(choose, target)).encode()
    if choose.random() < 0.5:
        return Malformed("model", f"/v1/models/{name}:predict", body, "absent", grpc.StatusCode.NOT_FOUND)
    version = choose.randrange(10**6, 10**9)
    path = f"/v1/models/{target.model}/versions/{version}:predict"
    return Malformed("version", path, body, str(version), grpc.StatusCode.NOT_FOUND)


def _broken_list(choose: random.Random, target: Target) -> Malformed:
    text = base64.b64encode(broken_lists(choose, target)).decode()
    body = choose.choice([{"instances": [{"b64": text}]}, {"inputs": {"requests": [{"b64": text}]}}])
    return _rest("list", target, {"signature_name": RANK, **body}, "requests")


def _no_list(choose: random.Random, target: Target) -> Malformed:
    value = choose.choice([1, None, [["a"]], {"b64": "*"}, {"items": []}])
    return _rest("no list", target, {"signature_name": RANK, "inputs": {"requests": [value]}}, "requests")


_BREAKERS: tuple[Callable[[random.Random, Target], Malformed], ...] = (
    _cut_json, _garbage, _no_object, _keys, _rest_signature, _signature_type, _missing_input, _unknown_input,
    _wrong_type, _absurd_number, _ragged, _rest_rank, _rest_rows, _twice, _rest_example, _feature_type, _examples,
    _rest_place,
)  # fmt: skip
_RANK_BREAKERS = (_broken_list, _no_list)
