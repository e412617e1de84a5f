"""Text and typed columns -> the types that a spec declares, by one set of rules for building and for scoring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.spec.tables import Column

LIST_SEPARATOR = "|"  # A list (JSON, Parquet, Avro, TFDS) becomes text with this between its values.
ARROW_TYPES = {"string": pa.string(), "int64": pa.int64(), "float": pa.float64()}
# At most 18 digits, so that a cast to int64 cannot overflow. No inf, no nan.
_MAX_DIGITS = 18
_MAX_FLOAT = float(np.finfo(np.float32).max)  # Models compute in float32: more would be infinite there.
_PATTERNS = {"int64": r"^[+-]?\d{1,18}$", "float": r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?$"}


def _table_of_bytes(characters: bytes) -> np.ndarray:
    allowed = np.zeros(256, bool)
    allowed[list(characters)] = True
    return allowed


# Of these characters, what Arrow's cast accepts and what the patterns accept is the same.
_PLAIN_CHARACTERS = {"int64": _table_of_bytes(b"0123456789-"), "float": _table_of_bytes(b"0123456789-.")}


def convert_column(values: pa.Array, column: Column) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Converts text or typed values to the declared type.

    >>> numbers, failures = convert_column(pa.array(["3", "", "x"]), Column(name="age", type="int64"))
    >>> numbers.to_pylist(), {reason: mask.tolist() for reason, mask in failures.items()}
    ([3, None, None], {'not_int64:age': [False, False, True]})

    Args:
      values: [rows] of any Arrow type; missing is null or "".
      column: the name, for reasons, and the declared type.

    Returns:
      The values, null where a value is missing or failed; and the mask [rows] of each reason by which some failed.
    """
    plain = _convert_plain(values, column.type)
    if plain is not None:
        return plain, {}
    converted, failures = _convert_by_rule(values, column)
    return converted, {reason: mask for reason, mask in failures.items() if mask.any()}


# --- Whole columns of plain values: what most columns are ------------------------------------------------------------


def _convert_plain(values: pa.Array, declared: str) -> pa.Array | None:
    """Casts the column at once; None if any value needs a closer look."""
    try:
        if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
            return _plain_numbers(values, declared)
        if pa.types.is_binary(values.type) or pa.types.is_string(values.type):
            return _plain_text(values, declared)
    except pa.ArrowInvalid:
        pass
    return None


def _plain_numbers(values: pa.Array, declared: str) -> pa.Array | None:
    if declared == "int64" and pa.types.is_integer(values.type):
        numbers = values.cast(pa.int64())
        return numbers if _within(numbers, 10**_MAX_DIGITS - 1) else None
    if declared == "float":
        numbers = values.cast(pa.float64(), safe=False)
        return pc.add(numbers, 0.0) if _within(numbers, _MAX_FLOAT) else None  # -0 becomes 0.
    return None


def _within(numbers: pa.Array, limit: float) -> bool:
    """Returns True where every number is in [-limit, limit]; False if one is NaN."""
    limits = pc.min_max(numbers)
    low, high = limits["min"].as_py(), limits["max"].as_py()
    no_nan = pa.types.is_integer(numbers.type) or not pc.any(pc.is_nan(numbers)).as_py()
    return low is None or (no_nan and -limit <= low and high <= limit)


def _plain_text(values: pa.Array, declared: str) -> pa.Array | None:
    if declared == "string":
        shortest = pc.min(pc.binary_length(values)).as_py()
        return values.cast(pa.string()) if shortest != 0 else None
    if not _PLAIN_CHARACTERS[declared][_characters(values)].all():
        return None
    if declared == "int64" and (pc.max(pc.binary_length(values)).as_py() or 0) > _MAX_DIGITS:
        return None
    numbers = values.cast(pa.string()).cast(ARROW_TYPES[declared])
    return numbers if declared == "int64" or _within(numbers, _MAX_FLOAT) else None


