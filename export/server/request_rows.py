"""Requests, as signatures take them -> rows of raw inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf
from absl import logging
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import input_pb2

from clsd_tf.data.examples import parse_raw_examples, tensors_to_arrow
from clsd_tf.spec.model_inputs import RawInput
from export.server.loaded_version import LoadedVersion

_OF_EXAMPLES = ("serving_default", "classify", "regress")
_OF_TENSORS = "predict_raw"
_OF_LISTS = "rank"
_ROWS_PER_PART = 1024
_MAX_REPEATED_BYTES = 64 << 20  # Of users' values in the rows of their items.

Request = Mapping[str, np.ndarray]  # Inputs, as the signature takes them.


@dataclasses.dataclass(frozen=True)
class RequestKind:
    """Requests that have the same columns and the same encoding, and so become rows together.

    Attributes:
      model_name, version: that answered.
      encoding: the signature that stands for all of the same encoding: serving_default, predict_raw or rank.
      raw_inputs: columns of the rows.
      left_out: names of raw inputs that must not be logged.
    """

    model_name: str
    version: int
    encoding: str
    raw_inputs: tuple[RawInput, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, version: LoadedVersion, signature_name: str) -> RequestKind | None:
        """Finds the kind of a signature's requests.

        Args:
          version: that answers.
          signature_name: of it.

        Returns:
          None for requests that are not logged: other signatures, and models that do not name their raw inputs.
        """
        if signature_name not in (*_OF_EXAMPLES, _OF_TENSORS, _OF_LISTS):
            return None
        encoding = _OF_EXAMPLES[0] if signature_name in _OF_EXAMPLES else signature_name
        try:
            if version.manifest is None or not {"raw_inputs", "private_inputs"} <= version.manifest.keys():
                return None
            private = {_name(entry) for entry in version.manifest["private_inputs"]}
            declared = [_raw_input(**entry) for entry in version.manifest["raw_inputs"]]
        except (TypeError, ValueError, AttributeError):
            logging.error(
                "version %d of model %r is not logged: its manifest must list raw_inputs and private_inputs",
                version.version,
                version.model_name,
            )
            return None
        logged = tuple(entry for entry in declared if entry.name not in private)
        left_out = tuple(entry.name for entry in declared if entry.name in private)
        return cls(version.model_name, version.version, encoding, logged, left_out)


def _name(entry: object) -> str:
    if type(entry) is not str:
        raise TypeError(entry)
    return entry


def _raw_input(name: str, dtype: Any, is_list: bool = False) -> RawInput:
    if dtype not in ("string", "int64", "float") or (is_list and dtype != "string"):
        raise ValueError(dtype)
    return RawInput(_name(name), dtype, is_list)


def num_rows(kind: RequestKind, inputs: Request) -> int:
    """Counts the rows that a request becomes: those of `rank` are its items.

    Args:
      kind: of the request.
      inputs: the request.

    Returns:
      0 also for a message that cannot be parsed.
    """
    values = next(iter(inputs.values()))
    return sum(map(_num_items, values.tolist())) if kind.encoding == _OF_LISTS else len(values)


def _num_items(serialized: bytes) -> int:
    try:
        return len(input_pb2.ExampleListWithContext.FromString(serialized).examples)
    except DecodeError:  # TensorFlow took it all the same; it becomes no rows.
        return 0


def parts(kind: RequestKind, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    """Groups consecutive requests of few rows, or takes one of many alone.

    Args:
      kind: of the requests.
      requests: at least one.

    Yields:
      Requests of at most 1024 rows together, or one that has more.
    """
    part: list[Request] = []
    total = 0
    for request in requests:
        rows = num_rows(kind, request)
        if part and total + rows > _ROWS_PER_PART:
            yield part
            part, total = [], 0
        part.append(request)
        total += rows
    yield part


def rows_of(kind: RequestKind, requests: Sequence[Request]) -> tuple[list[pa.Table], int]:
    """Decodes requests, each by itself if they fail together.

    Args:
      kind: of the requests.
      requests: to decode.

    Returns:
      (the rows of the requests, how many requests could not be decoded).
    """
    try:
        return [_decode(kind, requests)], 0
    except Exception:  # TensorFlow, protobuf and Arrow each have their own; no request may end the log.
        if len(requests) == 1:
            return [], 1
    each = [rows_of(kind, [request]) for request in requests]  # One bad request must not cost the others.
    return [table for tables, _ in each for table in tables], sum(failed for _, failed in each)


def _decode(kind: RequestKind, requests: Sequence[Request]) -> pa.Table:
    if kind.encoding == _OF_TENSORS:
        # Each by itself: histories of one request are padded to its longest, not to that of others.
        return pa.concat_tables(tensors_to_arrow(request, kind.raw_inputs) for request in requests)
    serialized = [text for request in requests for values in request.values() for text in values.tolist()]
    return _decode_lists(kind, serialized) if kind.encoding == _OF_LISTS else _parse(kind, serialized)


def _decode_lists(kind: RequestKind, serialized: Sequence[bytes]) -> pa.Table:
    """A row per item: its own values, and where it has none those of its user, which are parsed once."""
    lists = [input_pb2.ExampleListWithContext.FromString(text) for text in serialized]
    users = _parse(kind, [one.context.SerializeToString() for one in lists])
    items = _parse(kind, [item.SerializeToString() for one in lists for item in one.examples])
    sizes = [len(one.examples) for one in lists]
    repeated = sum(users.slice(row, 1).nbytes * size for row, size in enumerate(sizes))
    if repeated > _MAX_REPEATED_BYTES:
        raise ValueError(f"the users of items may take {_MAX_REPEATED_BYTES} bytes. Received: {repeated}")
    of_users = users.take(pa.array(np.repeat(np.arange(len(sizes)), sizes)))
    return pa.table({name: _filled(items.column(name), of_users.column(name)) for name in items.column_names})


def _filled(values: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.ChunkedArray:
    """``values`` where they are known: neither null nor an empty list."""
    is_known = pc.is_valid(values)
    if pa.types.is_list(values.type):
        is_known = pc.greater(pc.list_value_length(values), 0)
    return pc.if_else(is_known, values, others)


def _parse(kind: RequestKind, serialized: Sequence[bytes]) -> pa.Table:
    parsed = parse_raw_examples(tf.constant(serialized, tf.string, shape=[len(serialized)]), kind.raw_inputs)
    return tensors_to_arrow({name: values.numpy() for name, values in parsed.items()}, kind.raw_inputs)
