"""Arrays -> TF Serving's JSON of answers: predictions in rows or columns, classes and regressed values."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from clsd_tf.data.columns import decimals
from export.server.errors import RequestError, invalid_argument
from export.server.json_format.tensors import object_array


def predict_answer(outputs: Mapping[str, np.ndarray], in_rows: bool) -> bytes:
    """Writes the answer to Predict: ``predictions``, one a row, or ``outputs``, one a name; a single output is bare.

    Args:
      outputs: output -> array; object arrays of bytes for strings.
      in_rows: ``predictions`` instead of ``outputs``.

    Returns:
      The body.

    Raises:
      RequestError: outputs that JSON cannot hold, or without the same number of rows.
    """
    columns = {name: _to_json(name, outputs[name]) for name in sorted(outputs)}
    if not in_rows:
        return dump({"outputs": columns if len(columns) > 1 else next(iter(columns.values()))})
    sizes = {name: outputs[name].shape[:1] for name in columns}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise invalid_argument(
            f"a row format needs outputs of one number of rows. Received: {', '.join(sizes)} with several or none. "
            "Send inputs instead of instances"
        )
    if len(columns) == 1:
        return dump({"predictions": next(iter(columns.values()))})
    return dump({"predictions": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]})


def classify_answer(outputs: Mapping[str, np.ndarray]) -> bytes:
    """Writes the answer to Classify: ``results``, of each example its classes as [label, score].

    Args:
      outputs: ``classes``, bytes [num_examples, num_classes], and/or ``scores`` of that shape; "" and 0.0 stand for
        those that are absent.

    Returns:
      The body.
    """
    shape = next(iter(outputs.values())).shape
    labels = outputs.get("classes", np.full(shape, b"", object)).tolist()
    scores = _to_json("scores", outputs.get("scores", np.zeros(shape, np.float32)))
    return dump({"results": [list(map(_class, *row)) for row in zip(labels, scores, strict=True)]})


def _class(label: bytes, score: float) -> tuple[str, float]:
    return label.decode("utf-8", "replace"), score


def regress_answer(outputs: Mapping[str, np.ndarray]) -> bytes:
    """Writes the answer to Regress: ``results``, the value of each example.

    Args:
      outputs: ``outputs``, float32 [num_examples] or [num_examples, 1].

    Returns:
      The body.
    """
    return dump({"results": _to_json("outputs", outputs["outputs"].ravel())})


def dump(value: Any) -> bytes:
    """Returns ``value`` as JSON in UTF-8; numbers that are not finite as NaN, Infinity and -Infinity."""
    return json.dumps(value, ensure_ascii=False).encode()


def _to_json(name: str, values: np.ndarray) -> Any:
    kind = values.dtype.kind
    if kind == "f":
        return decimals(values).tolist()
    if kind in "iub":
        return values.tolist()
    if kind == "O":
        return _texts(name, values).tolist()
    raise RequestError(grpc.StatusCode.UNIMPLEMENTED, f"output {name}: JSON has no values of its type. Use gRPC")


def _texts(name: str, values: np.ndarray) -> np.ndarray:
    flat = values.ravel().tolist()
    if name.endswith("_bytes"):
        return object_array([{"b64": base64.b64encode(value).decode()} for value in flat]).reshape(values.shape)
    try:
        return object_array([value.decode() for value in flat]).reshape(values.shape)
    except UnicodeDecodeError:
        raise invalid_argument(
            f"output {name}: JSON holds text in UTF-8. Received: other bytes. Use gRPC, or name the output {name}_bytes"
        ) from None
