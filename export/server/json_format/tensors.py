"""TF Serving's JSON of predict requests, in rows (``instances``) or columns (``inputs``) -> arrays.

The rules are those of TF Serving's ``json_tensor.cc``. Stricter, beside what ``json_format.text`` lists: a name in
``inputs`` that the signature does not have is refused (there it is passed over), and an integer that is too large for
int8, int16 or uint8. Errors name the input and the place, never the value.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf

from export.server.errors import RequestError, invalid_argument
from export.server.json_format.text import Constant, parse_object, shown, type_name
from export.server.loaded_version import Signature

_MAX_RANK = 32
_DIGITS = {np.dtype(np.float32): 24, np.dtype(np.float64): 53}


@dataclasses.dataclass(frozen=True)
class PredictRequest:
    """Body of a predict request.

    Attributes:
      signature_name: "" if the request names none.
      in_rows: whether it holds ``instances``, and the answer ``predictions``; else ``inputs`` and ``outputs``.
      values: of ``instances`` or ``inputs``, as JSON has them.
    """

    signature_name: str
    in_rows: bool
    values: Any

    @classmethod
    def parse(cls, body: bytes) -> PredictRequest:
        """Parses a body.

        Args:
          body: JSON.

        Returns:
          The request, whose values are not looked at yet.

        Raises:
          RequestError: INVALID_ARGUMENT, no JSON object with either key.
        """
        content = parse_object(body)
        if ("instances" in content) == ("inputs" in content):
            received = "both" if "inputs" in content else "neither"
            raise invalid_argument(f"a predict request must have instances or inputs. Received: {received}")
        in_rows = "instances" in content
        values = content["instances" if in_rows else "inputs"]
        if in_rows and (type(values) is not list or not values):
            received = "an empty one" if values == [] else type_name(values)
            raise invalid_argument(f"instances must be an array of at least one. Received: {received}")
        return cls(signature_name_of(content), in_rows, values)

    def tensors(self, signature: Signature) -> dict[str, np.ndarray]:
        """Converts the values to arrays.

        Shapes are those of the request, except that all rows have the same; whether they fit the signature is left to
        the caller.

        Args:
          signature: that is called.

        Returns:
          Input -> array of the signature's dtype, object arrays of bytes for strings.

        Raises:
          RequestError: missing or unknown inputs, ragged or mixed values, or values that the dtype cannot hold.
        """
        names = list(signature.inputs)
        return {
            source.name: _to_array(values, signature.inputs[source.name].dtype, source)
            for source, values in (self._rows(names) if self.in_rows else self._columns(names))
        }

    def _columns(self, names: Sequence[str]) -> list[tuple[_Source, Any]]:
        if _is_object(self.values):
            _require_names(self.values, names, "inputs")
            return [(_Source(name, "inputs", f".{name}"), self.values[name]) for name in names]
        _require_single(names, "inputs", self.values)
        return [(_Source(names[0], "inputs"), self.values)]

    def _rows(self, names: Sequence[str]) -> list[tuple[_Source, list]]:
        if not _is_object(self.values[0]):
            _require_single(names, "instances[0]", self.values[0])
            return [(_Source(names[0], "instances"), self.values)]
        if set(map(type, self.values)) != {dict} or set(map(len, self.values)) != {len(names)}:
            _find_wrong_row(self.values, names)
        try:
            columns = [list(map(operator.itemgetter(name), self.values)) for name in names]
        except KeyError:
            _find_wrong_row(self.values, names)
            raise
        return [(_Source(name, "instances", f".{name}"), column) for name, column in zip(names, columns, strict=True)]


def signature_name_of(content: Mapping[str, Any]) -> str:
    """Returns the ``signature_name`` of a body's ``content``, "" if it has none.

    Raises:
      RequestError: INVALID_ARGUMENT, it is no string.
    """
    name = content.get("signature_name", "")
    if type(name) is not str:
        raise invalid_argument(f"signature_name must be a string. Received: {type_name(name)}")
    return name


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where in the request the values of an input stand."""

    name: str
    key: str
    member: str = ""

    def error(self, indices: Sequence[int], rule: str, received: str) -> RequestError:
        first, others = indices[: self.key == "instances"], indices[self.key == "instances" :]
        place = f"{self.key}{_subscripts(first)}{self.member}{_subscripts(others)}"
        return invalid_argument(f"input {self.name!r}: {place} {rule}. Received: {received}")


def _subscripts(indices: Sequence[int]) -> str:
    return "".join(f"[{index}]" for index in indices)


def is_base64(value: Any) -> bool:
    """Returns whether ``value`` stands for bytes: {"b64": "..."}."""
    return type(value) is dict and len(value) == 1 and type(value.get("b64")) is str


def _is_object(value: Any) -> bool:
    return type(value) is dict and not is_base64(value)


def _require_single(names: Sequence[str], place: str, value: Any) -> None:
    if len(names) != 1:
        raise invalid_argument(
            f"{place} must be an object of the signature's inputs {', '.join(names)}. Received: {type_name(value)}"
        )


