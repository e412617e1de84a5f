"""TF Serving's JSON, by hand from its documented formats and the rules of json_tensor.cc."""

import base64
import json
import time
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from export.server.errors import RequestError
from export.server.json_format.answers import classify_answer, predict_answer, regress_answer
from export.server.json_format.examples import ExamplesRequest
from export.server.json_format.tensors import PredictRequest
from export.server.loaded_version import Signature

MAX_BYTES = 1 << 20


def signature(**dtypes):
    return Signature("s", {name: tf.TensorSpec(None, dtype, name) for name, dtype in dtypes.items()}, {})


def tensors(body, **dtypes):
    body = body if isinstance(body, bytes) else body.encode()
    return PredictRequest.parse(body).tensors(signature(**dtypes))


def refusal(body, **dtypes):
    with pytest.raises(RequestError) as caught:
        tensors(body, **dtypes)
    assert caught.value.http_status == 400
    return str(caught.value)


SENSORS = {"tag": tf.string, "signal": tf.int64, "sensor": tf.float32}
ROWS = """{"instances": [
  {"tag": "foo", "signal": [1, 2, 3, 4, 5], "sensor": [[1, 2], [3, 4.5]]},
  {"tag": "bar", "signal": [3, 4, 1, 2, 5], "sensor": [[4, 5], [6, 8]]}]}"""
COLUMNS = """{"inputs": {
  "tag": ["foo", "bar"],
  "signal": [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]],
  "sensor": [[[1, 2], [3, 4.5]], [[4, 5], [6, 8]]]}}"""


# --- Requests: rows and columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [ROWS, COLUMNS])
def test_rows_and_columns_are_two_ways_to_write_the_same_tensors(body):
    found = tensors(body, **SENSORS)
    assert found["tag"].tolist() == [b"foo", b"bar"]
    assert found["signal"].dtype == np.int64
    assert found["signal"].tolist() == [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]]
    assert found["sensor"].dtype == np.float32
    assert found["sensor"].tolist() == [[[1, 2], [3, 4.5]], [[4, 5], [6, 8]]]


@pytest.mark.parametrize(
    "body", ['{"instances": [1.5, 2]}', '{"inputs": [1.5, 2]}', '{"instances": [{"x": 1.5}, {"x": 2}]}']
)
def test_a_single_input_needs_no_name(body):
    assert tensors(body, x=tf.float32)["x"].tolist() == [1.5, 2.0]


def test_a_column_may_be_a_scalar_or_empty_and_rows_may_be_empty_lists():
    assert tensors('{"inputs": 5}', x=tf.int64)["x"].shape == ()
    assert tensors('{"inputs": []}', x=tf.int64)["x"].shape == (0,)
    assert tensors('{"instances": [[], []]}', x=tf.string)["x"].shape == (2, 0)


def test_the_signature_is_named_beside_the_values():
    request = PredictRequest.parse(b'{"signature_name": "raw", "inputs": 1, "note": "passed over"}')
    assert (request.signature_name, request.in_rows) == ("raw", False)
    assert PredictRequest.parse(b'{"instances": [1]}').signature_name == ""


@pytest.mark.parametrize("written", ["AP8B", "AP8=", "AP8", " AP\\n8= "])
def test_bytes_are_base64_padded_or_not(written):
    expected = base64.b64decode("AP8B" if "B" in written else "AP8=")
    for body in (f'{{"instances": [{{"b64": "{written}"}}]}}', f'{{"inputs": [{{"b64": "{written}"}}]}}'):
        assert tensors(body, x=tf.string)["x"].tolist() == [expected]
    assert tensors(f'{{"inputs": {{"b64": "{written}"}}}}', x=tf.string)["x"].item() == expected
    assert tensors(f'{{"instances": [{{"x": {{"b64": "{written}"}}}}]}}', x=tf.string)["x"].tolist() == [expected]


def test_text_is_utf8_whether_escaped_or_not():
    found = tensors('\ufeff{"inputs": ["é", "\\u00e9", "\\ud83d\\ude00", "a\\u0000b", ""]}', x=tf.string)["x"]
    assert found.tolist() == ["é".encode(), "é".encode(), "😀".encode(), b"a\0b", b""]


# --- Requests: numbers ------------------------------------------------------------------------------------------------


def test_int64_beyond_what_floats_hold_is_exact():
    numbers = [2**53 + 1, 2**63 - 1, -(2**63)]
    assert tensors(json.dumps({"inputs": numbers}), x=tf.int64)["x"].tolist() == numbers
    assert tensors(json.dumps({"inputs": [2**64 - 1]}), x=tf.uint64)["x"].tolist() == [2**64 - 1]