def _characters(values: pa.Array) -> np.ndarray:
    """All bytes of a text column, as one array."""
    _, offsets, data = values.buffers()
    if data is None or not len(values):
        return np.zeros(0, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[[values.offset, values.offset + len(values)]]
    return np.frombuffer(data, np.uint8)[ends[0] : ends[1]]


# --- Value by value, by the patterns ---------------------------------------------------------------------------------


def _convert_by_rule(values: pa.Array, column: Column) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Does the work of ``convert_column`` for values of any kind."""
    try:
        text, invalid_utf8 = _to_text(values)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowInvalid):  # A struct, a map, a list of lists.
        failed = values.is_valid().to_numpy(zero_copy_only=False)
        return pa.nulls(len(values), ARROW_TYPES[column.type]), {f"not_{column.type}:{column.name}": failed}
    text = pc.if_else(pc.equal(pc.binary_length(text), 0), pa.scalar(None, pa.string()), text)
    failures = {f"invalid_utf8:{column.name}": invalid_utf8}
    if column.type == "string":
        return text, failures
    unparsable = pc.invert(pc.match_substring_regex(text, _PATTERNS[column.type]))
    failures[f"not_{column.type}:{column.name}"] = true_mask(unparsable)
    text = pc.if_else(unparsable, pa.scalar(None, pa.string()), text)
    numbers = pc.utf8_ltrim(text, "+").cast(ARROW_TYPES[column.type])
    if column.type == "float":
        within = pc.less_equal(pc.abs(numbers), _MAX_FLOAT)  # 1e999 is well written, but infinite.
        failures[f"not_float:{column.name}"] |= true_mask(pc.invert(within))
        numbers = pc.if_else(within, numbers, pa.scalar(None, pa.float64()))
    return numbers, failures


def _to_text(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Any column as text, and where its bytes were not UTF-8."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        return _to_text(values.dictionary_decode())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _joined_lists(values.cast(pa.list_(kind.value_type)))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _decoded(values)
    return _as_string(values), np.zeros(len(values), bool)


def _as_string(values: pa.Array) -> pa.Array:
    if pa.types.is_timestamp(values.type):
        if values.type.unit == "ns":  # No event time has a finer unit than microseconds.
            values = values.cast(pa.timestamp("us"), safe=False)
        return values.cast(pa.int64()).cast(pa.string())
    if pa.types.is_floating(values.type):
        return _float_text(values)
    return values.cast(pa.string())


def _joined_lists(values: pa.ListArray) -> tuple[pa.Array, np.ndarray]:
    """Lists as text with ``LIST_SEPARATOR`` between the values that are not null."""
    entries, invalid = _to_text(values.flatten())
    if pa.types.is_nested(values.type.value_type):
        raise pa.ArrowNotImplementedError("a list of lists has no text")
    rows = np.repeat(np.arange(len(values)), pc.fill_null(pc.list_value_length(values), 0))
    kept = entries.is_valid().to_numpy(zero_copy_only=False)
    lengths = np.bincount(rows[kept], minlength=len(values))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, entries.drop_null(), mask=values.is_null())
    return pc.binary_join(lists, LIST_SEPARATOR), np.bincount(rows[invalid], minlength=len(values)) > 0


def _decoded(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    try:
        return values.cast(pa.binary()).cast(pa.string()), np.zeros(len(values), bool)
    except pa.ArrowInvalid:  # Rare, so a loop over the batch is fine.
        decoded = [_decode(value) for value in values.to_pylist()]
        failed = np.array([ok is False for _, ok in decoded])
        return pa.array([text for text, _ in decoded], pa.string()), failed


def _decode(value: bytes | None) -> tuple[str | None, bool]:
    try:
        return (None if value is None else value.decode("utf-8")), True
    except UnicodeDecodeError:
        return None, False


def true_mask(condition: pa.Array) -> np.ndarray:
    """Returns ``condition`` as bool [rows], with null as False."""
    return pc.fill_null(condition, False).to_numpy(zero_copy_only=False)


def _float_text(values: pa.Array) -> pa.Array:
    """Floats as text, whole numbers without point or exponent: 1700000000123.0 -> 1700000000123."""
    values = values.cast(pa.float64())
    is_whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 1e18))
    whole = pc.if_else(is_whole, values, pa.scalar(None, pa.float64())).cast(pa.int64())
    return pc.if_else(is_whole, whole.cast(pa.string()), values.cast(pa.string()))


def decimals(values: np.ndarray) -> np.ndarray:
    """Returns floats as float64 with the shortest decimals of their own type.

    >>> decimals(np.array([0.1], np.float32)).tolist(), float(np.float32(0.1))
    ([0.1], 0.10000000149011612)

    Args:
      values: float32 or float64 of any shape.
    """
    if values.dtype == np.float64:
        return values
    text = pa.array(values.astype(np.float32).ravel()).cast(pa.string())
    return text.cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(values.shape)


def value_to_text(value: Any) -> str | None:
    """Returns a JSON or NumPy value as text; a list with a separator between its values.

    >>> value_to_text([1.0, None, "a"]), value_to_text(True), value_to_text(None)
    ('1|a', 'true', None)

    Args:
      value: None, a scalar, bytes in UTF-8, or a list of these.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return LIST_SEPARATOR.join(text for entry in value if (text := value_to_text(entry)) is not None)
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)
