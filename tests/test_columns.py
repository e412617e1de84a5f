"""Conversion of columns: a naive converter of single values gives the same, whatever the column's type."""

import datetime as dt
import decimal
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.columns import convert_column
from clsd_tf.spec.tables import Column

PIECES = [
    "0",
    "7",
    "12",
    "-",
    "+",
    ".",
    "e",
    "E",
    "x",
    "X",
    "0x1f",
    " ",
    "\n",
    "nan",
    "inf",
    "9" * 9,
    "é",
    "_",
    "\x00",
    "",
]
MAX_FLOAT = float(np.finfo(np.float32).max)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | st.integers(-(10**19), 10**19).map(str)
TEMPTING = st.sampled_from(
    ["0x1f", "7", "-12", "1.5", "-", "00", "+3", "9" * 19, "9" * 400]
)  # Alone or with plain ones.
NUMBERS = st.floats(allow_nan=False).map(repr) | st.integers(-50, 50).map(str)


def convert(values, declared):
    """(values, names of the failures of each row)."""
    converted, failures = convert_column(values, Column(name="c", type=declared))
    converted.validate(full=True)
    assert converted.type == {"string": pa.string(), "int64": pa.int64(), "float": pa.float64()}[declared]
    reasons = [[name for name, mask in failures.items() if mask[row]] for row in range(len(values))]
    assert all(mask.any() for mask in failures.values())
    return converted.to_pylist(), reasons


def convert_one(text, declared):
    """(value, failures) by the written rule: at most 18 digits, floats that a float32 can hold, nothing around them."""
    if text is None or text == "":
        return None, []
    if declared == "string":
        return text, []
    pattern = {"int64": r"[+-]?[0-9]{1,18}", "float": r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?"}[
        declared
    ]
    if re.fullmatch(pattern, text):
        value = int(text) if declared == "int64" else float(text)
        if abs(value) <= MAX_FLOAT:
            return value, []
    return None, [f"not_{declared}:c"]


@settings(max_examples=400, deadline=None)
@given(
    texts=st.lists(st.none() | TEXTS | NUMBERS, max_size=6) | st.lists(st.none() | TEMPTING, max_size=2),
    declared=st.sampled_from(["string", "int64", "float"]),
    kind=st.sampled_from([pa.string(), pa.binary(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    start=st.integers(0, 2),
)
def test_text_is_converted_as_value_by_value(texts, declared, kind, start):
    values = pa.array([text.encode() if text is not None and kind == pa.binary() else text for text in texts], kind)
    expected = [convert_one(text, declared) for text in texts[start:]]
    received = convert(values[start:], declared)
    assert received == ([value for value, _ in expected], [failures for _, failures in expected])


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-100, 100), max_size=5))
def test_integers_of_at_most_18_digits_are_kept(values):
    received, reasons = convert(pa.array(values, pa.int64()), "int64")
    fits = [value is None or abs(value) < 10**18 for value in values]
    assert received == [value if ok else None for value, ok in zip(values, fits, strict=True)]
    assert reasons == [[] if ok else ["not_int64:c"] for ok in fits]
    assert convert(pa.array(values, pa.int64()), "float")[0] == [
        None if value is None else float(value) for value in values
    ]


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.none() | st.floats() | st.integers(-9, 9).map(float), max_size=5))
def test_finite_floats_are_kept_and_whole_ones_are_integers(values):
    received, reasons = convert(pa.array(values, pa.float64()), "float")
    finite = [value is not None and abs(value) <= MAX_FLOAT for value in values]
    assert received == [value if ok else None for value, ok in zip(values, finite, strict=True)]
    assert reasons == [[] if ok or value is None else ["not_float:c"] for value, ok in zip(values, finite, strict=True)]
    whole = [ok and value.is_integer() and abs(value) < 1e18 for value, ok in zip(values, finite, strict=True)]
    expected = [int(value) if ok else None for value, ok in zip(values, whole, strict=True)]
    assert convert(pa.array(values, pa.float64()), "int64")[0] == expected


def test_minus_zero_is_zero_in_every_type():
    assert [math.copysign(1, value) for value in convert(pa.array([-0.0]), "float")[0]] == [1.0]


DAY = dt.datetime(2024, 1, 2)  # 1,704,153,600 s after 1970.


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([["a", None, "b"], [], None], pa.list_(pa.string())), ["a|b", None, None]),
        (pa.array([["a", "b"], None], pa.large_list(pa.string())), ["a|b", None]),
        (pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)), ["1|2", None, "3|4"]),
        (pa.array([["x"], ["a", "b"]])[1:], ["a|b"]),
        (pa.array([[1.0, 2.5]]), ["1|2.5"]),
        (pa.nulls(2), [None, None]),
        (pa.array([decimal.Decimal("1.50"), None]), ["1.50", None]),
        (pa.array([DAY.date(), None]), ["2024-01-02", None]),
        (pa.array([DAY, None], pa.timestamp("ms", tz="UTC")), ["1704153600000", None]),
        (pa.array([1_704_153_600_123_456_789], pa.timestamp("ns")), ["1704153600123456"]),  # As microseconds.
        (pa.array([5, None]).dictionary_encode(), ["5", None]),
        (pa.array([True, None]), ["true", None]),
        (pa.array([2**63], pa.uint64()), ["9223372036854775808"]),
        (pa.array(["x"], pa.string_view()), ["x"]),
    ],
    ids=lambda values: str(values.type) if isinstance(values, pa.Array) else "",
)
def test_typed_columns_have_a_text(values, text):
    assert convert(values, "string") == (text, [[]] * len(text))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([{"x": 1}, None]),
        pa.array([[{"x": 1}], None]),
        pa.array([[[1]], None]),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    ],
    ids=lambda values: str(values.type),
)
@pytest.mark.parametrize("declared", ["string", "int64", "float"])
def test_values_without_a_text_are_bad_and_missing_ones_are_not(values, declared):
    assert convert(values, declared) == ([None, None], [[f"not_{declared}:c"], []])


def test_invalid_utf8_within_a_list_is_a_failure_of_its_row():
    values = pa.array([[b"a"], [b"b", b"\xff"], None])
    assert convert(values, "string")[1] == [[], ["invalid_utf8:c"], []]