def test_numbers_that_are_not_finite_are_written_as_tokens():
    for dtype in (tf.float32, tf.float64):
        found = tensors('{"inputs": [NaN, -NaN, Infinity, Inf, -Inf, -Infinity, 1]}', x=dtype)["x"]
        assert np.isnan(found[:2]).all()
        assert found[2:].tolist() == [np.inf, np.inf, -np.inf, -np.inf, 1.0]
    assert tensors('{"inputs": ["Inf", "-NaN \\" Inf"], "a": Inf}', x=tf.string)["x"].tolist() == [
        b"Inf",
        b'-NaN " Inf',
    ]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (tf.float32, 2**24 - 1),
        (tf.float32, -(2**24) + 1),
        (tf.float32, float(2**25)),
        (tf.float32, 2**70),  # Beyond 64 bits it is read as a float.
        (tf.float64, 2**53 - 1),
        (tf.float64, 1e300),
        (tf.int8, -128),
        (tf.uint8, 255),
        (tf.int32, -(2**31)),
        (tf.uint32, 2**32 - 1),
        (tf.bool, True),
    ],
)
def test_values_that_the_dtype_holds_are_taken_as_they_are(dtype, value):
    found = tensors(json.dumps({"inputs": [value]}), x=dtype)["x"]
    assert found.dtype == dtype.as_numpy_dtype
    assert found.tolist() == [value]


def test_a_number_is_taken_if_it_rounds_to_one_that_the_dtype_holds():
    # The shortest text of the largest float32 stands for a float64 that is above it.
    largest = float(np.finfo(np.float32).max)
    assert tensors('{"inputs": [3.4028235e+38, -3.4028235e+38]}', x=tf.float32)["x"].tolist() == [largest, -largest]


@pytest.mark.parametrize(
    ("dtype", "value", "received"),
    [
        (tf.float32, "16777216", "an integer that is not exact"),
        (tf.float32, "-16777216", "an integer that is not exact"),
        (tf.float64, "9007199254740992", "an integer that is not exact"),
        (tf.float32, "3.4028236e+38", "a number beyond its range"),  # Nearer to 2**128 than to the largest float32.
        (tf.float32, "-1e39", "a number beyond its range"),
        (tf.float32, "1e999", "a number beyond its range"),
        (tf.float64, "1e999", "a number beyond its range"),
        (tf.float64, "1" + "0" * 400, "a number beyond its range"),
        (tf.float32, "true", "a boolean"),
        (tf.float32, '"1.5"', "a string"),
        (tf.float32, "null", "null"),
        (tf.int64, "1.0", "a number with a fraction or an exponent"),
        (tf.int64, "1e3", "a number with a fraction or an exponent"),
        (tf.int64, "NaN", "NaN or Infinity"),
        (tf.int64, "true", "a boolean"),
        (tf.int64, "9223372036854775808", "an integer beyond it"),
        (tf.int32, "2147483648", "an integer beyond it"),
        (tf.int8, "128", "an integer beyond it"),
        (tf.uint64, "-1", "an integer beyond it"),
        (tf.bool, "1", "an integer"),
        (tf.string, "1", "an integer"),
        (tf.string, '{"b64": "AP8="', None),
        (tf.string, '{"b64": "A*"}', "text that is no base64"),
        (tf.string, '{"b64": "AP8=="}', "text that is no base64"),
        (tf.string, '{"b64": "é"}', "text that is no base64"),
        (tf.string, '{"b64": 5}', "another object"),
        (tf.string, '{"b65": "AP8="}', "another object"),
        (tf.int64, '{"b64": "AP8="}', "an object"),
    ],
)
def test_other_values_are_refused_by_input_place_and_kind(dtype, value, received):
    good = {tf.string: '"a"', tf.bool: "true"}.get(dtype, "1")
    if received is None:
        assert "JSON parse error" in refusal(f'{{"inputs": [{value}]}}', x=dtype)
        return
    columns = refusal(f'{{"inputs": {{"x": [[{good}, {good}], [{good}, {value}]], "y": 1}}}}', x=dtype, y=tf.int64)
    assert columns.startswith("input 'x': inputs.x[1][1] must be")
    assert f"Received: {received}" in columns
    rows = f'{{"instances": [{{"x": [{good}, {good}], "y": 1}}, {{"x": [{good}, {value}], "y": 1}}]}}'
    assert refusal(rows, x=dtype, y=tf.int64).startswith("input 'x': instances[1].x[1] must be")
    assert refusal(f'{{"instances": [[{good}], [{value}]]}}', x=dtype).startswith("input 'x': instances[1][0] must be")


