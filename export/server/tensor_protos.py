"""Protos of requests and answers <-> numpy. Anyone may have written them: sizes are checked before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import input_pb2

from export.server.errors import invalid_argument

# The field of TensorProto that holds the values of a dtype.
_VALUE_FIELDS = {
    types_pb2.DT_FLOAT: "float_val",
    types_pb2.DT_DOUBLE: "double_val",
    types_pb2.DT_INT64: "int64_val",
    types_pb2.DT_INT32: "int_val",
    types_pb2.DT_INT16: "int_val",
    types_pb2.DT_INT8: "int_val",
    types_pb2.DT_UINT8: "int_val",
    types_pb2.DT_UINT16: "int_val",
    types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_UINT64: "uint64_val",
    types_pb2.DT_BOOL: "bool_val",
    types_pb2.DT_HALF: "half_val",
    types_pb2.DT_BFLOAT16: "half_val",
    types_pb2.DT_STRING: "string_val",
}
_HALF = (types_pb2.DT_HALF, types_pb2.DT_BFLOAT16)  # Their values are the bits of 16 bit floats, as integers.
_POINTER_BYTES = 8


def to_array(name: str, proto: tensor_pb2.TensorProto, spec: tf.TensorSpec, max_bytes: int) -> np.ndarray:
    """Reads an input.

    As in TensorFlow, fewer values than elements repeat the last one; a proto with no values is all zero or "".

    Args:
      name: of the input, for errors.
      proto: may be malformed in any way.
      spec: its dtype is demanded; the shape is checked elsewhere.
      max_bytes: that the array may take.

    Returns:
      An array of the proto's shape; an object array of bytes for strings.

    Raises:
      RequestError: INVALID_ARGUMENT, naming the input.
    """
    dtype = spec.dtype.as_datatype_enum
    if proto.dtype != dtype:
        raise invalid_argument(f"input {name!r} has dtype {_dtype_name(dtype)}. Received: {_dtype_name(proto.dtype)}")
    if dtype not in _VALUE_FIELDS:
        raise invalid_argument(f"input {name!r} has dtype {_dtype_name(dtype)}, which this server does not read")
    shape = _shape(name, proto, spec.dtype.size or _POINTER_BYTES, max_bytes)
    if dtype == types_pb2.DT_STRING:
        return _strings(name, proto, shape, max_bytes)
    values = _content(name, proto, spec, shape) if proto.tensor_content else _values(name, proto, spec, shape)
    return values.reshape(shape)


def to_proto(array: np.ndarray) -> tensor_pb2.TensorProto:
    """Writes an output into the field of its dtype, as TF Serving does by default.

    Args:
      array: object array of bytes for strings.

    Returns:
      The proto, whose tensor_content is empty.

    Raises:
      KeyError: a dtype that has no field.
    """
    is_string = array.dtype == object
    proto = tensor_pb2.TensorProto()
    proto.dtype = types_pb2.DT_STRING if is_string else tf.as_dtype(array.dtype).as_datatype_enum
    for size in array.shape:
        proto.tensor_shape.dim.add().size = size
    values = array.view(np.uint16) if proto.dtype in _HALF else array
    getattr(proto, _VALUE_FIELDS[proto.dtype]).extend(values.ravel().tolist())
    return proto


def _dtype_name(dtype: int) -> str:
    return types_pb2.DataType.Name(dtype) if dtype in types_pb2.DataType.values() else str(dtype)


def _shape(name: str, proto: tensor_pb2.TensorProto, element_bytes: int, max_bytes: int) -> tuple[int, ...]:
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise invalid_argument(f"input {name!r} must have a known shape. Received: {_shape_text(proto, shape)}")
    # Zeros count as ones: numpy refuses to multiply huge dimensions even where the product is 0.
    if len(shape) > 32 or math.prod(max(size, 1) for size in shape) * element_bytes > max_bytes:
        raise invalid_argument(f"input {name!r} may take {max_bytes} bytes. Received: {_shape_text(proto, shape)}")
    return shape


def _shape_text(proto: tensor_pb2.TensorProto, shape: tuple[int, ...]) -> str:
    return "unknown rank" if proto.tensor_shape.unknown_rank else f"shape {list(shape[:32])}"


def _content(name: str, proto: tensor_pb2.TensorProto, spec: tf.TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    expected = math.prod(shape) * spec.dtype.size
    if len(proto.tensor_content) != expected:
        raise invalid_argument(
            f"input {name!r} of shape {list(shape)} has {expected} bytes of tensor_content. "
            f"Received: {len(proto.tensor_content)}"
        )
    if spec.dtype == tf.bool:  # A byte other than 0 and 1 is no bool.
        return np.frombuffer(proto.tensor_content, np.uint8) != 0
    return np.frombuffer(proto.tensor_content, spec.dtype.as_numpy_dtype)


def _values(name: str, proto: tensor_pb2.TensorProto, spec: tf.TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    field = getattr(proto, _VALUE_FIELDS[proto.dtype])
    elements = math.prod(shape)
    _check_count(name, len(field), elements, shape)
    try:
        values = np.fromiter(field, np.uint16 if proto.dtype in _HALF else spec.dtype.as_numpy_dtype, len(field))
    except OverflowError as error:
        raise invalid_argument(
            f"input {name!r} holds a number outside of {_dtype_name(proto.dtype)}. Received: one at least"
        ) from error
    if proto.dtype in _HALF:
        values = values.view(spec.dtype.as_numpy_dtype)
    if len(values) < elements:
        values = np.concatenate(
            [values, np.full(elements - len(values), values[-1] if len(values) else 0, values.dtype)]
        )
    return values


def _strings(name: str, proto: tensor_pb2.TensorProto, shape: tuple[int, ...], max_bytes: int) -> np.ndarray:
    if proto.tensor_content:
        raise invalid_argument(f"input {name!r} must have its strings in string_val. Received: tensor_content")
    elements = math.prod(shape)
    strings = list(proto.string_val)
    _check_count(name, len(strings), elements, shape)
    missing = elements - len(strings)
    last = strings[-1] if strings else b""
    if missing * len(last) > max_bytes:
        raise invalid_argument(
            f"input {name!r} may take {max_bytes} bytes. Received: one string repeated {missing} times"
        )
    values = np.empty(elements, object)
    values[:] = strings + [last] * missing
    return values.reshape(shape)


def _check_count(name: str, values: int, elements: int, shape: tuple[int, ...]) -> None:
    if values > elements:
        raise invalid_argument(
            f"input {name!r} of shape {list(shape)} has {elements} elements. Received: {values} values"
        )


def examples_of(request_input: input_pb2.Input, max_bytes: int) -> list[bytes]:
    """Reads the tf.Examples of a Classify or Regress request.

    Args:
      request_input: examples, with or without a context.
      max_bytes: that they may take, each with the context.

    Returns:
      Serialized tf.Examples.

    Raises:
      RequestError: INVALID_ARGUMENT, they would take more.
    """
    if request_input.WhichOneof("kind") == "example_list_with_context":
        parts = request_input.example_list_with_context
        examples = [one.SerializeToString() for one in parts.examples]
        return with_context(parts.context.SerializeToString(), examples, max_bytes)
    return [one.SerializeToString() for one in request_input.example_list.examples]


def with_context(context: bytes, examples: Sequence[bytes], max_bytes: int) -> list[bytes]:
    """Puts a context before each example: in a protobuf the later value of a feature wins, so the example's own does.

    Args:
      context: serialized tf.Example; empty for none.
      examples: serialized tf.Examples.
      max_bytes: that the result may take.

    Returns:
      Serialized tf.Examples.

    Raises:
      RequestError: INVALID_ARGUMENT, the result would take more than ``max_bytes``.
    """
    size = len(context) * len(examples) + sum(map(len, examples))
    if size > max_bytes:
        raise invalid_argument(
            f"the examples of input 'inputs' may take {max_bytes:,} bytes, each with the context. Received: {size:,}, "
            f"of {len(examples):,} examples and a context of {len(context):,} bytes. Send fewer examples in a request"
        )
    return [context + one for one in examples]


def num_bytes(array: np.ndarray) -> int:
    """Returns the bytes that ``array`` takes in memory, its strings included."""
    return array.nbytes + (sum(map(len, array.ravel().tolist())) if array.dtype == object else 0)
