"""TF Serving's JSON of classify and regress requests: ``examples`` and their shared ``context`` -> tf.Examples.

A feature is a value or a list of values of one kind, by TF Serving's rules: strings and {"b64": "..."} are bytes,
integers and booleans int64, numbers with a fraction or an exponent floats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from export.server.errors import invalid_argument
from export.server.json_format.tensors import decode_base64, signature_name_of
from export.server.json_format.text import Constant, parse_object, shown, type_name
from export.server.tensor_protos import with_context

_KINDS = {
    str: "bytes_list",
    dict: "bytes_list",
    int: "int64_list",
    bool: "int64_list",
    float: "float_list",
    Constant: "float_list",
}


@dataclasses.dataclass(frozen=True)
class ExamplesRequest:
    """The body of a classify or regress request.

    Attributes:
      signature_name: "" if the request names none.
      examples: serialized tf.Examples: each the context's features and then its own, which count where both have one.
    """

    signature_name: str
    examples: Sequence[bytes]

    @classmethod
    def parse(cls, body: bytes, max_bytes: int) -> ExamplesRequest:
        """Parses a body.

        Args:
          body: JSON.
          max_bytes: that the examples may take, each with the context.

        Returns:
          The request.

        Raises:
          RequestError: INVALID_ARGUMENT, naming example and feature, never a value.
        """
        content = parse_object(body)
        context = _serialized(content["context"], "context") if "context" in content else b""
        examples = content.get("examples")
        if type(examples) is not list or not examples:
            received = (
                "none" if "examples" not in content else "an empty one" if examples == [] else type_name(examples)
            )
            raise invalid_argument(f"examples must be an array of at least one object. Received: {received}")
        serialized = [_serialized(value, f"examples[{index}]") for index, value in enumerate(examples)]
        return cls(signature_name_of(content), with_context(context, serialized, max_bytes))


def _serialized(features: Any, place: str) -> bytes:
    if type(features) is not dict:
        raise invalid_argument(f"{place} must be an object of features. Received: {type_name(features)}")
    example = tf.train.Example()
    by_name = example.features.feature
    for name, values in features.items():
        try:
            _fill(by_name[name], values if type(values) is list else [values])
        except ValueError as error:
            raise invalid_argument(f"feature {place}[{shown(name)}] must be {error}") from None
    return example.SerializeToString()


def _fill(feature: tf.train.Feature, values: list) -> None:
    """Gives a feature its values.

    Raises:
      ValueError: what the values must be, and what was received.
    """
    kinds = {_KINDS.get(kind) for kind in set(map(type, values))}
    if len(kinds) > 1 or None in kinds:
        received = " and ".join(dict.fromkeys(map(type_name, values)))
        raise ValueError(f"strings, integers or numbers with a fraction, or a list of one kind. Received: {received}")
    if "bytes_list" in kinds:
        feature.bytes_list.value[:] = [value.encode() if type(value) is str else _bytes_of(value) for value in values]
    elif "int64_list" in kinds:
        if not -(2**63) <= min(values) <= max(values) < 2**63:
            raise ValueError("integers of type int64. Received: one beyond it")
        feature.int64_list.value[:] = map(int, values)  # True is no number to protobuf.
    elif "float_list" in kinds:
        with np.errstate(over="ignore"):
            rounded = np.array(values, np.float64).astype(np.float32)
        if any(type(values[index]) is not Constant for index in np.flatnonzero(np.isinf(rounded))):
            raise ValueError("numbers of type float32. Received: one beyond its range")
        feature.float_list.value[:] = rounded.tolist()


def _bytes_of(value: dict) -> bytes:
    try:
        return decode_base64(value)
    except ValueError as error:
        raise ValueError(f'strings, or bytes as {{"b64": "..."}}. Received: {error}') from None