# --- Requests: shapes and names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"inputs": [[1, 2], [3]]}', "input 'x': inputs[1] must be an array of 2 values.* Received: 1 values"),
        ('{"inputs": [[1], 2]}', "input 'x': inputs[1] must be an array of 1 values.* Received: an integer"),
        ('{"inputs": [1, [2]]}', "input 'x': inputs[1] must be an integer.* Received: an array"),
        ('{"inputs": [[[1], [2]], [[3], [4, 5]]]}', "input 'x': inputs[1][1] must be an array of 1 values"),
        ('{"instances": [[1, 2], [3]]}', "input 'x': instances[1] must be"),
        ('{"instances": [{"x": [1]}, {"x": [1, 2]}]}', "input 'x': instances[1].x must be"),
        ('{"instances": [{"x": 1}, {"x": [1]}]}', "input 'x': instances[1].x must be"),
        ('{"instances": [{"x": 1}, 2]}', "instances[1] must be an object.* Received: an integer"),
        ('{"instances": [1, {"x": 2}]}', "input 'x': instances[1] must be an integer.* Received: an object"),
        ('{"instances": [{"x": 1}, {}]}', "instances[1] must have the signature's inputs x. Received: no x"),
        ('{"instances": [{"x": 1}, {"y": 1}]}', "instances[1] must have .* Received: no x"),
        ('{"instances": [{"x": 1, "y": 2}]}', "instances[0] must have .* Received: unknown 'y'"),
        ('{"inputs": {"x": 1, "y": 2}}', "inputs must have .* Received: unknown 'y'"),
        ('{"inputs": {}}', "inputs must have .* Received: no x"),
        ('{"instances": []}', "instances must be an array of at least one. Received: an empty one"),
        ('{"instances": {"x": 1}}', "instances must be an array of at least one. Received: an object"),
        ('{"instances": null}', "instances must be an array"),
        ('{"instances": [1], "inputs": [1]}', "a predict request must have instances or inputs. Received: both"),
        ('{"instance": [1]}', "a predict request must have instances or inputs. Received: neither"),
        ('{"signature_name": 5, "inputs": 1}', "signature_name must be a string. Received: an integer"),
        ("[1]", "the body must be a JSON object. Received: an array"),
        ('{"inputs": ' + "[" * 40 + "1" + "]" * 40 + "}", "input 'x': inputs must be nested at most 32 arrays deep"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_place(body, message):
    start, _, end = message.partition(".*")
    received = refusal(body, x=tf.int64)
    assert received.startswith(start)
    assert end in received


def test_several_inputs_need_names():
    for body in ('{"instances": [1, 2]}', '{"instances": [{"b64": "AP8="}]}'):
        assert refusal(body, x=tf.string, y=tf.string).startswith(
            "instances[0] must be an object of the signature's inputs x, y"
        )
    assert refusal('{"inputs": [1, 2]}', x=tf.int64, y=tf.int64).startswith("inputs must be an object")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Expecting value at offset 0"),
        (b'{"inputs": [1,]}', "at offset"),
        (b'{"inputs": [1]} x', "Extra data at offset 16"),
        (b"{'inputs': [1]}", "at offset 1"),
        (b'{"inputs": [01]}', "at offset"),
        (b'{"inputs": ["a\tb"]}', "Invalid control character"),
        (b'{"inputs": ["caf\xe9"]}', "must be UTF-8. Received: another byte at offset 16"),
        ('{"inputs": 1}'.encode("utf-16"), "must be UTF-8"),
        (b'{"inputs": ["\\ud800"]}', "whole characters"),
        (b'{"inputs": ["\\udc00"], "\\uD800": 1}', "whole characters"),
        (b"[" * 1_000_000, "nested"),
        (b'{"a":' * 1_000_000, "nested"),
        (b'{"inputs": ' + b"1" * 5000 + b"}", "64 bits"),
        (b'{"inputs": [1], "inputs": [2]}', "each key once. Received: 'inputs'"),
        (b'{"inputs": {"x": 1, "x": 2}}', "each key once. Received: 'x'"),
        (b'{"inputs": ' + b'\\"Inf' * 100_000, "at offset"),
    ],
)
def test_broken_json_is_the_clients_error(body, message):
    assert message in refusal(body, x=tf.int64)


def test_errors_hold_no_values_and_cut_names():
    long = "n" * 10_000
    for body in ('{"inputs": ["secret"]}', '{"inputs": [8150815]}', f'{{"inputs": {{"x": 1, "{long}": 8150815}}}}'):
        message = refusal(body, x=tf.bool)
        assert "secret" not in message
        assert "8150815" not in message
        assert len(message) < 300


