"""Requests for any signature: recorded in the warm-up file, or made up from what the graph parses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import input_pb2, prediction_log_pb2

from export.contract_rules.findings import NotApplicable
from export.contract_rules.graph import Feature, StringUse, string_use
from export.contract_rules.signatures import is_sendable
from export.contract_rules.version import Version
from export.server.checks import signature_name

Inputs = dict[str, np.ndarray]

UNKNOWN_TEXT = "a value that training never saw"
UNKNOWN_INTEGER = 987_654_321_987
_PLAIN_FLOAT = 0.5
_ITEMS_PER_REQUEST = 2


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests of one signature, made on demand.

    Attributes:
      name: of the signature.
      signature: what they are for.
      use: what the graph does with strings.
      recorded: inputs of the signature's first warm-up request; None without one.
      examples_input: name of the input that holds serialized Examples (or rank requests); None if none does.
    """

    name: str
    signature: meta_graph_pb2.SignatureDef
    use: StringUse
    recorded: Inputs | None
    examples_input: str | None

    def typical(self, batch_size: int) -> Inputs:
        """Repeats rows of the recorded request; without one, makes zeros and empty strings.

        Args:
          batch_size: rows, >= 0.

        Returns:
          Input -> array [batch_size, ...].

        Raises:
          NotApplicable: there is no recorded request, and made-up strings would be no fair request.
        """
        if self.recorded is not None:
            num_rows = len(next(iter(self.recorded.values())))
            rows = np.arange(batch_size) % num_rows
            return {name: values[rows] for name, values in self.recorded.items()}
        self._require_free_strings()
        return self._with_examples(self._plain(batch_size), self._message(_plain_values))

    def unknown(self, batch_size: int) -> Inputs:
        """Makes rows as ``typical`` does, but every string and every integer is one that no vocabulary holds.

        Args:
          batch_size: rows, >= 0.

        Returns:
          Input -> array [batch_size, ...].

        Raises:
          NotApplicable: made-up strings would be no fair request, or nothing takes strings or integers.
        """
        self._require_free_strings()
        features = self.use.features or {}
        of_examples = any(feature.dtype in (tf.string, tf.int64) for feature in features.values())
        tensors = {name: _unknown_tensor(values) for name, values in self._plain(batch_size).items()}
        of_tensors = any(values.dtype.kind in "Oiu" for name, values in tensors.items() if name != self.examples_input)
        if not of_examples and not of_tensors:
            raise NotApplicable("takes neither strings nor integers")
        return self._with_examples(tensors, self._message(_unknown_values))

    def empty(self, batch_size: int) -> Inputs:
        """Makes Examples without any feature.

        Args:
          batch_size: rows, >= 0.

        Returns:
          Input -> array [batch_size, ...].

        Raises:
          NotApplicable: the signature takes no Examples.
        """
        self._require_examples()
        return self._with_examples(self._plain(batch_size), _serialized({}, self.use))

    def without_each_feature(self) -> Iterator[tuple[str, Inputs]]:
        """Leaves out one feature after the other.

        Yields:
          (feature, a request of one row that has all other features).

        Raises:
          NotApplicable: the signature takes no Examples, or made-up strings would be no fair request.
        """
        self._require_examples()
        self._require_free_strings()
        values = _plain_values(self.use.features or {})
        for name in sorted(values):
            others = {key: value for key, value in values.items() if key != name}
            yield name, self._with_examples(self._plain(1), _serialized(others, self.use))

    def _require_examples(self) -> None:
        if self.examples_input is None:
            raise NotApplicable("takes no tf.Examples")

    def _require_free_strings(self) -> None:
        strings = [name for name, info in self.signature.inputs.items() if info.dtype == tf.string.as_datatype_enum]
        if strings and self.use.decoders:
            decoders = ", ".join(self.use.decoders)
            raise NotApplicable(f"its strings go through {decoders}, and the warm-up file has no request for it")
        if self.use.features is not None and self.examples_input is None and strings:
            raise NotApplicable("it is unknown which of its inputs holds tf.Examples")

    def _plain(self, batch_size: int) -> Inputs:
        return {name: _plain_tensor(info, batch_size) for name, info in self.signature.inputs.items()}

    def _message(self, values) -> bytes:
        return _serialized(values(self.use.features), self.use) if self.examples_input else b""

    def _with_examples(self, inputs: Inputs, message: bytes) -> Inputs:
        if self.examples_input is None:
            return inputs
        batch_size = len(inputs[self.examples_input])
        return inputs | {self.examples_input: np.array([message] * batch_size, object)}


def requests_for(version: Version, name: str) -> Requests:
    """Prepares requests for a signature.

    Args:
      version: that has the signature.
      name: of the signature.

    Returns:
      Its requests.

    Raises:
      NotApplicable: a tensor of the signature cannot be sent, or has no batch dimension.
    """
    signature = version.signatures[name]
    infos = [*signature.inputs.values(), *signature.outputs.values()]
    if not signature.inputs or not all(map(is_sendable, infos)):
        raise NotApplicable("cannot be called, see the rules tensor_names and tensor_dtypes")
    if not all(map(_is_batched, infos)):
        raise NotApplicable("not every tensor has a batch dimension, see the rule batch_dimension")
    use = string_use(version.meta_graph, signature)
    strings = [key for key, info in signature.inputs.items() if info.dtype == tf.string.as_datatype_enum]
    parses = use.features is not None and len(strings) == 1 and len(signature.inputs[strings[0]].tensor_shape.dim) == 1
    recorded = next((inputs for _, key, inputs in _recorded(version) if key == name and _fits(inputs, signature)), None)
    return Requests(name, signature, use, recorded, strings[0] if parses else None)