def _require_names(received: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    missing = [name for name in names if name not in received]
    unknown = [shown(name) for name in itertools.islice(received, len(names) + 1) if name not in names]
    if missing or unknown:
        parts = ("no " + ", ".join(missing) if missing else "", "unknown " + ", ".join(unknown) if unknown else "")
        found = " and ".join(filter(None, parts))
        raise invalid_argument(f"{place} must have the signature's inputs {', '.join(names)}. Received: {found}")


def _find_wrong_row(rows: Sequence[Any], names: Sequence[str]) -> None:
    for index, row in enumerate(rows):
        if not _is_object(row):
            _require_single((), f"instances[{index}]", row)
        _require_names(row, names, f"instances[{index}]")


# --- Nested lists -> arrays -------------------------------------------------------------------------------------------


def _to_array(values: Any, dtype: tf.DType, source: _Source) -> np.ndarray:
    flat, shape = _flatten(values, source)

    def error_at(index: int, rule: str, received: str) -> RequestError:
        return source.error([int(part) for part in np.unravel_index(index, shape)], rule, received)

    return _converter(dtype)(flat, dtype.as_numpy_dtype, error_at).reshape(shape)


def _flatten(values: Any, source: _Source) -> tuple[list, tuple[int, ...]]:
    """(the innermost values, the shape that the first of each list has and all must have)."""
    if type(values) is not list:
        return [values], ()
    shape, level = [len(values)], values
    while level and type(level[0]) is list:
        size = len(level[0])
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            wrong = next(i for i, entry in enumerate(level) if type(entry) is not list or len(entry) != size)
            indices = [int(part) for part in np.unravel_index(wrong, shape)]
            entry = level[wrong]
            received = f"{len(entry)} values" if type(entry) is list else type_name(entry)
            raise source.error(indices, f"must be an array of {size} values, as the first one is", received)
        shape.append(size)
        if len(shape) > _MAX_RANK:
            raise source.error([], f"must be nested at most {_MAX_RANK} arrays deep", "more")
        level = list(itertools.chain.from_iterable(level))
    return level, tuple(shape)


_ErrorAt = Callable[[int, str, str], RequestError]


def _converter(dtype: tf.DType) -> Callable[[list, Any, _ErrorAt], np.ndarray]:
    if dtype == tf.string:
        return _strings
    if dtype == tf.bool:
        return _booleans
    if dtype in (tf.float32, tf.float64):
        return _floats
    if dtype.is_integer and not dtype.is_quantized:
        return _integers
    raise RequestError(grpc.StatusCode.UNIMPLEMENTED, f"JSON has no values of type {dtype.name}. Use gRPC")


def _require_types(flat: list, allowed: set[type], rule: str, error_at: _ErrorAt) -> None:
    if set(map(type, flat)) - allowed:
        wrong = next(i for i, value in enumerate(flat) if type(value) not in allowed)
        raise error_at(wrong, rule, type_name(flat[wrong]))


def _strings(flat: list, _, error_at: _ErrorAt) -> np.ndarray:
    rule = 'must be a string, or bytes as {"b64": "..."}'
    _require_types(flat, {str, dict}, rule, error_at)
    texts: list[bytes] = []
    try:
        for value in flat:
            texts.append(value.encode() if type(value) is str else decode_base64(value))
    except ValueError as error:
        raise error_at(len(texts), rule, str(error)) from None
    return object_array(texts)


def object_array(values: list) -> np.ndarray:
    """Returns ``values``, of any type, as a vector; NumPy must not look into them."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def decode_base64(value: dict) -> bytes:
    """Decodes {"b64": "..."}; padding may be left out, and white space stand between.

    Args:
      value: the object.

    Returns:
      Its bytes.

    Raises:
      ValueError: what was received instead.
    """
    if not is_base64(value):
        raise ValueError("another object")
    text = "".join(value["b64"].split())
    try:
        return base64.b64decode(text if text.endswith("=") else text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise ValueError("text that is no base64") from None


def _booleans(flat: list, _, error_at: _ErrorAt) -> np.ndarray:
    _require_types(flat, {bool}, "must be true or false", error_at)
    return np.array(flat, np.bool_)


def _integers(flat: list, dtype: Any, error_at: _ErrorAt) -> np.ndarray:
    limits = np.iinfo(dtype)
    rule = f"must be an integer of type {limits.dtype.name}"
    _require_types(flat, {int}, rule, error_at)
    if flat and (min(flat) < limits.min or max(flat) > limits.max):
        wrong = next(i for i, value in enumerate(flat) if not limits.min <= value <= limits.max)
        raise error_at(wrong, rule, "an integer beyond it")
    return np.array(flat, dtype)


def _floats(flat: list, dtype: Any, error_at: _ErrorAt) -> np.ndarray:
    """Integers must be exact in the dtype, and finite numbers must not round to infinity in it."""
    name = np.dtype(dtype).name
    _require_types(flat, {float, int, Constant}, f"must be a number of type {name}", error_at)
    try:
        numbers = np.array(flat, np.float64)
    except OverflowError:  # An integer beyond the largest float64.
        numbers = np.array([float(value) if abs(value) < 2**1023 else np.inf for value in flat])
    exact = 2 ** _DIGITS[np.dtype(dtype)] - 1
    with np.errstate(over="ignore"):
        rounded = numbers.astype(dtype)
    for index in np.flatnonzero(~(np.abs(numbers) <= exact)).tolist():  # Few, mostly none.
        value = flat[index]
        if type(value) is int and -(2**63) <= value < 2**64:  # Larger integers are read as floats.
            raise error_at(index, f"must be a number of type {name}", "an integer that is not exact in it")
        # The shortest text of the largest float32, 3.4028235e+38, is a little above it, and rounds to it.
        if type(value) is not Constant and np.isinf(rounded[index]):
            raise error_at(index, f"must be a number of type {name}", "a number beyond its range")
    return rounded