def test_types_that_json_cannot_write_are_unimplemented():
    with pytest.raises(RequestError, match=r"complex64\. Use gRPC") as caught:
        tensors('{"inputs": 1}', x=tf.complex64)
    assert caught.value.http_status == 501


# --- Answers ----------------------------------------------------------------------------------------------------------


def test_answers_come_in_rows_or_columns_and_bare_for_one_output():
    ctr = np.array([0.1, 0.25], np.float32)
    ids = np.array([[b"a", "é".encode()], [b"c", b""]], object)
    assert predict_answer({"ctr": ctr}, in_rows=True) == b'{"predictions": [0.1, 0.25]}'
    assert predict_answer({"ctr": ctr}, in_rows=False) == b'{"outputs": [0.1, 0.25]}'
    both = {"ids": ids, "ctr": ctr}
    assert json.loads(predict_answer(both, in_rows=True)) == {
        "predictions": [{"ctr": 0.1, "ids": ["a", "é"]}, {"ctr": 0.25, "ids": ["c", ""]}]
    }
    assert json.loads(predict_answer(both, in_rows=False)) == {
        "outputs": {"ctr": [0.1, 0.25], "ids": [["a", "é"], ["c", ""]]}
    }


def test_floats_have_the_digits_of_their_own_type_and_a_point():
    values = np.array([0.2, 1, 1 / 3, 16777216, 1e-7, 3.4028235e38, np.nan, np.inf, -np.inf], np.float32)
    written = b"[0.2, 1.0, 0.33333334, 16777216.0, 1e-07, 3.4028235e+38, NaN, Infinity, -Infinity]"
    assert predict_answer({"x": values}, in_rows=True) == b'{"predictions": ' + written + b"}"
    assert predict_answer({"x": np.array(0.1)}, in_rows=False) == b'{"outputs": 0.1}'
    assert predict_answer({"x": np.array([0.1], np.float16)}, in_rows=False) == b'{"outputs": [0.099975586]}'


def test_outputs_named_bytes_are_base64_and_others_text():
    values = np.array([b"\x00\xff"], object)
    assert predict_answer({"key_bytes": values}, in_rows=True) == b'{"predictions": [{"b64": "AP8="}]}'
    with pytest.raises(RequestError, match=r"output key: .* name the output key_bytes"):
        predict_answer({"key": values}, in_rows=True)
    numbers = np.array([2**63 - 1, -1])
    assert predict_answer({"n_bytes": numbers}, in_rows=True) == b'{"predictions": [9223372036854775807, -1]}'
    assert predict_answer({"b": np.array([True])}, in_rows=True) == b'{"predictions": [true]}'


@pytest.mark.parametrize("other", [np.zeros(3), np.float64(0)])
def test_rows_need_outputs_of_one_size(other):
    with pytest.raises(RequestError, match=r"Received: a, b .*Send inputs instead of instances"):
        predict_answer({"a": np.zeros(2), "b": np.asarray(other)}, in_rows=True)


def test_classes_and_regressed_values_are_results():
    classes = np.array([[b"no", b"yes"]], object)
    scores = np.array([[0.9, 0.1]], np.float32)
    assert classify_answer({"classes": classes, "scores": scores}) == b'{"results": [[["no", 0.9], ["yes", 0.1]]]}'
    assert classify_answer({"scores": scores}) == b'{"results": [[["", 0.9], ["", 0.1]]]}'
    assert classify_answer({"classes": classes}) == b'{"results": [[["no", 0.0], ["yes", 0.0]]]}'
    for values in (np.array([0.1, 2], np.float32), np.array([[0.1], [2]], np.float32)):
        assert regress_answer({"outputs": values}) == b'{"results": [0.1, 2.0]}'


def test_a_repeated_key_is_found_in_one_pass():
    body = "{" + "".join(f'"{number}": 0, ' for number in range(100_000)) + '"99999": 0}'
    start = time.monotonic()
    assert "'99999' twice" in refusal(body)
    assert time.monotonic() - start < 5.0  # Comparing each with each takes minutes.


@pytest.mark.parametrize("character", ["a", r"\n"])
def test_a_long_text_beside_a_constant_takes_little_memory(character):
    body = f'{{"inputs": "{character * 500_000}", "a": Inf}}'
    tracemalloc.start()
    tensors(body, x=tf.string)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(body)


# --- Examples ---------------------------------------------------------------------------------------------------------


def features(serialized):
    found = tf.train.Example.FromString(serialized).features.feature
    return {name: list(getattr(value, value.WhichOneof("kind") or "int64_list").value) for name, value in found.items()}


