"""Text and typed columns -> the types that a spec declares, by one set of rules for building and for scoring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.tables import Column

LIST_SEPARATOR = "|"  # A list (JSON, Parquet, TFDS) becomes text with this between its values.
ARROW_TYPES = {"string": pa.string(), "int64": pa.int64(), "float": pa.float64()}
# At most 18 digits, so that a cast to int64 cannot overflow. No inf, no nan.
_PATTERNS = {"int64": r"^[+-]?\d{1,18}$", "float": r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?$"}


def convert_column(values: pa.Array, column: Column) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Text -> the declared type. Failed values become null and are marked in the mask of their reason."""
    text, invalid_utf8 = _to_text(values)
    text = pc.if_else(pc.equal(pc.binary_length(text), 0), pa.scalar(None, pa.string()), text)
    failures = {f"invalid_utf8:{column.name}": invalid_utf8}
    if column.type == "string":
        return text, failures
    unparsable = pc.invert(pc.match_substring_regex(text, _PATTERNS[column.type]))
    failures[f"not_{column.type}:{column.name}"] = true_mask(unparsable)
    text = pc.if_else(unparsable, pa.scalar(None, pa.string()), text)
    numbers = pc.utf8_ltrim(text, "+").cast(ARROW_TYPES[column.type])
    if column.type == "float":  # 1e999 is well written, but more than a double holds.
        failures[f"not_float:{column.name}"] |= true_mask(pc.invert(pc.is_finite(numbers)))
    return numbers, failures


def _to_text(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Any column as text, and where its bytes were not UTF-8."""
    valid = np.zeros(len(values), bool)
    if pa.types.is_timestamp(values.type):
        return values.cast(pa.int64()).cast(pa.string()), valid
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return pc.binary_join(values.cast(pa.list_(pa.string())), LIST_SEPARATOR), valid
    if pa.types.is_floating(values.type):
        return _float_text(values), valid
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        return values.cast(pa.string()), valid
    try:
        return values.cast(pa.string()), valid
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
    return pc.fill_null(condition, False).to_numpy(zero_copy_only=False)


def _float_text(values: pa.Array) -> pa.Array:
    """Floats as text, whole numbers without point or exponent: 1700000000123.0 -> 1700000000123."""
    values = values.cast(pa.float64())
    is_whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 1e18))
    whole = pc.if_else(is_whole, values, pa.scalar(None, pa.float64())).cast(pa.int64())
    return pc.if_else(is_whole, whole.cast(pa.string()), values.cast(pa.string()))


def value_to_text(value: Any) -> str | None:
    """A JSON or NumPy value as text; a list with a separator between its values."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value):
        return LIST_SEPARATOR.join(value_to_text(entry) for entry in value if entry is not None)
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)