def largest_recorded_batch(version: Version) -> int | None:
    """Returns the rows of the largest warm-up request of ``version``, None without a usable one."""
    return max((len(next(iter(inputs.values()))) for _, _, inputs in _recorded(version) if inputs), default=None)


def recorded_inputs(log: prediction_log_pb2.PredictionLog) -> list[tuple[str, Inputs]]:
    """Reads what one record runs; Classify and Regress feed ``inputs``.

    Args:
      log: of the warm-up file.

    Returns:
      (signature, inputs) of each run; [] for kinds that are not replayed.

    Raises:
      Exception: TensorFlow's, for a TensorProto that holds no tensor.
    """
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        request = log.predict_log.request
        inputs = {name: _array(value) for name, value in request.inputs.items()}
        return [(signature_name(request.model_spec), inputs)]
    if kind in ("classify_log", "regress_log"):
        request = getattr(log, kind).request
        return [(signature_name(request.model_spec), {"inputs": _examples(request.input)})]
    if kind == "multi_inference_log":
        request = log.multi_inference_log.request
        return [(signature_name(task.model_spec), {"inputs": _examples(request.input)}) for task in request.tasks]
    return []


def _array(value: tf.compat.v1.TensorProto) -> np.ndarray:
    array = tf.make_ndarray(value)
    return array.astype(object) if array.dtype.kind == "S" else array


def _examples(request_input: input_pb2.Input) -> np.ndarray:
    """Serialized Examples; what is common to all (``context``) is joined by concatenation, as util.cc does it."""
    if request_input.WhichOneof("kind") == "example_list_with_context":
        joined = request_input.example_list_with_context
        common = joined.context.SerializeToString()
        return np.array([common + example.SerializeToString() for example in joined.examples], object)
    return np.array([example.SerializeToString() for example in request_input.example_list.examples], object)


def _recorded(version: Version) -> Iterator[tuple[int, str, Inputs]]:
    """(record, signature, inputs) of every readable warm-up request."""
    try:
        records = version.warmup_records
    except NotApplicable:
        return
    for number, record in enumerate(records):
        try:
            requests = recorded_inputs(prediction_log_pb2.PredictionLog.FromString(record))
        except Exception:  # A broken record is told by the rules of the warm-up file.
            continue
        yield from ((number, name, inputs) for name, inputs in requests)


def _fits(inputs: Inputs, signature: meta_graph_pb2.SignatureDef) -> bool:
    """Tells whether a recorded request has exactly the signature's inputs, with one row or more."""
    return (
        inputs.keys() == signature.inputs.keys()
        and all(tf.as_dtype(values.dtype) == tf.as_dtype(signature.inputs[key].dtype) for key, values in inputs.items())
        and all(values.ndim for values in inputs.values())
        and len({len(values) for values in inputs.values()}) == 1
        and len(next(iter(inputs.values()))) > 0
    )


def _is_batched(info: meta_graph_pb2.TensorInfo) -> bool:
    shape = info.tensor_shape
    return shape.unknown_rank or (bool(shape.dim) and shape.dim[0].size == -1)


def _plain_tensor(info: meta_graph_pb2.TensorInfo, batch_size: int) -> np.ndarray:
    """Zeros and empty strings; unknown dimensions but the first get size 1."""
    sizes = [dim.size for dim in info.tensor_shape.dim][1:]
    shape = [batch_size, *(max(size, 1) for size in sizes)]
    dtype = tf.as_dtype(info.dtype)
    if dtype == tf.string:
        return np.full(shape, b"", object)
    return np.full(shape, _PLAIN_FLOAT if dtype.is_floating else 0, dtype.as_numpy_dtype)


def _unknown_tensor(values: np.ndarray) -> np.ndarray:
    if values.dtype == object:
        return np.full(values.shape, UNKNOWN_TEXT.encode(), object)
    if values.dtype.kind in "iu":
        return np.full(values.shape, min(UNKNOWN_INTEGER, np.iinfo(values.dtype).max), values.dtype)
    return values


def _plain_values(features: Mapping[str, Feature]) -> dict[str, Sequence]:
    plain = {tf.string: b"", tf.int64: 0, tf.float32: _PLAIN_FLOAT}
    return {name: [plain[feature.dtype]] * feature.num_values for name, feature in features.items()}


def _unknown_values(features: Mapping[str, Feature]) -> dict[str, Sequence]:
    unknown = {tf.string: UNKNOWN_TEXT.encode(), tf.int64: UNKNOWN_INTEGER, tf.float32: _PLAIN_FLOAT}
    return {name: [unknown[feature.dtype]] * feature.num_values for name, feature in features.items()}


def _serialized(values: Mapping[str, Sequence], use: StringUse) -> bytes:
    """One Example of ``values``; for rank, a request whose user and items have them all."""
    example = tf.train.Example()
    for name, entries in values.items():
        feature = example.features.feature[name]
        if isinstance(entries[0], bytes):
            feature.bytes_list.value.extend(entries)
        elif isinstance(entries[0], int):
            feature.int64_list.value.extend(entries)
        else:
            feature.float_list.value.extend(entries)
    if not use.rank_requests:
        return example.SerializeToString()
    request = input_pb2.ExampleListWithContext(context=example, examples=[example] * _ITEMS_PER_REQUEST)
    return request.SerializeToString()