def test_examples_take_the_kind_of_their_values_and_the_shared_context():
    body = {
        "signature_name": "classify",
        "context": {"user": "u", "age": 30, "price": 1.5},
        "examples": [{"item": ["a", {"b64": "AP8="}], "price": [2.5, 0.5]}, {"is_ad": [True, 3], "none": []}],
    }
    request = ExamplesRequest.parse(json.dumps(body).encode(), MAX_BYTES)
    assert request.signature_name == "classify"
    first, second = map(features, request.examples)
    assert first == {"user": [b"u"], "age": [30], "price": [2.5, 0.5], "item": [b"a", b"\x00\xff"]}
    assert second == {"user": [b"u"], "age": [30], "price": [1.5], "is_ad": [1, 3], "none": []}
    alone = ExamplesRequest.parse(b'{"examples": [{"x": NaN, "y": -5, "z": 1.0}]}', MAX_BYTES)
    assert tf.train.Example.FromString(alone.examples[0]).features.feature["z"].float_list.value == [1.0]
    assert features(alone.examples[0])["y"] == [-5]
    largest = ExamplesRequest.parse(b'{"examples": [{"x": [-3.4028235e+38, Infinity]}]}', MAX_BYTES)
    assert features(largest.examples[0])["x"] == [-float(np.finfo(np.float32).max), np.inf]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"examples": [{"x": 1}, {"x": null}]}', r"feature examples\[1\]\['x'\] must be .* Received: null"),
        ('{"examples": [{"x": [1, 2.5]}]}', "Received: an integer and a number with a fraction"),
        ('{"examples": [{"x": ["a", 1]}]}', "Received: a string and an integer"),
        ('{"examples": [{"x": [[1]]}]}', "Received: an array"),
        ('{"examples": [{"x": {"b65": "AP8="}}]}', "bytes as .* Received: another object"),
        ('{"examples": [{"x": {"b64": "?"}}]}', "Received: text that is no base64"),
        ('{"examples": [{"x": 9223372036854775808}]}', "integers of type int64"),
        ('{"examples": [{"x": 1e39}]}', "numbers of type float32"),
        ('{"examples": [{"x": [NaN, 1e999]}]}', "numbers of type float32"),
        ('{"context": {"u": null}, "examples": [{}]}', r"feature context\['u'\]"),
        ('{"context": [], "examples": [{}]}', "context must be an object"),
        ('{"examples": [{}, 5]}', r"examples\[1\] must be an object of features. Received: an integer"),
        ('{"examples": []}', "an empty one"),
        ('{"examples": {}}', "examples must be an array .* Received: an object"),
        ('{"examples": null}', "examples must be an array .* Received: null"),
        ('{"instances": [{}]}', "examples must be an array of at least one object. Received: none"),
        ('{"signature_name": null, "examples": [{}]}', "signature_name must be a string"),
    ],
)
def test_examples_that_do_not_fit_are_refused_by_example_and_feature(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        ExamplesRequest.parse(body.encode(), MAX_BYTES)
    assert caught.value.http_status == 400


def test_a_context_is_not_copied_into_examples_without_limit():
    body = json.dumps({"context": {"user": "u" * 10_000}, "examples": [{}] * 10_000}).encode()
    with pytest.raises(RequestError, match=r"'inputs' may take 1,000,000 bytes.* of 10,000 examples") as caught:
        ExamplesRequest.parse(body, 1_000_000)
    assert caught.value.http_status == 400


# --- Round trips ------------------------------------------------------------------------------------------------------

_SHAPES = npst.array_shapes(min_dims=1, max_dims=3, max_side=4)
_NUMBERS = st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_])


@settings(max_examples=100, deadline=None)
@given(values=_NUMBERS.flatmap(lambda dtype: npst.arrays(dtype, _SHAPES)), in_rows=st.booleans())
def test_numbers_come_back_as_they_were(values, in_rows):
    answer = predict_answer({"x": values}, in_rows)
    body = answer.replace(b"predictions", b"instances").replace(b"outputs", b"inputs")
    found = tensors(body, x=tf.as_dtype(values.dtype))["x"]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.binary(max_size=8), min_size=1, max_size=4), in_rows=st.booleans())
def test_bytes_come_back_as_they_were(values, in_rows):
    array = np.empty(len(values), object)
    array[:] = values
    answer = predict_answer({"x_bytes": array}, in_rows)
    body = answer.replace(b'"predictions"', b'"instances"').replace(b'"outputs"', b'"inputs"')
    assert tensors(body, x_bytes=tf.string)["x_bytes"].tolist() == values
