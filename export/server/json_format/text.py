"""Bodies of JSON requests -> Python objects, as TF Serving's parser reads them.

Stricter in three places: a key that an object has twice is refused (there the first one counts, or the tensor breaks),
and so are bytes that are no UTF-8 and escapes of half a character.
"""

from __future__ import annotations

import collections
import json
import re
from typing import Any

from export.server.errors import invalid_argument

_MAX_NAME_CHARACTERS = 100
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # Or one of the two halves that make a character.
# What repeats is a class: a group would remember each repetition, 2 GB for a long text. Strings end at the end of the
# text at the latest: otherwise a body of quotes takes quadratic time.
_STRING_OR_CONSTANT = re.compile(r'"[^"]*"?|-NaN|-?Inf(?:inity)?')
_CONSTANTS = {"-NaN": "NaN", "Inf": "Infinity", "-Inf": "-Infinity"}


class Constant(float):
    """A number that was written as NaN or Infinity; one such as 1e999 is a plain float."""


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses the object that a request's body holds.

    Args:
      body: JSON in UTF-8.

    Returns:
      The object. Numbers NaN, Inf, Infinity and their negatives are ``Constant``.

    Raises:
      RequestError: INVALID_ARGUMENT, with the offset in characters; never with a value.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid_argument(
            f"JSON parse error: the body must be UTF-8. Received: another byte at offset {error.start}"
        ) from None
    try:
        value = _decode(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid_argument("JSON parse error: \\u escapes must make whole characters") from None
    except json.JSONDecodeError as error:
        raise invalid_argument(f"JSON parse error: {error.msg} at offset {error.pos}") from None
    except RecursionError:
        raise invalid_argument("JSON parse error: values must not be nested deeper than tensors are") from None
    except ValueError:  # An integer of thousands of digits.
        raise invalid_argument("JSON parse error: numbers must fit 64 bits. Received: an integer far beyond") from None
    if type(value) is not dict:
        raise invalid_argument(f"the body must be a JSON object. Received: {type_name(value)}")
    return value


def _decode(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        if "Inf" not in text and "-NaN" not in text:
            raise
    return _DECODER.decode(_with_known_constants(text))


def _with_known_constants(text: str) -> str:
    """The constants that TF Serving reads, outside of strings, as Python's decoder calls them."""
    # Of the same length; every quote that is left begins or ends a string.
    plain = text.replace(r"\\", "__").replace(r"\"", "__")
    parts, end = [], 0
    for found in _STRING_OR_CONSTANT.finditer(plain):
        if found[0] in _CONSTANTS:
            parts += [text[end : found.start()], _CONSTANTS[found[0]]]
            end = found.end()
    return "".join([*parts, text[end:]])


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise invalid_argument(f"a JSON object must have each key once. Received: {shown(twice)} twice or more often")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of, parse_constant=Constant)
_TYPE_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "an integer",
    float: "a number with a fraction or an exponent",
    Constant: "NaN or Infinity",
    bool: "a boolean",
    type(None): "null",
}


def type_name(value: Any) -> str:
    """Returns the words for ``value`` in errors."""
    return _TYPE_NAMES[type(value)]


def shown(name: str) -> str:
    """Returns ``name``, from a request, as errors show it: quoted, in ASCII and cut."""
    return ascii(name[:_MAX_NAME_CHARACTERS])
